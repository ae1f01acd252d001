"""Checkpoints that are whole or absent: parts, manifest, flush, one rename; all verified before any rank loads.

    <folder>/step-00000200/manifest.json      {"format": 1, "step", "world_size", "files": {path: {size_bytes, sha256}}}
    <folder>/step-00000200/<part>/...         what each part wrote, file names differing between ranks
    <folder>/.step-00000200-<token>/          a save under way; it does not count, and a later attempt removes it

Nothing here trusts a pointer: the newest step whose files all match its manifest is the one that loads.
"""

import json
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dpkd import storage
from dpkd.errors import UserError
from dpkd.report.progress import say
from dpkd.untrusted import parse_json
from dpkd.world import World

FORMAT = 1
MANIFEST = "manifest.json"


class Part(Protocol):
    """Something with state: an engine, a random generator. Called on every rank."""

    def save(self, folder: Path) -> None:
        """Writes this rank's share into `folder`."""

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""


@dataclass(frozen=True)
class RandomState:
    """The PyTorch generators of this rank, so that dropout goes on as if it had not been interrupted."""

    world: World

    def save(self, folder: Path) -> None:
        """Writes `random-<rank>.pt`."""
        states = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.world.device)
        torch.save(states, folder / f"random-{self.world.rank}.pt")

    def load(self, folder: Path) -> None:
        """Restores this rank's generators; a rank that did not exist at the save keeps its own."""
        path = folder / f"random-{self.world.rank}.pt"
        if not path.exists():
            return
        states = torch.load(path, weights_only=True)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.world.device)


class Checkpoints:
    """The checkpoints of one stage, in a folder that all ranks see."""

    def __init__(self, folder: Path, *, world: World, keep: int) -> None:
        self.folder = folder
        self.world = world
        self.keep = keep

    def save(self, step: int, parts: Mapping[str, Part]) -> None:
        """Writes and publishes one checkpoint; all ranks return, or all raise and the earlier one stands."""
        token: str = self.world.broadcast(secrets.token_hex(4))
        draft = self.folder / f".step-{step:08d}-{token}"
        self._together(lambda: self._write_parts(draft, parts), f"checkpoint at step {step}", draft)
        self._together(lambda: self._publish(draft, step), f"checkpoint at step {step}", draft)

    def load_newest(self, parts: Mapping[str, Part]) -> int:
        """Loads the newest checkpoint whose every file is as its manifest says; returns its step, or 0 without one."""
        if self.world.rank == 0:
            self._remove_drafts()
        steps: list[int] = self.world.broadcast(_committed_steps(self.folder))
        for step in reversed(steps):
            folder = _step_folder(self.folder, step)
            faults = sorted({fault for rank in self.world.gather(self._faults(folder)) for fault in rank})
            if faults:
                if self.world.rank == 0:
                    say(f"checkpoint {folder.name} is damaged and not used: {'; '.join(faults)}")
                continue
            for name, part in parts.items():
                part.load(folder / name)
            return step
        if steps:
            raise UserError(
                f"{self.folder}: all {len(steps)} checkpoints are damaged; restore one from a copy, "
                "or delete the folder to start the stage anew"
            )
        return 0

    def _write_parts(self, draft: Path, parts: Mapping[str, Part]) -> None:
        for name, part in parts.items():
            folder = draft / name
            folder.mkdir(parents=True, exist_ok=True)
            part.save(folder)

    def _publish(self, draft: Path, step: int) -> None:
        if self.world.rank != 0:
            return
        files = {
            str(path.relative_to(draft)): {"size_bytes": path.stat().st_size, "sha256": storage.sha256(path)}
            for path in sorted(draft.rglob("*"))
            if path.is_file()
        }
        manifest = {"format": FORMAT, "step": step, "world_size": self.world.size, "files": files}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))
        final = _step_folder(self.folder, step)
        if final.exists():  # a damaged one of the same step, passed over by load_newest
            shutil.rmtree(final)
        storage.publish(draft, final)
        for old in _committed_steps(self.folder)[: -self.keep]:
            shutil.rmtree(_step_folder(self.folder, old))

    def _together(self, act: Any, what: str, draft: Path) -> None:
        """Runs `act` on every rank; if it fails on one, removes the draft and raises on all, so that none waits."""
        reason = None
        try:
            act()
        except (OSError, UserError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            reason = f"rank {self.world.rank}: {error}"
        reasons = [found for found in self.world.gather(reason) if found]
        if reasons:
            if self.world.rank == 0:
                shutil.rmtree(draft, ignore_errors=True)
            raise UserError(
                f"{what} could not be written to {self.folder} ({'; '.join(reasons)}); the earlier ones stand. "
                "Free space or mend the storage, then give the same command again"
            )

    def _faults(self, folder: Path) -> list[str]:
        """What is wrong with this rank's share of the files; all ranks together read every file once."""
        try:
            manifest = parse_json((folder / MANIFEST).read_bytes())
            files = manifest["files"].items()
            if manifest["format"] != FORMAT:
                return [f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"]
            return [
                fault
                for path, expected in list(files)[self.world.rank :: self.world.size]
                if (fault := _fault(folder / path, expected))
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return [f"{MANIFEST} cannot be read ({error!r})"]

    def _remove_drafts(self) -> None:
        for draft in self.folder.glob(".step-*"):
            shutil.rmtree(draft, ignore_errors=True)


def _fault(path: Path, expected: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != expected["size_bytes"]:
        return f"{path.name} has {size} bytes, expected {expected['size_bytes']}"
    if storage.sha256(path) != expected["sha256"]:
        return f"{path.name} has another sha256 than its manifest says"
    return None


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _committed_steps(folder: Path) -> list[int]:
    """Steps of the published checkpoints, oldest first."""
    found = [path.name for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(name.removeprefix("step-")) for name in found if re.fullmatch(r"step-[0-9]{8,18}", name))
