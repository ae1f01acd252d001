"""The Ray pool on a cluster that changes under it: nodes lost and added, GPUs on some, drivers killed."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dpkd.backends.ray_cluster import shortage
from dpkd.backends.ray_pool import num_fitting
from dpkd.priors import DEFAULT_PRIORS
from tests.chaos.test_prepare_kills import draw, prior_shards
from tests.prior_cases import pack_folder, prepare_all
from tools.local_ray_cluster import LocalCluster

pytestmark = pytest.mark.serial

ROOT = Path(__file__).resolve().parents[1]
THREADS = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}


def test_a_worker_has_one_cpu_or_one_gpu():
    nodes = [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}, {"GPU": 8.0}]
    assert num_fitting(nodes, "CPU") == 6
    assert num_fitting(nodes, "GPU") == 9
    assert num_fitting([], "CPU") == 0


def test_what_is_missing_is_said_in_numbers():
    nodes = [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}]
    assert shortage({"CPU": 1.0, "GPU": 2.0}, nodes=nodes, free={"CPU": 6.0, "GPU": 1.0}) == (
        "waiting for the Ray cluster: a worker needs 1 CPU and 2 GPU, and its 2 nodes have 6 CPUs (6 free) and 1 GPUs "
        "(1 free)"
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head with a CPU. Tests add the nodes that they need, and take them away."""
    with LocalCluster([1], environment={"PYTHONPATH": str(ROOT), **THREADS}) as cluster:
        yield cluster


class Driver:
    """A driver process and the lines that it prints."""

    def __init__(self, cluster: LocalCluster, *command: str, log: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **cluster.client_variables()}
        self._log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.ray_pool_driver", *command],
                env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def results(self) -> list[dict]:
        return [json.loads(line) for line in self.output.splitlines() if line.startswith("{")]

    def wait_until(self, condition: Callable[[], object], *, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.output[-3000:]
            time.sleep(0.02)

    def end(self) -> int:
        self.wait_until(lambda: self.process.poll() is not None)
        return self.process.returncode


def actors() -> list[psutil.Process]:
    running = psutil.process_iter(["cmdline"])
    return [each for each in running if "ray::_Server" in " ".join(each.info["cmdline"] or [])]


@pytest.mark.chaos
def test_items_of_a_lost_node_are_done_elsewhere_and_a_node_that_joins_is_used(cluster, tmp_path):
    lost, nodes = cluster.add_node(1), tmp_path / "nodes"
    nodes.mkdir()
    driver = Driver(cluster, "gate", "10", str(nodes), log=tmp_path / "log")
    driver.wait_until(lambda: len(list(nodes.iterdir())) == 2)
    cluster.kill_node(lost)
    driver.wait_until(lambda: "lost a worker with its node" in driver.output)
    added = cluster.add_node(1)
    driver.wait_until(lambda: len(list(nodes.iterdir())) == 3)
    (nodes / "open").touch()
    assert driver.end() == 0, driver.output
    cluster.kill_node(added)
    assert sorted(each["result"].split(" on ")[0] for each in driver.results) == [str(number) for number in range(10)]


@pytest.mark.nightly
@pytest.mark.slow
def test_a_worker_s_own_death_counts_against_its_item(cluster, tmp_path):
    driver = Driver(cluster, "death", log=tmp_path / "log")
    assert driver.end() != 0
    assert "1 workers died, one after the other, on item 0: 0 (The actor is dead because its worker" in driver.output


@pytest.mark.chaos
def test_a_gpu_pool_waits_for_a_node_with_a_gpu_and_says_what_is_missing(cluster, tmp_path):
    driver = Driver(cluster, "gpu", log=tmp_path / "waiting")
    driver.wait_until(lambda: "no node has them" in driver.output)
    place = cluster.add_node(1, num_gpus=1)
    assert driver.end() == 0, driver.output
    gpu_node = driver.results[0]["result"]["node"]
    both = Driver(cluster, "gpu_and_cpu", log=tmp_path / "both")
    assert both.end() == 0, both.output
    cluster.kill_node(place)
    on_gpu = [each["result"] for each in both.results if each["pool"] == "gpu"]
    on_cpu = [each["result"] for each in both.results if each["pool"] == "cpu"]
    assert on_gpu == [{"node": gpu_node, "gpu": "0"}] * 4
    assert len(on_cpu) == 4
    assert not any(each["gpu"] for each in on_cpu)


@pytest.mark.nightly
@pytest.mark.slow
def test_workers_compute_with_one_thread_whatever_the_node_says(cluster, tmp_path):
    driver = Driver(cluster, "threads", log=tmp_path / "log")
    assert driver.end() == 0, driver.output
    assert {count for each in driver.results for count in each["result"]} == {1}


@pytest.mark.chaos
def test_prepare_survives_a_lost_node_and_a_killed_driver(cluster, tmp_path):
    images = draw(tmp_path / "images", num_images=400)
    broken, unbroken = (pack_folder(images, tmp_path / name, samples_per_shard=10) for name in ("broken", "unbroken"))
    priors = Path(broken.url) / "priors/default"
    place = cluster.add_node(1)

    first = Driver(cluster, "prepare", broken.url, log=tmp_path / "first")
    first.wait_until(lambda: len(list(priors.glob("*.index.msgpack"))) >= 8)
    cluster.kill_node(place)
    first.wait_until(lambda: len(list(priors.glob("*.index.msgpack"))) >= 16)
    first.process.kill()
    first.process.wait()
    first.wait_until(lambda: not actors())
    standing = {path.name: path.stat().st_mtime_ns for path in priors.glob("*.tar") if _whole(path)}
    assert 16 <= len(standing) < 40

    second = Driver(cluster, "prepare", broken.url, log=tmp_path / "second")
    assert second.end() == 0, second.output
    assert {name: (priors / name).stat().st_mtime_ns for name in standing} == standing
    prepare_all(unbroken, priors=DEFAULT_PRIORS)
    assert prior_shards(broken) == prior_shards(unbroken)


def _whole(path: Path) -> bool:
    """Whether the index beside a shard stands and vouches for it."""
    index = path.with_suffix(".index.msgpack")
    return index.exists() and hashlib.sha256(path.read_bytes()).hexdigest().encode() in index.read_bytes()
