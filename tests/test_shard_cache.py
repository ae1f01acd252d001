"""Copies of remote shards: checked, shared by processes, and within their bound."""

import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpkd.errors import UserError
from dpkd.io import shard_cache, storage

ROOT = Path(__file__).resolve().parents[1]
SIZE_BYTES = 100_000


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where copies go."""
    monkeypatch.setattr(shard_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"dpkd-shards-{os.getuid()}"


def content_of(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE_BYTES)


def publish(root: Path, number: int) -> str:
    """A shard at a URL that is not a path for dpkd, and that all processes see."""
    storage.write_bytes_atomic(root / "store" / f"{number}.tar", content_of(number))
    return f"local://{root}/store/{number}.tar"


def read(url: str, number: int) -> bytes:
    content = content_of(number)
    descriptor = shard_cache.open_shard(url, size_bytes=SIZE_BYTES, sha256_hex=storage.digest(content))
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def allow(monkeypatch: pytest.MonkeyPatch, num_copies: float) -> None:
    """Lets the disk have room for that many copies beside those that stand: twice that is free."""
    free = int(2 * num_copies * SIZE_BYTES)

    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=free - sum(path.stat().st_size for path in folder.iterdir()))

    monkeypatch.setattr(shard_cache.shutil, "disk_usage", usage)


def copies(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.tar")}


def name_of(number: int) -> str:
    return f"{storage.digest(content_of(number))}.tar"


def test_a_remote_shard_is_fetched_once_and_checked(folder, tmp_path):
    url = publish(tmp_path, 1)
    assert read(url, 1) == content_of(1)
    storage.remove(url.removeprefix("local://"))
    assert read(url, 1) == content_of(1)
    other = publish(tmp_path, 2)
    with pytest.raises(UserError, match="checksum differs"):
        read(other, 3)
    assert copies(folder) == {name_of(1)}
    assert {path.name for path in tmp_path.iterdir()} == {"store", folder.name}
    with pytest.raises(FileNotFoundError):
        read(f"local://{tmp_path}/none.tar", 4)


def test_a_copy_that_was_cut_is_fetched_again(folder, tmp_path):
    url = publish(tmp_path, 1)
    read(url, 1)
    (folder / name_of(1)).write_bytes(b"cut")
    assert read(url, 1) == content_of(1)


def test_the_copies_not_opened_for_longest_go_first(folder, tmp_path, monkeypatch):
    allow(monkeypatch, 3)
    urls = [publish(tmp_path, number) for number in range(5)]
    for number in (0, 1, 2, 0, 3):
        read(urls[number], number)
    assert copies(folder) == {name_of(0), name_of(2), name_of(3)}
    read(urls[4], 4)
    assert copies(folder) == {name_of(0), name_of(3), name_of(4)}


def test_a_copy_that_another_process_has_open_stays(folder, tmp_path, monkeypatch):
    allow(monkeypatch, 2)
    urls = [publish(tmp_path, number) for number in range(4)]
    read(urls[0], 0)
    read_and_wait = """
import sys
from tests.test_shard_cache import SIZE_BYTES, content_of, shard_cache, storage
shard_cache.tempfile.gettempdir = lambda: sys.argv[1]
shard_cache.open_shard("local:///none", size_bytes=SIZE_BYTES, sha256_hex=storage.digest(content_of(0)))
print("open", flush=True)
input()
"""
    command = [sys.executable, "-c", read_and_wait, str(tmp_path)]
    reader = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert reader.stdout.readline() == b"open\n"
        for number in (1, 2):
            read(urls[number], number)
        assert copies(folder) == {name_of(0), name_of(2)}
    finally:
        reader.kill()
        reader.wait()
    read(urls[3], 3)
    assert copies(folder) == {name_of(2), name_of(3)}


def read_at_random(root: Path, seed: int) -> int:
    """Reads shards in a process whose disk has room for three; returns how many were not as they should be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_cache.tempfile, "gettempdir", lambda: str(root))
        patch.setattr(storage, "BLOCK_BYTES", 10_000)
        patch.setattr(shard_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * SIZE_BYTES))
        numbers = random.Random(seed).choices(range(8), k=60)
        return sum(read(f"local://{root}/store/{number}.tar", number) != content_of(number) for number in numbers)


def test_processes_that_fetch_and_remove_at_once_read_right_bytes(tmp_path):
    for number in range(8):
        publish(tmp_path, number)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.starmap(read_at_random, [(tmp_path, seed) for seed in range(4)]) == [0, 0, 0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"store", f"dpkd-shards-{os.getuid()}"}
