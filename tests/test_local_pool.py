"""What only the local pool has: an environment for each worker, and workers that fail on their way."""

import signal
import threading
import time
from collections import Counter

import psutil
import pytest

from dpkd.backends.local_pool import LocalPool
from dpkd.errors import WorkerFailed
from tests.pool_work import answer_at_length, name_device, square

pytestmark = pytest.mark.serial


def test_each_worker_has_an_environment_of_its_own_which_its_replacement_takes_over(tmp_path):
    pool = LocalPool(2, environments=[{"DEVICE": "first"}, {"DEVICE": "second"}])
    devices = dict(pool.map(name_device, [(number, str(tmp_path)) for number in range(8)]))
    assert set(devices.values()) == {"first", "second"}
    assert len(devices) == 8
    workers = Counter(path.name.partition("-")[0] for path in tmp_path.iterdir())
    assert max(workers.values()) == 2  # one died and was replaced; perhaps the other too, if the item found it new


def _strike_new_workers(number: signal.Signals, *, count: int) -> threading.Thread:
    """Sends a signal to the next workers of this process, as soon as they are there."""

    def strike() -> None:
        struck: set[int] = set()
        while len(struck) < count:
            for child in psutil.Process().children():
                if child.pid not in struck and "spawn_main" in " ".join(child.cmdline()):
                    child.send_signal(number)
                    struck.add(child.pid)
                    break

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    return thread


def test_a_worker_that_is_stopped_while_it_starts_is_ended_and_another_started(caplog):
    thread = _strike_new_workers(signal.SIGSTOP, count=1)
    assert list(LocalPool(1, start_timeout_s=6).map(square, [3, 4])) == [(0, 9), (1, 16)]
    thread.join()
    assert "a worker did not come up, another is started: exit code -9, 6 s after its start" in caplog.text


def test_workers_that_never_come_up_end_the_work():
    thread = _strike_new_workers(signal.SIGKILL, count=4)
    with pytest.raises(WorkerFailed, match="4 workers did not come up, one after the other: exit code -9"):
        list(LocalPool(1).map(square, [3]))
    thread.join()


def test_an_item_whose_worker_is_killed_in_the_middle_of_its_answer_is_done_by_another(tmp_path):
    answers = LocalPool(2).map(answer_at_length, [(0, str(tmp_path)), (1, str(tmp_path))])
    assert next(answers) == (0, b"")
    (path,) = tmp_path.iterdir()
    worker, num_quiet = psutil.Process(int(path.name)), 0
    while num_quiet < 10:  # it waits for room in the pipe
        num_quiet = num_quiet + 1 if worker.status() == psutil.STATUS_SLEEPING else 0
        time.sleep(0.05)
    worker.kill()
    assert [(index, len(answer)) for index, answer in answers] == [(1, 50_000_000)]
    assert len(list(tmp_path.iterdir())) == 2
