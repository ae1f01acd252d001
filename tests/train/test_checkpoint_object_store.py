"""Checkpoints on object storage that fails, and of processes that are killed there at any request of theirs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import count
from pathlib import Path

import pytest

from dpkd.errors import StorageError
from dpkd.io import errors, storage
from dpkd.io.checkpoint_store import CheckpointStore
from tests.object_store import ObjectStore, forget_connections
from tests.processes import ROOT
from tests.train.one_more_step import KEEP, content, load, one_more_step

pytestmark = pytest.mark.nightly

Chosen = Callable[[str, str], bool]
"""(method, path) -> whether it is this request."""
KILLED = -signal.SIGKILL


class Process:
    """A process that saves one more step, again and again; killed at a request where one is chosen."""

    def __init__(self, store: ObjectStore, *, url: str, scratch: Path) -> None:
        command = [sys.executable, "-c", "from tests.train.one_more_step import main; main()"]
        self._store = store
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line = json.dumps({"url": url, "scratch": str(scratch)}) + "\n"

    def run(self, *, kill_at: Chosen | None = None, served: bool = False) -> int:
        """Its exit code; where it is killed, the request at which it was has been served, or never is."""
        pid: Future[int] = Future()

        def kill(method: str, path: str) -> int | None:
            if kill_at is None or not kill_at(method, path):
                return None
            os.kill(pid.result(20), signal.SIGKILL)
            return 503

        if served:
            self._store.served = kill
        else:
            self._store.fault = kill
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(self._line)
            self._process.stdin.flush()
            pid.set_result(int(self._process.stdout.readline()))
            return int(self._process.stdout.readline())
        finally:
            self._store.fault = self._store.served = None

    def end(self) -> None:
        self._process.communicate(timeout=20)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does not wait long for storage that fails now and then."""
    monkeypatch.setattr(errors, "WAITS_S", (0.0, 0.0, 0.0))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # s3fs tries again too, and waits less than botocore


@pytest.fixture
def url(object_store: ObjectStore, impatient: None, tmp_path: Path) -> str:
    """Where steps 1 and 2 stand."""
    url = f"s3://bucket/{tmp_path.name}"
    for _ in range(KEEP):
        one_more_step(url)
    return url


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """The temporary folder of the process."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return scratch


@pytest.fixture
def process(object_store: ObjectStore, url: str, scratch: Path) -> Iterator[Process]:
    process = Process(object_store, url=url, scratch=scratch)
    yield process
    process.end()


def change(number: int) -> Chosen:
    """The request of this number among those that change what is stored."""
    numbers = count()
    return lambda method, _path: method in ("PUT", "POST", "DELETE") and next(numbers) == number


def file(method: str, name: str) -> Chosen:
    """A request for a file of a checkpoint."""
    return lambda each, path: (each, path.rsplit("/", 1)[-1]) == (method, name)


def stands(store: ObjectStore, url: str, step: int) -> bool:
    """Whether a manifest makes the step count."""
    names = store.objects(url.removeprefix("s3://bucket/") + "/")
    return any(name.startswith(f"step-{step:08d}-") and name.endswith("manifest.json") for name in names)


def failure(act: Callable[[str], None], url: str) -> StorageError | None:
    try:
        act(url)
    except StorageError as error:
        return error
    return None


def check_the_next_attempt(url: str, step: int) -> None:
    """It finds the step, whole, and leaves nothing but whole checkpoints."""
    found, what, _ = load(url)
    assert (found, what == content(step)) == (step, True)
    standing = [mark.name for mark in CheckpointStore(url).committed()]
    assert [name for name in storage.list_names(url) if not name.startswith("attempt-")] == standing[-KEEP:]
    assert standing[-1].startswith(f"step-{step:08d}-")


@pytest.mark.chaos
def test_every_fourth_request_may_fail(url: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    forget_connections()
    number, before = count(1), object_store.num_failed
    object_store.fault = lambda *_: 503 if next(number) % 4 == 0 else None
    one_more_step(url)
    step, found, _ = load(url)
    assert (step, found == content(3)) == (3, True)
    assert object_store.num_failed - before == (next(number) - 1) // 4 > 10


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_a_file_that_the_store_refuses_longer_than_its_library_waits_is_tried_again(
    method: str, url: str, object_store: ObjectStore
) -> None:
    refused, left = file(method, "0.bin"), iter(range(7))
    object_store.fault = lambda *request: 503 if refused(*request) and next(left, None) is not None else None
    one_more_step(url)
    object_store.fault = None
    assert next(left, None) is None
    check_the_next_attempt(url, 3)


def check_all_changes_were_tried(outcomes: list[bool], *, num_lost: int) -> None:
    """A claim, what it says, two files, their list and the manifest are written; then the oldest goes."""
    assert len(outcomes) > 7
    assert outcomes == [False] * num_lost + [True] * (len(outcomes) - num_lost)


@pytest.mark.chaos
@pytest.mark.parametrize("served", [True, False])
def test_a_kill_at_any_change_of_a_save_leaves_the_step_before_or_the_new_one(
    served: bool, url: str, process: Process, object_store: ObjectStore
) -> None:
    step, outcomes, code = KEEP, [], KILLED
    while code == KILLED:
        code = process.run(kill_at=change(len(outcomes)), served=served)
        outcomes.append(stands(object_store, url, step + 1))
        step += outcomes[-1]
        check_the_next_attempt(url, step)
    assert code == 0
    check_all_changes_were_tried(outcomes, num_lost=5 if served else 6)


@pytest.mark.chaos
def test_a_store_that_refuses_all_from_any_change_of_a_save_on_leaves_the_step_before_or_the_new_one(
    url: str, object_store: ObjectStore
) -> None:
    step, outcomes, refusing = KEEP, [], True
    while refusing:
        refusing, chosen = False, change(len(outcomes))

        def fault(method: str, path: str, chosen: Chosen = chosen) -> int | None:
            nonlocal refusing
            refusing = refusing or chosen(method, path)
            return 403 if refusing else None

        object_store.fault = fault
        told = failure(one_more_step, url)
        object_store.fault = None
        outcomes.append(stands(object_store, url, step + 1))
        assert (told is None) == outcomes[-1], told
        step += outcomes[-1]
        check_the_next_attempt(url, step)
    check_all_changes_were_tried(outcomes, num_lost=6)


@pytest.mark.parametrize(("method", "kind"), [("GET", "checkpoint"), ("PUT", "saving")])
def test_the_temporary_folder_of_a_killed_process_goes_with_the_next(
    method: str, kind: str, process: Process, scratch: Path
) -> None:
    assert process.run(kill_at=file(method, "1.bin")) == KILLED
    (left,) = scratch.iterdir()
    assert left.name.startswith(f"dpkd-{kind}-")
    assert process.run() == 0
    assert not list(scratch.iterdir())
