"""What workers do in the tests of worker groups; apart from the tests, so that a worker imports little."""

import io
import os
import re
import signal
import sys
import time
from pathlib import Path

import ray
import torch.distributed as dist

from dpkd.engine import world
from dpkd.errors import StopRequested, UserError
from dpkd.launch.heartbeat import STEADY, heartbeat, pulse
from dpkd.log import logger

WAYS_TO_HANG = ("is_stopped", "holds_the_lock", "loops", "sleeps", "waits_in_vain")
ONE_WAY_TO_HANG = ("waits_in_vain",)


def meet_once_one_was_killed(folder):
    peers = world.join()
    mark = Path(folder) / "killed"
    if peers.rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    assert all(name in os.environ for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    (Path(folder) / os.environ["RANK"]).write_text(f"{peers.rank} of {peers.size}, {peers.gather(peers.rank)}")
    print(f"this is worker {peers.rank}")
    peers.leave()


def die_before_joining_once(folder):
    """The first worker dies before it joins the others, once; the second says so where it is left waiting."""
    rank, mark = int(os.environ["RANK"]), Path(folder) / "died"
    if not mark.exists():
        if rank == 0:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(25)
        (Path(folder) / "waited in vain").touch()
    (Path(folder) / f"done-{rank}").touch()


def die_with_one_that_is_done_once(folder):
    """The second worker is done at once; the first is killed before it is done, once."""
    rank, place = int(os.environ["RANK"]), Path(folder)
    if rank == 1:
        (place / "second").write_text(str(os.getpid()))
        return
    if not (place / "died").exists():
        while not (place / "second").exists():
            time.sleep(0.05)
        time.sleep(1.0)  # until it has said that it is done, and is gone
        (place / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (place / "done").touch()


class _StopsWhenFlushed(io.StringIO):
    def __init__(self, mark):
        super().__init__()
        self._mark = mark

    def flush(self):
        self._mark.touch()
        os.kill(os.getpid(), signal.SIGSTOP)


def stop_after_the_work(folder):
    """The second worker is stopped once its work is done, on its way out; the first is done later."""
    rank = int(os.environ["RANK"])
    (Path(folder) / f"done-{rank}").touch()
    if rank == 1:
        sys.stdout = _StopsWhenFlushed(Path(folder) / "stopped")
    else:
        time.sleep(1.0)


class StopsWhenToldOf(Exception):
    """An error that stops the worker which is about to tell of it, once."""

    def __reduce__(self):
        mark = Path(self.args[0]) / "stopped"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return StopsWhenToldOf, self.args


def stop_while_failing_once(folder):
    """Fails, and is stopped before it has told of it; the next time it is done."""
    place = Path(folder)
    if not (place / "stopped").exists():
        raise StopsWhenToldOf(folder)
    (place / "done").touch()


def abort_after_another_failed(_folder):
    """The second worker fails; the first aborts a second later, as NCCL does when it misses a peer."""
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("the second worker divided by zero")
    time.sleep(1.5)
    os.abort()


def die_once(folder):
    """Is killed, the first time."""
    mark = Path(folder) / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    logger.info("the work is done")
    (Path(folder) / "done").touch()


def save_alone_when_asked_to_stop(folder):
    """The same as `save_when_asked_to_stop`, without a word among the workers."""
    rank = os.environ["RANK"]
    (Path(folder) / f"up-{rank}-{time.time_ns()}").touch()
    while not world.stop_requested():
        time.sleep(0.05)
    (Path(folder) / f"saved-{rank}").touch()
    raise StopRequested("saved at step 7")


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
        raise UserError("teachers.teacher.model: no such model")
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


def write_where_they_listen(folder):
    """Writes the addresses on which this worker and the process that started it listen, all workers being joined."""
    peers = world.join()
    peers.barrier()
    addresses = sorted(listening(os.getpid()) | listening(os.getppid()))
    (Path(folder) / str(peers.rank)).write_text("\n".join(addresses))
    peers.barrier()
    peers.leave()


def listening(process: int) -> set[str]:
    """Local addresses, as the kernel writes them in hexadecimal."""
    address_of = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                address_of[f"socket:[{fields[9]}]"] = fields[1].partition(":")[0]
    links = [str(path.readlink()) for path in Path(f"/proc/{process}/fd").iterdir() if path.is_symlink()]
    return {address_of[link] for link in links if link in address_of}


def hang_in_every_way(folder):
    """The second worker hangs in the next way of `WAYS_TO_HANG` each time, until none is left."""
    _hang(folder, WAYS_TO_HANG)


def hang_in_one_way(folder):
    """The same in `ONE_WAY_TO_HANG`."""
    _hang(folder, ONE_WAY_TO_HANG)


def _hang(folder, ways):
    peers = world.join()
    way = peers.broadcast(len(list(Path(folder).glob("hung-*"))))
    heartbeat(STEADY, step=way)
    heartbeat(STEADY, step=way)  # the first step after another phase may take longer
    if way < len(ways):
        if peers.rank == 1:
            (Path(folder) / f"hung-{way}").touch()
            globals()[ways[way]](peers)
        elif ways[way] == "waits_in_vain":
            while not world.stop_requested():
                pulse()
                time.sleep(0.05)
            os._exit(0)
    peers.barrier()
    (Path(folder) / f"done-{peers.rank}").touch()
    peers.leave()


def is_stopped(_peers):
    os.kill(os.getpid(), signal.SIGSTOP)


def holds_the_lock(_peers):
    re.match(r"(a+)+$", "a" * 60 + "b")


def loops(_peers):
    while True:
        pass


def sleeps(_peers):
    time.sleep(600)


def waits_in_vain(peers):
    peers.barrier()


def fail_late_in_second_worker(_folder):
    """The peers of the worker that fails lose their connection before it has told of its error."""
    peers = world.join()
    if peers.rank == 1:
        try:
            raise ZeroDivisionError("the second worker divided by zero")
        finally:
            dist.destroy_process_group()
            time.sleep(1.0)
    peers.barrier()


def save_and_move(folder):
    """Waits to be asked to stop and saves, the first time; the second time it is done at once."""
    peers = world.join()
    attempt = peers.broadcast(len(list(Path(folder).glob("saved-*"))) // peers.size)
    (Path(folder) / f"node-{attempt}-{peers.rank}").write_text(ray.get_runtime_context().get_node_id())
    if attempt == 0:
        while not peers.any_of(world.stop_requested())[0]:
            time.sleep(0.05)
        (Path(folder) / f"saved-{peers.rank}").touch()
        raise StopRequested("saved")


def save_until_the_end(folder):
    """Counts steps, saved when asked to stop; a file `end` ends it. Each generation writes down what it is."""
    peers = world.join()
    saved = Path(folder) / "saved"
    steps = peers.broadcast(int(saved.read_text()) if saved.exists() else 0)
    if peers.rank == 0:
        with (Path(folder) / "generations").open("a") as file:
            file.write(f"{peers.size} from {steps}\n")
    while True:
        time.sleep(0.05)
        steps += 1
        stop, end = peers.any_of(world.stop_requested(), (Path(folder) / "end").exists())
        if (stop or end) and peers.rank == 0:
            saved.write_text(str(steps))
        if end:
            break
        if stop:
            raise StopRequested("saved")
    peers.leave()


class HangsOnceOnItsWay:
    """An argument that stops the first worker that receives it, before it is at work."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return _hang_once, (self.folder,)


def _hang_once(folder):
    mark = Path(folder) / "hung"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    return HangsOnceOnItsWay(folder)


class TakesItsTime:
    """An argument that a worker takes so many seconds to receive."""

    def __init__(self, folder, *, seconds):
        self.folder, self.seconds = folder, seconds

    def __reduce__(self):
        return _take_time, (self.folder, self.seconds)


def _take_time(folder, seconds):
    time.sleep(seconds)
    return TakesItsTime(folder, seconds=seconds)


def touch(argument):
    """Touches `done` in the folder of the argument."""
    (Path(argument.folder) / "done").touch()


def touch_for_rank(folder):
    """Touches `done-` and the rank in the folder."""
    (Path(folder) / f"done-{os.environ['RANK']}").touch()


def wait_for_go(folder):
    """Says that it is up, and is done once `go` is there."""
    place, rank = Path(folder), os.environ["RANK"]
    (place / f"up-{rank}").touch()
    while not (place / "go").exists():
        time.sleep(0.05)
    time.sleep(2.0)
    (place / f"done-{rank}").touch()


def say_cpus(folder):
    """Writes down how many CPUs it was given."""
    (Path(folder) / "cpus").write_text(str(ray.get_runtime_context().get_assigned_resources()["CPU"]))
