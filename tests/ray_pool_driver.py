"""A driver of a Ray pool in a process of its own: `python -m tests.ray_pool_driver WHAT [ARGUMENT ...]`.

It prints one line of JSON a result, so that a test can watch it and break things meanwhile.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import ray

from dpkd.backends.ray_pool import RayPool
from dpkd.data.shards import Dataset
from dpkd.launch import pool
from dpkd.priors import DEFAULT_PRIORS
from tests.pool_work import num_threads
from tests.prior_cases import prepare_all


def rest(seconds: float) -> dict[str, object]:
    """Where the worker runs, after a while."""
    time.sleep(seconds)
    return {"node": ray.get_runtime_context().get_node_id(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}


def die(_number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def show(ray_pool: RayPool, function: object, items: list, *, name: str = "") -> None:
    """Maps, and prints the results as they come."""
    for index, result in ray_pool.map(function, items):
        sys.stdout.write(json.dumps({"index": index, "result": result, "pool": name}) + "\n")
        sys.stdout.flush()


def forgive_nothing() -> None:
    """Lets a single death that is counted against its item end the work."""
    pool.NUM_RETRIES = 0


def behind_gate(item: tuple[int, str]) -> str:
    """Where the worker runs, once the folder holds a file `open`; leaves a file named after the node meanwhile."""
    number, folder = item
    node = ray.get_runtime_context().get_node_id()
    (Path(folder) / node).touch()
    while not (Path(folder) / "open").exists():
        time.sleep(0.05)
    return f"{number} on {node}"


def gate(count: str, folder: str) -> None:
    forgive_nothing()
    show(RayPool(), behind_gate, [(number, folder) for number in range(int(count))])


def death() -> None:
    forgive_nothing()
    show(RayPool(), die, [0])


def gpu_and_cpu() -> None:
    """A GPU pool and a CPU pool side by side."""
    pools = {"gpu": RayPool(resource="GPU"), "cpu": RayPool(1)}
    threads = [
        threading.Thread(target=show, args=(each, rest, [0.3] * 4), kwargs={"name": name})
        for name, each in pools.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def gpu() -> None:
    show(RayPool(resource="GPU"), rest, [0.0])


def threads() -> None:
    show(RayPool(1), num_threads, [0])


def prepare(url: str) -> None:
    prepare_all(Dataset.open(url), priors=DEFAULT_PRIORS, pool=RayPool(), report=Path(url).parent / "bad.jsonl")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
