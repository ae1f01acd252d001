"""A checkpoint is whole or absent, and only a whole one loads: on a disk, and on object storage."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpkd.engine.world import World
from dpkd.errors import StorageError, StorageUnavailable, UserError
from dpkd.io import errors, storage
from dpkd.io.checkpoint_store import CheckpointId, CheckpointStore
from dpkd.io.fence import StaleAttempt
from dpkd.io.record import checked, parse_checked
from dpkd.train.checkpoint import Checkpoints

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where checkpoints stand."""
    if request.param == "disk":
        return str(tmp_path)
    request.getfixturevalue("object_store")
    return f"s3://bucket/checkpoints/{tmp_path.name}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does not wait long for storage that fails now and then."""
    monkeypatch.setattr(errors, "WAITS_S", (0.0, 0.0, 0.0))


class Value:
    """A part that is one number."""

    def __init__(self, value: int) -> None:
        self.value = value

    def snapshot(self) -> Callable[[Path], None]:
        value = self.value

        def write(folder: Path) -> None:
            (folder / "value.txt").write_text(str(value))
            (folder / "more.bin").write_bytes(bytes(1000))

        return write

    def load(self, folder: Path) -> None:
        self.value = int((folder / "value.txt").read_text())


def begun(place: str, *, keep: int = 3) -> Checkpoints:
    """An attempt that has loaded what there is."""
    checkpoints = Checkpoints(place, world=ALONE, keep=keep)
    checkpoints.load_newest({"a": Value(-1)})
    return checkpoints


def saved(place: str, steps: list[int], *, keep: int = 3) -> Checkpoints:
    checkpoints = begun(place, keep=keep)
    for step in steps:
        checkpoints.save(step, {"a": Value(step)})
    checkpoints.finish()
    return checkpoints


def loaded(place: str) -> tuple[int, int]:
    """The step and the value that a new attempt loads."""
    value = Value(-1)
    return Checkpoints(place, world=ALONE, keep=3).load_newest({"a": value}), value.value


def steps(place: str) -> list[tuple[int, int]]:
    """(step, attempt) of what counts."""
    return [(mark.step, mark.attempt) for mark in CheckpointStore(place).committed()]


def names(place: str) -> set[str]:
    return {name for name in storage.list_names(place) if not name.startswith("attempt-")}


def test_the_newest_loads_and_nothing_is_step_zero(place: str) -> None:
    assert loaded(storage.join(place, "none")) == (0, -1)
    saved(place, [1, 2, 10])
    assert loaded(place) == (10, 10)


REASONS = {
    ("a/value.txt", "delete"): "value.txt is missing",
    ("a/value.txt", "truncate"): "value.txt has 0 bytes, expected 1",
    ("a/value.txt", "flip"): "value.txt has another sha256 than its manifest.json says",
    ("a/value.txt", "empty"): "value.txt has 0 bytes, expected 1",
    ("a/more.bin", "delete"): "more.bin is missing",
    ("a/more.bin", "truncate"): "more.bin has 500 bytes, expected 1000",
    ("a/more.bin", "flip"): "more.bin has another sha256 than its manifest.json says",
    ("a/more.bin", "empty"): "more.bin has 0 bytes, expected 1000",
    ("manifest.json", "delete"): None,  # without it, it does not count at all
    ("manifest.json", "truncate"): "manifest.json cannot be read (",
    ("manifest.json", "flip"): "manifest.json cannot be read (",
    ("manifest.json", "empty"): "manifest.json cannot be read (",
}
"""What is told of each damage of a file."""


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was said of step 2, where it was said to be damaged."""
    start = "checkpoint step-00000002-a0001 is damaged and not used: "
    return [line.removeprefix(start) for line in capsys.readouterr().out.splitlines() if line.startswith(start)]


@pytest.mark.parametrize(("path", "damage"), REASONS)
def test_a_damaged_one_is_passed_over_for_the_one_before(
    place: str, path: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(place, [1, 2])
    file = storage.join(place, "step-00000002-a0001", path)
    content = bytearray(storage.read_bytes(file))
    if damage == "delete":
        storage.remove(file)
    elif damage == "flip":
        content[0] ^= 1
        storage.write_bytes_atomic(file, bytes(content))
    else:
        storage.write_bytes_atomic(file, bytes(content[: len(content) // 2]) if damage == "truncate" else b"")
    assert loaded(place) == (1, 1)
    reason, found = REASONS[path, damage], told(capsys)
    assert len(found) == (0 if reason is None else 1)
    assert reason is None or found[0].startswith(reason)


def test_every_damaged_file_is_told(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    saved(place, [1, 2])
    storage.remove(storage.join(place, "step-00000002-a0001", "a/value.txt"))
    storage.write_bytes_atomic(storage.join(place, "step-00000002-a0001", "a/more.bin"), b"short")
    assert loaded(place) == (1, 1)
    assert told(capsys) == ["more.bin has 5 bytes, expected 1000; value.txt is missing"]


def test_a_file_that_no_disk_gives_back_is_told_with_the_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(str(tmp_path), [1, 2])
    file = tmp_path / "step-00000002-a0001" / "a" / "value.txt"
    file.unlink()
    file.symlink_to(file.name)
    assert loaded(str(tmp_path)) == (1, 1)
    (reason,) = told(capsys)
    assert reason.startswith("value.txt cannot be read (")
    assert os.strerror(errno.ELOOP) in reason


def test_swapped_files_are_noticed(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    saved(place, [1, 2])
    for name in ("a/value.txt", "manifest.json"):
        other = storage.read_bytes(storage.join(place, "step-00000001-a0001", name))
        storage.write_bytes_atomic(storage.join(place, "step-00000002-a0001", name), other)
    assert loaded(place) == (1, 1)
    assert told(capsys) == ["manifest.json belongs to step 1, attempt 1"]


def test_a_manifest_of_another_format_is_told_with_the_one_that_is_read(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(place, [1, 2])
    file = storage.join(place, "step-00000002-a0001", "manifest.json")
    storage.write_bytes_atomic(file, checked(parse_checked(storage.read_bytes(file)) | {"format": 99}))
    assert loaded(place) == (1, 1)
    assert told(capsys) == ["manifest.json has format 99, this version reads 3"]


def test_folders_and_links_with_odd_names_are_no_checkpoints(tmp_path: Path) -> None:
    saved(str(tmp_path), [1, 2])
    for name in ("step-abc", "step-", "step--0000003-a0001", "step-" + "\u0663" * 8 + "-a0001", "attempt-\u0663.json"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009-a0001").symlink_to("/proc")
    assert loaded(str(tmp_path)) == (2, 2)


def test_a_file_that_the_manifest_does_not_vouch_for_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(str(tmp_path), [1, 2])
    file = tmp_path / "step-00000002-a0001" / "manifest.json"
    manifest = file.read_bytes()
    file.write_bytes(checked(parse_checked(manifest) | {"files": {}}))
    assert loaded(str(tmp_path)) == (1, 1)
    assert told(capsys) == ["a/more.bin is not in its manifest.json; a/value.txt is not in its manifest.json"]
    file.write_bytes(manifest)
    assert loaded(str(tmp_path)) == (2, 2)
    (file.parent / "a" / "part-00001-of-00002.safetensors").write_bytes(b"foreign")
    assert loaded(str(tmp_path)) == (1, 1)
    assert told(capsys) == ["a/part-00001-of-00002.safetensors is not in its manifest.json"]


def test_all_damaged_is_an_error_that_names_the_folder(place: str) -> None:
    saved(place, [1])
    storage.write_bytes_atomic(storage.join(place, "step-00000001-a0001", "manifest.json"), b'{"format": 99}')
    with pytest.raises(UserError, match="all 1 checkpoints are damaged") as caught:
        loaded(place)
    assert place in str(caught.value)


def test_what_was_left_of_a_broken_save_neither_loads_nor_stays(place: str) -> None:
    saved(place, [1])
    storage.write_bytes_atomic(storage.join(place, "step-00000002-a0001", "a/value.txt"), b"2")
    assert loaded(place) == (1, 1)
    assert names(place) == {"step-00000001-a0001"}


def test_what_was_left_of_a_first_save_does_not_stay(place: str) -> None:
    begun(place)
    storage.write_bytes_atomic(storage.join(place, "step-00000002-a0001", "a/value.txt"), b"2")
    assert loaded(place) == (0, -1)
    assert names(place) == set()


def test_half_written_files_do_not_stay_but_for_the_claim_of_a_newer_attempt(tmp_path: Path) -> None:
    saved(str(tmp_path), [1, 2])
    (tmp_path / "step-00000002-a0001/.rank-abc").mkdir()
    (tmp_path / "step-00000002-a0001/.rank-abc/value.txt").write_text("2")
    (tmp_path / "step-00000001-a0001/.tmp-abc-manifest.json").write_text("{")
    for attempt in (1, 2, 3):
        (tmp_path / f".tmp-abc-attempt-000{attempt}.json").write_text("{")
    assert loaded(str(tmp_path)) == (2, 2)
    hidden = {path.name for path in tmp_path.rglob(".*")}
    assert hidden == {".tmp-abc-attempt-0003.json"}


@pytest.mark.parametrize("before", [[], [1, 2]])
def test_what_other_ranks_have_begun_to_save_is_not_swept_away(place: str, before: list[int]) -> None:
    saved(place, before)
    store = CheckpointStore(place)
    attempt, standing = store.acquire()
    base = standing[-1] if standing else None
    begun_by_others = CheckpointId(3, attempt)
    storage.write_bytes_atomic(store.place(begun_by_others, "a/value.txt"), b"3")
    kept = {mark.name for mark in standing[-1:]}
    store.sweep(attempt=attempt, base=base, keep=1)
    assert names(place) == kept | {begun_by_others.name}
    newer, _ = store.acquire()
    store.sweep(attempt=newer, base=base, keep=1)
    assert names(place) == kept


def test_a_damaged_one_stays_until_the_next_save(place: str) -> None:
    saved(place, [1, 2])
    value = storage.join(place, "step-00000002-a0001", "a/value.txt")
    storage.write_bytes_atomic(value, b"3")
    assert loaded(place) == (1, 1)
    storage.write_bytes_atomic(value, b"2")  # restored
    assert loaded(place) == (2, 2)


def test_an_old_one_that_cannot_be_removed_takes_no_newer_one_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = saved(str(tmp_path), [1], keep=1)
    manifest = tmp_path / "step-00000001-a0001/manifest.json"
    manifest.unlink()
    manifest.mkdir()
    checkpoints.save(2, {"a": Value(2)})
    checkpoints.finish()
    assert "older checkpoints cannot be removed" in capsys.readouterr().out
    assert loaded(str(tmp_path)) == (2, 2)


def test_an_attempt_that_is_superseded_just_after_it_published_removes_nothing(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = saved(place, [1])
    sweep, newer = CheckpointStore.sweep, Checkpoints(place, world=ALONE, keep=3)

    def sweep_later(self: CheckpointStore, *, attempt: int, base: CheckpointId | None, keep: int) -> None:
        if attempt == 1:
            assert newer.load_newest({"a": Value(-1)}) == 2
        sweep(self, attempt=attempt, base=base, keep=keep)

    monkeypatch.setattr(CheckpointStore, "sweep", sweep_later)
    older.save(2, {"a": Value(2)})
    older.finish()
    older.save(3, {"a": Value(3)})
    with pytest.raises(StaleAttempt):
        older.finish()
    assert loaded(place) == (2, 2)


def test_only_the_newest_are_kept(place: str) -> None:
    saved(place, [1, 2, 3, 4], keep=2)
    assert names(place) == {"step-00000003-a0001", "step-00000004-a0001"}


def test_one_that_was_passed_over_pushes_no_good_one_out(place: str) -> None:
    saved(place, [1, 9], keep=2)
    storage.remove(storage.join(place, "step-00000009-a0001", "a/value.txt"))
    checkpoints = begun(place, keep=1)
    checkpoints.save(2, {"a": Value(2)})
    checkpoints.finish()
    assert names(place) == {"step-00000002-a0002"}
    assert loaded(place) == (2, 2)


def test_a_step_may_be_saved_again_by_a_later_attempt(place: str) -> None:
    saved(place, [1, 2])
    storage.remove(storage.join(place, "step-00000002-a0001", "a/value.txt"))
    checkpoints = begun(place)
    checkpoints.save(2, {"a": Value(22)})
    checkpoints.finish()
    assert loaded(place) == (2, 22)


def test_a_step_that_stands_is_not_written_over(place: str) -> None:
    checkpoints = saved(place, [1, 2])
    checkpoints.save(2, {"a": Value(3)})
    checkpoints.finish()
    assert loaded(place) == (2, 2)


class Gate(Value):
    """A part whose writing waits until it may go on."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.open = threading.Event()

    def snapshot(self) -> Callable[[Path], None]:
        write = super().snapshot()

        def wait_and_write(folder: Path) -> None:
            assert self.open.wait(20)
            write(folder)

        return wait_and_write


def test_a_save_returns_before_it_is_written_and_holds_the_state_of_its_moment(place: str) -> None:
    checkpoints, part = begun(place), Gate(1)
    checkpoints.save(1, {"a": part})
    assert steps(place) == []
    part.value = 2
    part.open.set()
    checkpoints.finish()
    assert loaded(place) == (1, 1)


def test_a_save_waits_for_the_one_before(place: str) -> None:
    checkpoints, part = begun(place), Gate(1)
    checkpoints.save(1, {"a": part})
    threading.Timer(0.2, part.open.set).start()
    checkpoints.save(2, {"a": Value(2)})
    assert steps(place) == [(1, 1)] or steps(place) == [(1, 1), (2, 1)]
    assert part.open.is_set()
    checkpoints.finish()
    assert steps(place) == [(1, 1), (2, 1)]


class Failing(Value):
    """A part whose disk fails some times, and then works."""

    def __init__(self, value: int, number: int, *, times: int) -> None:
        super().__init__(value)
        self.number, self.times = number, times

    def snapshot(self) -> Callable[[Path], None]:
        write = super().snapshot()

        def fail_or_write(folder: Path) -> None:
            self.times -= 1
            if self.times >= 0:
                raise OSError(self.number, "the disk says no")
            write(folder)

        return fail_or_write


def test_a_save_that_fails_stops_with_the_cause_and_leaves_the_earlier_one(place: str) -> None:
    checkpoints = saved(place, [1])
    checkpoints.save(2, {"a": Failing(2, 28, times=1)})
    with pytest.raises(StorageError, match=r"step 2 could not be written to .*the disk says no.*the earlier ones"):
        checkpoints.finish()
    assert steps(place) == [(1, 1)]
    assert loaded(place) == (1, 1)


def test_a_disk_that_fails_now_and_then_is_tried_again(place: str) -> None:
    checkpoints = begun(place)
    checkpoints.save(1, {"a": Failing(1, 5, times=3)})
    checkpoints.finish()
    assert loaded(place) == (1, 1)


def test_a_disk_that_goes_on_failing_stops_the_run(place: str) -> None:
    checkpoints = begun(place)
    checkpoints.save(1, {"a": Failing(1, 5, times=99)})
    with pytest.raises(StorageError, match="the disk says no"):
        checkpoints.finish()
    assert not checkpoints.failed()


def test_a_failure_shows_before_anybody_waits_for_it(place: str) -> None:
    checkpoints = begun(place)
    checkpoints.save(1, {"a": Failing(1, 28, times=1)})
    deadline = threading.Event()
    while not checkpoints.failed():
        assert not deadline.wait(0.01)
    with pytest.raises(StorageError):
        checkpoints.save(2, {"a": Value(2)})


def test_an_older_attempt_publishes_nothing_once_a_newer_one_has_begun(place: str) -> None:
    older = saved(place, [1])
    newer = begun(place)
    older.save(2, {"a": Value(2)})
    with pytest.raises(StaleAttempt, match="attempt 2 at this run has begun"):
        older.finish()
    assert steps(place) == [(1, 1)]
    assert names(place) == {"step-00000001-a0001"}
    newer.save(3, {"a": Value(3)})
    newer.finish()
    assert steps(place) == [(1, 1), (3, 2)]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_an_older_attempt_publishes_while_a_newer_one_claims_counts(
    place: str, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    older = saved(place, [1, 2], keep=keep)
    create = storage.create

    def create_late(url: str) -> bool:
        monkeypatch.undo()
        for step in (3, 4):
            older.save(step, {"a": Value(step)})
        older.finish()
        return create(url)

    monkeypatch.setattr(storage, "create", create_late)
    assert loaded(place) == (4, 4)
    assert loaded(place) == (4, 4)


def test_whole_ones_that_do_not_count_stay_while_none_does(place: str) -> None:
    saved(place, [1])
    storage.write_bytes_atomic(storage.join(place, "attempt-0002.json"), checked({"committed": []}))
    assert loaded(place) == (0, -1)
    assert names(place) == {"step-00000001-a0001"}


def test_storage_that_fails_while_it_is_verified_condemns_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(str(tmp_path), [1, 2])
    read_bytes, failing = storage.read_bytes, iter([True, True])

    def fail_twice(url: str) -> bytes:
        if "step-00000002" in str(url) and next(failing, False):
            raise StorageUnavailable(f"cannot read {url}: Stale file handle")
        return read_bytes(url)

    monkeypatch.setattr(storage, "read_bytes", fail_twice)
    assert loaded(str(tmp_path)) == (2, 2)


def test_a_checkpoint_that_may_not_be_read_is_no_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(str(tmp_path), [1, 2])

    def refuse(path: Path) -> str:
        raise StorageError(f"cannot read {path}: no permission; change its permissions or choose another place")

    monkeypatch.setattr(storage, "sha256", refuse)
    with pytest.raises(StorageError, match="no permission"):
        loaded(str(tmp_path))
    assert steps(str(tmp_path)) == [(1, 1), (2, 1)]


def test_what_an_older_attempt_finished_too_late_does_not_count(place: str) -> None:
    saved(place, [1, 2])
    late = {name: storage.read_bytes(storage.join(place, "step-00000002-a0001", name)) for name in FILES}
    storage.remove_tree(storage.join(place, "step-00000002-a0001"))
    assert loaded(place) == (1, 1)  # attempt 2, which attempt 1 does not know of yet
    for name, data in late.items():
        storage.write_bytes_atomic(storage.join(place, "step-00000002-a0001", name), data)
    assert steps(place) == [(1, 1)]
    assert loaded(place) == (1, 1)


FILES = ("a/value.txt", "a/more.bin", "manifest.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b'{"committed": 7}', b"[]"])
def test_a_damaged_claim_hides_no_checkpoint(place: str, content: bytes) -> None:
    saved(place, [1, 2])
    storage.write_bytes_atomic(storage.join(place, "attempt-0001.json"), content)
    storage.write_bytes_atomic(storage.join(place, "attempt-0002.json"), content)
    assert loaded(place) == (2, 2)
    assert storage.exists(storage.join(place, "attempt-0003.json"))


def test_of_several_that_claim_at_once_each_has_a_number_of_its_own(place: str) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(CheckpointStore(place).acquire()[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 9))


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    saved(place, [1, 2])
    assert loaded(place) == (2, 2)
    assert list(scratch.iterdir()) == []
