"""What every worker group keeps: one set of tests over local and Ray workers; and the decision both share."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

from dpkd.backends.local_workers import LocalWorkers
from dpkd.backends.ray_workers import RayWorkers
from dpkd.errors import StopRequested, StorageUnavailable, UserError, WorkerFailed
from dpkd.launch.settings import LauncherSettings
from dpkd.launch.watchdog import Hang
from dpkd.launch.worker_group import (
    UNSUPERVISED,
    Failure,
    Restart,
    Supervision,
    WorkerGroup,
    by_cause,
    late_start,
    run_with_restarts,
    wait_before_restart,
    with_hangs,
)
from tests.chaos import report
from tests.worker_group_work import (
    ONE_WAY_TO_HANG,
    WAYS_TO_HANG,
    HangsOnceOnItsWay,
    TakesItsTime,
    abort_after_another_failed,
    die_before_joining_once,
    die_with_one_that_is_done_once,
    fail_in_second_worker,
    fail_late_in_second_worker,
    hang_in_every_way,
    hang_in_one_way,
    heed_nothing,
    meet_once_one_was_killed,
    refuse_in_second_worker,
    save_when_asked_to_stop,
    stop_after_the_work,
    stop_while_failing_once,
    touch,
    touch_for_rank,
)

pytestmark = pytest.mark.serial

MakeWorkerGroup = Callable[..., WorkerGroup]


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def make_worker_group(request: pytest.FixtureRequest) -> MakeWorkerGroup:
    if request.param == "local":
        return local_workers
    request.getfixturevalue("ray_connection")
    return lambda number, **settings: RayWorkers(number, LauncherSettings(**settings))


def local_workers(number: int, **settings: object) -> LocalWorkers:
    return LocalWorkers(number, LauncherSettings(**settings))


ON_RAY_IN_CHAOS = pytest.mark.parametrize(
    "make_worker_group", ["local", pytest.param("ray", marks=pytest.mark.chaos)], indirect=True
)
"""A generation takes some 15 s there, so that CI does without those that differ little from others."""


def test_all_start_again_when_one_is_killed_and_the_first_ones_output_is_shown(make_worker_group, tmp_path, capfd):
    make_worker_group(2, max_restarts=1).run(meet_once_one_was_killed, str(tmp_path))
    told = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert told == {"killed": "", "0": "0 of 2, [0, 1]", "1": "1 of 2, [0, 1]"}
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "raylet" not in line] == ["worker 1 failed", "this is worker 0"]


@ON_RAY_IN_CHAOS
def test_the_first_traceback_comes_out_when_no_restart_is_left(make_worker_group, tmp_path):
    with pytest.raises(WorkerFailed, match="divided by zero") as caught:
        make_worker_group(2, max_restarts=0).run(fail_in_second_worker, str(tmp_path))
    assert str(caught.value).startswith("worker 1: Traceback")
    assert "in fail_in_second_worker" in str(caught.value)


@pytest.mark.parametrize(
    ("make_worker_group", "work", "ways"),
    [
        ("local", hang_in_one_way, ONE_WAY_TO_HANG),
        pytest.param("local", hang_in_every_way, WAYS_TO_HANG, marks=pytest.mark.chaos),
        pytest.param("ray", hang_in_every_way, WAYS_TO_HANG, marks=pytest.mark.chaos),
    ],
    ids=["local, one way", "local, every way", "ray, every way"],
    indirect=["make_worker_group"],
)
def test_a_hanging_worker_is_ended_its_stacks_are_saved_and_all_start_again(make_worker_group, tmp_path, work, ways):
    restarts: list[Restart] = []
    supervision = Supervision(
        hangs=tmp_path / "hangs", progress=lambda: (len(list(tmp_path.glob("hung-*"))),), on_restart=restarts.append
    )
    timeout_s = (
        3 if make_worker_group is local_workers else 8
    )  # six times as long to be at work, which takes Ray some 15 s
    make_worker_group(2, max_restarts=1, hang_timeout_s=timeout_s).run(work, str(tmp_path), supervision=supervision)
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
    assert [restart.rank for restart in restarts] == [1] * len(ways)
    for way, restart in zip(ways, restarts, strict=True):
        assert restart.cause.startswith("hung: no sign of life for")
        told = Path(restart.cause.partition("its stacks are in ")[2]).read_text()
        if way == "is_stopped":
            assert json.loads(told.partition("\n\n")[0])["state"] == "T"
        else:
            assert f"in {way}\n" in told
    assert "waiting for its peers" in restarts[-1].cause
    for way in ways:
        report.record("hanging workers", fault=way.replace("_", " "), target="worker 1 of 2")


@ON_RAY_IN_CHAOS
def test_a_worker_that_hangs_before_it_is_at_work_is_ended_too(make_worker_group, tmp_path):
    restarts: list[Restart] = []
    timeout_s = 8 if make_worker_group is local_workers else 40  # it takes Ray some 15 s
    make_worker_group(1, max_restarts=1, start_timeout_s=timeout_s).run(
        touch, HangsOnceOnItsWay(str(tmp_path)), supervision=Supervision(on_restart=restarts.append)
    )
    assert (tmp_path / "done").exists()
    assert [restart.cause for restart in restarts] == [late_start(timeout_s)]


def test_a_worker_that_starts_slowly_has_the_time_that_the_settings_give_it(tmp_path):
    argument = TakesItsTime(str(tmp_path), seconds=3.0)
    with pytest.raises(WorkerFailed, match=r"worker 0: not at work 1 s .* machine busy\? launcher.start_timeout_s"):
        LocalWorkers(1, LauncherSettings(max_restarts=0, start_timeout_s=1)).run(touch, argument)
    assert not (tmp_path / "done").exists()
    LocalWorkers(1, LauncherSettings(max_restarts=0)).run(touch, argument)
    assert (tmp_path / "done").exists()


def test_a_worker_that_waits_in_vain_for_a_dead_one_to_join_is_ended(tmp_path):
    LocalWorkers(2, LauncherSettings(max_restarts=1)).run(die_before_joining_once, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"died", "done-0", "done-1"}


def test_a_worker_killed_beside_one_that_is_done_is_no_success(tmp_path):
    LocalWorkers(2, LauncherSettings(max_restarts=1)).run(die_with_one_that_is_done_once, str(tmp_path))
    assert (tmp_path / "done").exists()


def test_a_worker_stopped_after_its_work_does_not_hold_up_the_end(tmp_path):
    LocalWorkers(2, LauncherSettings(max_restarts=0)).run(stop_after_the_work, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"done-0", "done-1", "stopped"}


@pytest.mark.chaos
def test_a_worker_stopped_while_it_fails_is_ended(make_worker_group, tmp_path):
    supervision = Supervision(hangs=tmp_path / "hangs")
    timeout_s = (
        1 if make_worker_group is local_workers else 8
    )  # six times as long to be at work, which takes Ray some 15 s
    workers = make_worker_group(1, max_restarts=1, hang_timeout_s=timeout_s)
    workers.run(stop_while_failing_once, str(tmp_path), supervision=supervision)
    assert (tmp_path / "done").exists()


def test_what_another_suffered_later_comes_after_the_cause(tmp_path):
    with pytest.raises(WorkerFailed, match="worker 1: Traceback") as caught:
        LocalWorkers(2, LauncherSettings(max_restarts=0)).run(abort_after_another_failed, str(tmp_path))
    assert "after it worker 0: killed by SIGABRT" in str(caught.value)


def test_output_that_nobody_reads_any_more_costs_nothing(tmp_path):
    script = (
        "import sys\n"
        "from dpkd.backends.local_workers import LocalWorkers\n"
        "from dpkd.launch.settings import LauncherSettings\n"
        "from dpkd.cli import exit_code, whole_process\n"
        "from tests.worker_group_work import die_once\n"
        "def run(): LocalWorkers(1, LauncherSettings(max_restarts=1)).run(die_once, sys.argv[1])\n"
        "if __name__ == '__main__': whole_process(lambda: exit_code(run))\n"
    )
    (tmp_path / "driver.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, tmp_path / "driver.py", tmp_path]
    driver = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, check=False, timeout=120)
    os.close(write)
    assert (tmp_path / "done").exists()
    assert (driver.returncode, driver.stderr) == (0, b"")


def test_the_process_that_workers_are_forked_from_may_be_killed_while_they_start(tmp_path):
    server = forkserver._forkserver
    if server._forkserver_pid is not None:  # other tests', which loads other modules
        os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()

    def strike() -> None:
        _wait_until(lambda: server._forkserver_pid is not None)
        time.sleep(0.5)  # it loads torch
        os.kill(server._forkserver_pid, signal.SIGKILL)

    threading.Thread(target=strike, daemon=True).start()
    restarts: list[Restart] = []
    supervision = Supervision(hangs=tmp_path / "hangs", on_restart=restarts.append)
    LocalWorkers(2, LauncherSettings(max_restarts=1, hang_timeout_s=1)).run(
        touch_for_rank, str(tmp_path), supervision=supervision
    )
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
    assert [restart.cause for restart in restarts] == ["not started: the process to fork it from was ended"]
    report.record("the process that workers are forked from", fault="SIGKILL", target="while they start")


def test_the_process_that_workers_are_forked_from_may_be_killed_while_they_work(tmp_path):
    """The next ones are started as the first were: a signal to the whole group lets them save."""
    script = (
        "from dpkd.backends.local_workers import LocalWorkers\n"
        "from dpkd.launch.settings import LauncherSettings\n"
        "from tests.worker_group_work import save_alone_when_asked_to_stop as work\n"
        f"if __name__ == '__main__': LocalWorkers(2, LauncherSettings(max_restarts=1)).run(work, {str(tmp_path)!r})\n"
    )
    (tmp_path / "driver.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    driver = subprocess.Popen(
        [sys.executable, tmp_path / "driver.py"], env=environment, start_new_session=True, stderr=subprocess.PIPE
    )
    _wait_until(lambda: len(list(tmp_path.glob("up-*"))) == 2)
    (server,) = (each for each in psutil.Process(driver.pid).children() if "forkserver" in " ".join(each.cmdline()))
    server.kill()
    _wait_until(lambda: len(list(tmp_path.glob("up-*"))) == 4)
    os.killpg(driver.pid, signal.SIGTERM)
    _, told = driver.communicate(timeout=60)
    assert "StopRequested: saved at step 7" in told.decode()
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    report.record("the process that workers are forked from", fault="SIGKILL", target="while they work")


@ON_RAY_IN_CHAOS
def test_the_cause_comes_out_where_peers_fail_before_it_is_told(make_worker_group, tmp_path):
    with pytest.raises(WorkerFailed, match="worker 1: Traceback") as caught:
        make_worker_group(2, max_restarts=0).run(fail_late_in_second_worker, str(tmp_path))
    assert "the second worker divided by zero" in str(caught.value)
    assert "in fail_late_in_second_worker" in str(caught.value)


@ON_RAY_IN_CHAOS
def test_a_users_error_comes_out_without_a_restart(make_worker_group, tmp_path):
    with pytest.raises(UserError, match=r"^teachers\.teacher\.model: no such model$"):
        make_worker_group(2, max_restarts=3).run(refuse_in_second_worker, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


def test_workers_save_when_the_driver_is_asked_to_stop(make_worker_group, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    _signal_when(tmp_path / "up-0", signal.SIGTERM)
    with pytest.raises(StopRequested, match="saved at step 7"):
        make_worker_group(2, max_restarts=3).run(save_when_asked_to_stop, str(tmp_path))
    assert {"saved-0", "saved-1"} <= {path.name for path in tmp_path.iterdir()}
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_ctrl_c_lets_workers_save_though_it_comes_twice(tmp_path):
    """As where a wrapper passes on what the terminal gave to all."""
    _signal_when(tmp_path / "up-0", signal.SIGINT)
    _signal_when(tmp_path / "up-0", signal.SIGINT, delay_s=0.02)
    with pytest.raises(StopRequested, match="saved at step 7"):
        LocalWorkers(1, LauncherSettings(max_restarts=3)).run(save_when_asked_to_stop, str(tmp_path))


def test_a_second_ctrl_c_ends_workers_at_once(tmp_path):
    _signal_when(tmp_path / "up-0", signal.SIGINT)
    _signal_when(tmp_path / "up-0", signal.SIGINT, delay_s=1.5)
    with pytest.raises(StopRequested, match="last checkpoint is kept"):
        LocalWorkers(1, LauncherSettings(max_restarts=3, stop_grace_s=600)).run(heed_nothing, str(tmp_path))


@ON_RAY_IN_CHAOS
def test_workers_that_do_not_heed_a_stop_are_ended(make_worker_group, tmp_path):
    _signal_when(tmp_path / "up-1", signal.SIGTERM)
    with pytest.raises(StopRequested, match="last checkpoint is kept"):
        make_worker_group(2, max_restarts=3, stop_grace_s=1.0).run(heed_nothing, str(tmp_path))


def test_a_killed_driver_takes_its_workers_along(tmp_path):
    script = (
        "from dpkd.backends.local_workers import LocalWorkers\n"
        "from dpkd.launch.settings import LauncherSettings\n"
        "from tests.worker_group_work import wait_alone\n"
        "workers = LocalWorkers(1, LauncherSettings())\n"
        f"if __name__ == '__main__': workers.run(wait_alone, {str(tmp_path)!r})\n"
    )
    (tmp_path / "driver.py").write_text(script)
    driver = subprocess.Popen(
        [sys.executable, tmp_path / "driver.py"], env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    )
    up = tmp_path / "up-0"
    _wait_until(lambda: up.exists() and up.read_text() != "")
    (server,) = (each for each in psutil.Process(driver.pid).children() if "forkserver" in " ".join(each.cmdline()))
    driver.kill()
    driver.wait()
    worker = int(up.read_text())
    _wait_until(lambda: not _runs(worker), timeout_s=5)
    assert not _runs(worker)
    _wait_until(lambda: not _runs(server.pid))


DIED = Failure(1, "killed by SIGKILL", time_s=1.0)
CAUSED = Failure(0, "connection lost", RuntimeError("connection lost"), time_s=2.0)


def test_a_death_is_answered_by_a_restart_while_one_is_left():
    assert wait_before_restart([[CAUSED, DIED]], max_restarts=1, stop_requested=False) == 0
    with pytest.raises(WorkerFailed, match=r"^worker 1: killed"):
        wait_before_restart([[CAUSED, DIED]], max_restarts=0, stop_requested=False)


def test_waits_between_attempts_grow_to_a_minute():
    waits_s = [
        wait_before_restart([[DIED]] * number, max_restarts=99, stop_requested=False)
        for number in (1, 2, 3, 4, 7, 8, 99)
    ]
    assert waits_s == [0, 1, 2, 4, 32, 60, 60]


def restart(
    run_once: Callable[[], list[Failure]], *, max_restarts: int = 1, supervision: Supervision = UNSUPERVISED
) -> None:
    """Runs generations that need no processes."""
    settings = LauncherSettings(max_restarts=max_restarts)
    run_with_restarts(lambda _task, _stop: run_once(), print, None, settings=settings, supervision=supervision)


def test_a_crash_loop_ends_with_its_first_cause():
    attempts = count()

    def run_once() -> list[Failure]:
        return [Failure(1, "Traceback\nfirst\n" if next(attempts) == 0 else "killed by SIGABRT")]

    with pytest.raises(WorkerFailed) as caught:
        restart(run_once)
    assert str(caught.value) == (
        "worker 1: Traceback\nfirst\n"
        "2 attempts failed without getting further; this was the first, the last: worker 1: killed by SIGABRT"
    )


def test_restarts_are_counted_anew_once_there_is_progress():
    attempts, restarts = count(), []

    def run_once() -> list[Failure]:
        return [Failure(0, f"attempt {next(attempts)}")]

    steps = iter([10, 20, 30, 30])  # at the start, then after each attempt
    supervision = Supervision(progress=lambda: (next(steps),), on_restart=restarts.append)
    with pytest.raises(WorkerFailed, match="worker 0: attempt 1\n2 attempts failed"):
        restart(run_once, supervision=supervision)
    assert [restart.cause for restart in restarts] == ["attempt 0", "attempt 1"]


def test_storage_that_fails_for_a_while_costs_a_restart_and_not_the_session() -> None:
    attempts = count()

    def run_once() -> list[Failure]:
        return [Failure.of_error(0, StorageUnavailable("cannot write: stale"))] if next(attempts) == 0 else []

    asked = count()

    def progress() -> tuple[int, ...]:
        if next(asked) == 1:
            raise StorageUnavailable("cannot read: stale")
        return (0,)

    restart(run_once, supervision=Supervision(progress=progress))
    assert next(attempts) == 2


def test_a_stop_ends_the_wait_between_two_attempts():
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))  # while it waits for the second restart
    timer.start()
    with pytest.raises(StopRequested, match="between two attempts"):
        restart(lambda: [DIED], max_restarts=9)


def test_a_hang_comes_before_what_it_did_to_others_and_after_what_came_before():
    stuck = Hang(1, "train", 5, 7, 60.0, "S", "stream.py:1 in read", waits=False, time_s=100.0, path="one")
    waiting = replace(stuck, rank=0, waits=True, time_s=99.0)
    killed, lost = Failure(1, "killed by SIGKILL"), Failure(0, "", RuntimeError("lost"), time_s=104.0, symptom=True)
    assert [each.rank for each in by_cause(with_hangs([killed, lost], [waiting, stuck]))] == [1, 0]
    assert by_cause(with_hangs([killed, lost], [stuck]))[0].cause == str(stuck)
    earlier = Failure(2, "", ZeroDivisionError("zero"), time_s=90.0)
    assert by_cause(with_hangs([killed, earlier], [stuck]))[0] is earlier


def test_a_users_error_and_a_stop_outweigh_what_they_cause():
    user, stop = UserError("wrong key"), StopRequested("saved")
    with pytest.raises(UserError, match="wrong key"):
        wait_before_restart([[DIED, Failure(0, "", user)]], max_restarts=9, stop_requested=False)
    with pytest.raises(StopRequested, match=r"^saved$"):
        wait_before_restart([[CAUSED, Failure(0, "", stop)]], max_restarts=9, stop_requested=True)
    with pytest.raises(StopRequested, match="before they had saved"):
        wait_before_restart([[DIED]], max_restarts=9, stop_requested=True)


def _signal_when(path: Path, number: int, *, delay_s: float = 0.0) -> None:
    def wait_and_signal() -> None:
        _wait_until(path.exists)
        time.sleep(delay_s)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait_and_signal, daemon=True).start()


def _wait_until(fact: Callable[[], bool], *, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
