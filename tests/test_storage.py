import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpkd.errors import StorageError, UserError
from dpkd.io import storage

NOBODY = 65534


@contextmanager
def no_permission(folder: Path) -> Iterator[None]:
    """Within, this process may not write to `folder`; as root, by giving up root for the while."""
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        folder.chmod(0o500)
        try:
            yield
        finally:
            folder.chmod(0o700)


@contextmanager
def no_file_above(size_bytes: int) -> Iterator[None]:
    """Within, writes past this size fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    place = tmp_path / "file"
    storage.write_bytes_atomic(place, b"old")
    with pytest.raises(ZeroDivisionError), storage.open_atomic(place) as file:
        assert file.write(b"new") / 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_a_full_disk_is_told_with_the_path_and_leaves_nothing(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*file: File too large; .*ulimit"), no_file_above(1000):
        storage.write_bytes_atomic(tmp_path / "file", bytes(5000))
    assert not list(tmp_path.iterdir())


def test_a_device_without_space_is_told_as_a_full_disk():
    with pytest.raises(StorageError, match=r"the disk is full: free some space"), storage.write_errors("/dev/full"):
        Path("/dev/full").write_bytes(b"x")


def test_a_place_without_write_permission_is_told(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*no permission"), no_permission(tmp_path):
        storage.write_bytes_atomic(tmp_path / "file", b"data")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_exist_is_told():
    with pytest.raises(StorageError, match=r"cannot write /proc/dpkd/file"):
        storage.write_bytes_atomic("/proc/dpkd/file", b"data")


def test_publish_moves_a_whole_folder_and_never_overwrites(tmp_path):
    draft = tmp_path / "draft"
    (draft / "inner").mkdir(parents=True)
    (draft / "inner" / "file").write_bytes(b"x")
    storage.publish(draft, tmp_path / "final")
    assert (tmp_path / "final" / "inner" / "file").read_bytes() == b"x"
    assert not draft.exists()
    draft.mkdir()
    with pytest.raises(UserError, match="exists already"):
        storage.publish(draft, tmp_path / "final")


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_local_and_remote_places_behave_alike(kind, tmp_path, request):
    if kind == "s3":
        request.getfixturevalue("object_store")
    places = {
        "local": str(tmp_path / "root"),
        "memory": f"memory://{tmp_path.name}",
        "s3": f"s3://bucket/{tmp_path.name}",
    }
    root = places[kind]
    place = storage.join(root, "a", "b.bin")
    assert not storage.exists(place)
    assert storage.list_names(root) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(place)
    storage.write_bytes_atomic(place, b"0123456789")
    storage.write_bytes_atomic(storage.join(root, "c.bin"), b"c")
    storage.write_bytes_atomic(storage.join(root, ".hidden"), b"c")
    assert storage.exists(place)
    assert storage.size(place) == 10
    assert storage.read_range(place, 2, 3) == b"234"
    assert storage.walk(root) == [("a/b.bin", 10), ("c.bin", 1)]
    assert storage.list_names(root) == [".hidden", "a", "c.bin"]
    assert storage.sha256(place) == storage.digest(b"0123456789")
    storage.remove(place)
    storage.remove(place)
    assert not storage.exists(place)


def test_a_link_back_to_a_folder_above_ends_the_walk(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert [name for name, _ in storage.walk(tmp_path)] == ["a/x"]


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_of_several_that_create_a_file_one_does(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind == "s3":
        request.getfixturevalue("object_store")
    place = {"local": str(tmp_path / "claims" / "1"), "s3": f"s3://bucket/{tmp_path.name}/1"}[kind]
    with ThreadPoolExecutor(8) as threads:
        created = list(threads.map(lambda _: storage.create(place), range(8)))
    assert sorted(created) == [False] * 7 + [True]
    assert storage.read_bytes(place) == b""
