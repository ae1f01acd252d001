"""A checkpoint is on the disk, flushed, before its manifest makes it count: what the system is asked, in order."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dpkd.engine.world import World
from dpkd.train.checkpoint import Checkpoints
from dpkd.train.parts import RandomState

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@dataclass(frozen=True)
class State:
    """Which file or folder it is, whatever its name, and when its content last changed."""

    inode: int
    size: int
    changed_ns: int

    @staticmethod
    def of(found: os.stat_result) -> "State":
        return State(found.st_ino, found.st_size, found.st_mtime_ns)


class Disk:
    """Everything that is flushed, and every name that is given, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, Any]] = []
        fsync = os.fsync

        def note_fsync(descriptor: int) -> None:
            fsync(descriptor)
            self.events.append(("flushed", State.of(os.fstat(descriptor))))
            self.events.append(("flushed", Path(f"/proc/self/fd/{descriptor}").readlink()))

        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(Path, "mkdir", self._noting(Path.mkdir, named=0))
        for owner in (os, Path):  # not every version of Python leads the one to the other
            for verb in ("replace", "rename"):
                monkeypatch.setattr(owner, verb, self._noting(getattr(owner, verb), named=1))

    def _noting(self, act: Callable[..., Any], *, named: int) -> Callable[..., Any]:
        def note(*arguments: Any, **others: Any) -> Any:
            path = Path(arguments[named])
            stood = path.is_dir()
            done = act(*arguments, **others)
            if not stood:
                self.events.append(("named", path))
            return done

        return note

    def named(self, path: Path) -> int:
        """When the file or folder was given its name."""
        return max(when for when, event in enumerate(self.events) if event == ("named", path))

    def flushed(self, thing: State | Path, *, after: int = -1, before: int | None = None) -> bool:
        """Whether a content, or the folder of this name, was flushed between two moments."""
        return ("flushed", thing) in self.events[after + 1 : before]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A new checkpoint's place."""
    return tmp_path / "checkpoints" / "step-00000001-a0001"


@pytest.fixture
def disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """What was asked of the disk during a first save of two parts."""
    disk = Disk(monkeypatch)
    parts = {"random": RandomState(ALONE), "more": RandomState(ALONE)}
    checkpoints = Checkpoints(folder.parent, world=ALONE, keep=2)
    checkpoints.load_newest(parts)
    checkpoints.save(1, parts)
    checkpoints.finish()
    monkeypatch.undo()
    return disk


def files(folder: Path) -> list[Path]:
    return [folder / name for name in json.loads((folder / "manifest.json").read_text())["files"]]


def test_every_file_is_flushed_under_its_name_before_its_rank_says_so(disk: Disk, folder: Path) -> None:
    said = disk.named(folder / "files-00000-of-00001.json")
    assert {path.parent.name for path in files(folder)} == {"random", "more"}
    for path in files(folder):
        assert disk.flushed(State.of(path.stat()), before=said), path
        assert disk.flushed(path.parent, after=disk.named(path), before=said), path


def test_every_folder_is_flushed_before_the_checkpoint_counts(disk: Disk, folder: Path) -> None:
    counts = disk.named(folder / "manifest.json")
    for path in (folder, *(path.parent for path in files(folder)), folder / "files-00000-of-00001.json"):
        assert disk.flushed(path.parent, after=disk.named(path), before=counts), path


def test_the_manifest_is_flushed_before_it_counts_and_its_name_after(disk: Disk, folder: Path) -> None:
    counts = disk.named(folder / "manifest.json")
    assert disk.named(folder / "files-00000-of-00001.json") < counts
    assert disk.flushed(State.of((folder / "manifest.json").stat()), before=counts)
    assert disk.flushed(folder, after=counts)
