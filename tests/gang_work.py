"""What workers do in the tests of gangs; apart from the tests, so that a worker imports little."""

import os
import signal
import time
from pathlib import Path

from dpkd import world
from dpkd.errors import StopRequested, UserError


def meet_once_one_was_killed(folder):
    peers = world.join()
    mark = Path(folder) / "killed"
    if peers.rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    assert all(name in os.environ for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    (Path(folder) / os.environ["RANK"]).write_text(f"{peers.rank} of {peers.size}, {peers.gather(peers.rank)}")
    print(f"this is worker {peers.rank}")  # noqa: T201
    peers.leave()


def fail_in_second_worker(folder):
    peers = world.join()
    if peers.rank == 1:
        (Path(folder) / f"start-{time.time_ns()}").touch()
        raise ZeroDivisionError("the second worker divided by zero")
    peers.barrier()


def refuse_in_second_worker(folder):
    peers = world.join()
    if peers.rank == 1:
        (Path(folder) / f"start-{time.time_ns()}").touch()
        raise UserError("teach.model: no such model")
    peers.barrier()


def save_when_asked_to_stop(folder):
    peers = world.join()
    (Path(folder) / f"up-{peers.rank}").touch()
    while not peers.any_of(world.stop_requested())[0]:
        time.sleep(0.05)
    (Path(folder) / f"saved-{peers.rank}").touch()
    raise StopRequested("saved at step 7")


def heed_nothing(folder):
    (Path(folder) / f"up-{os.environ['RANK']}").touch()
    time.sleep(600)


def wait_alone(folder):
    (Path(folder) / "up-0").write_text(str(os.getpid()))
    time.sleep(600)
