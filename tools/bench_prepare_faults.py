"""Measures how soon `prepare` goes on after a worker, or a node of a Ray cluster, is killed.

    python -m tools.bench_prepare_faults --repeats 3

Recovery is the time from the kill until the shard that the dead worker had is begun again. A node is a raylet of this
machine that is killed with its workers; the time until Ray notices depends on the network that its death cuts.
"""

import argparse
import json
import os
import signal
import statistics
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from dpkd.backends.local_pool import LocalPool
from dpkd.data.settings import FolderSource
from dpkd.data.shards import Dataset
from dpkd.launch.pool import Pool
from dpkd.priors import DEFAULT_PRIORS
from dpkd.report.quarantine import Quarantine
from dpkd.settings import DataSettings, PrepareSettings
from dpkd.stages.pack import pack
from dpkd.stages.prepare import prepare
from tools.local_ray_cluster import LocalCluster
from tools.make_sample_data import SampleSettings, draw_samples

Item = TypeVar("Item")
Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300.0


def main() -> None:
    """Runs the benchmark and prints one line of JSON a fault."""
    parser = argparse.ArgumentParser(description="Measures how soon prepare goes on after a kill.")
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        dataset = _dataset(Path(name))
        _show("worker killed, local pool", [_recovery_s(dataset, LocalPool(2), _kill_newest) for _ in range(repeats)])
        with LocalCluster([1, 1], environment={"PYTHONPATH": str(ROOT)}) as cluster:
            os.environ.update(cluster.client_variables())
            from dpkd.backends.ray_pool import RayPool  # noqa: PLC0415  reads the variables once, as it is imported

            pool = RayPool(2)
            _show("worker killed, Ray pool", [_recovery_s(dataset, pool, _kill_newest) for _ in range(repeats)])
            times_s = []
            for place in range(1, repeats + 1):
                times_s.append(_recovery_s(dataset, pool, partial(_kill_node, cluster, place)))
                cluster.add_node(1)
            _show("node lost, Ray pool", times_s)


class _MarkingPool:
    """A pool whose workers leave a file `<item>-<pid>-<random>` in a folder whenever they begin an item."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self._pool = pool
        self._folder = folder

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """See `Pool.map`."""
        return self._pool.map(partial(_marked, function, str(self._folder)), list(enumerate(items)))


def _marked(function: Callable[[Item], Result], folder: str, item: tuple[int, Item]) -> Result:
    (Path(folder) / f"{item[0]}-{os.getpid()}-{uuid.uuid4().hex}").touch()
    return function(item[1])


def _recovery_s(dataset: Dataset, pool: Pool, kill: Callable[[Path], None]) -> float:
    """Prepares anew, kills after a quarter of the shards; returns the seconds until the lost shard is begun again."""
    with tempfile.TemporaryDirectory() as name:
        marks, killed_s = Path(name) / "marks", list[float]()
        marks.mkdir()

        def kill_once(done: int, total: int) -> None:
            if done * 4 >= total and not killed_s:
                killed_s.append(time.time())
                threading.Thread(target=kill, args=(marks,)).start()

        settings = PrepareSettings(name=f"faults-{uuid.uuid4().hex}", priors=DEFAULT_PRIORS)
        quarantine = Quarantine(Path(name) / "bad.jsonl", limit=0)
        prepare(dataset, settings, pool=_MarkingPool(pool, marks), quarantine=quarantine, progress=kill_once)
        counts = Counter(path.name.split("-")[0] for path in marks.iterdir())
        (again,) = (number for number, count in counts.items() if count > 1)
        return max(path.stat().st_mtime for path in marks.glob(f"{again}-*")) - killed_s[0]


def _kill_newest(marks: Path) -> None:
    """Kills the worker that began an item last."""
    newest = max(marks.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    os.kill(int(newest.name.split("-")[1]), signal.SIGKILL)


def _kill_node(cluster: LocalCluster, place: int, _marks: Path) -> None:
    cluster.kill_node(place)


def _dataset(folder: Path) -> Dataset:
    settings = SampleSettings(size=224, base_classes=4, largest=100, smallest=100)
    draw_samples(folder / "images", settings=settings, seed=0)
    data = DataSettings(source=FolderSource(path=str(folder / "images")), samples_per_shard=32)
    quarantine = Quarantine(folder / "bad.jsonl", limit=0)
    shards = str(folder / "shards")
    return pack(data, shards, seed=0, pool=LocalPool(2), quarantine=quarantine, progress=lambda *_: None)


def _show(fault: str, times_s: list[float]) -> None:
    times = {"median_s": round(statistics.median(times_s), 2), "all_s": [round(time_s, 2) for time_s in times_s]}
    print(json.dumps({"fault": fault, **times, "load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    main()
