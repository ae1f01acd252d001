"""Prepare under kill -9, again and again: of random pool workers and of the driver; the end is that of an unbroken run.

Kills are spread evenly over the work: one whenever another share of the shards stands. `make chaos` runs it all.
"""

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from dpkd.data.shards import Dataset
from tests.chaos import report
from tests.prior_cases import pack_folder

ROOT = Path(__file__).resolve().parents[2]
PREPARE = """
import sys
from dpkd.data.shards import Dataset
from dpkd.priors import DEFAULT_PRIORS
from tests.prior_cases import prepare_all
url, kind = sys.argv[1:]
if __name__ == "__main__":
    if kind == "ray":
        from dpkd.backends.ray_pool import RayPool as Pool
    else:
        from dpkd.backends.local_pool import LocalPool as Pool
    prepare_all(Dataset.open(url), priors=DEFAULT_PRIORS, pool=Pool(2))
"""


def draw(folder: Path, *, num_images: int) -> Path:
    """Drawn images of 224 px, each with its own object."""
    for i in range(num_images):
        draws = np.random.default_rng(i)
        image_HWC = cv2.resize(draws.uniform(0, 255, (9, 9, 3)).astype(np.float32), (224, 224))
        centre = tuple(int(each) for each in draws.integers(56, 168, 2))
        cv2.circle(image_HWC, centre, int(draws.integers(20, 56)), tuple(draws.uniform(0, 255, 3)), -1)
        path = folder / "train" / f"class{i % 3}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image_HWC)
    return folder


class Driver:
    """The process that prepares, started anew whenever it is gone."""

    def __init__(self, dataset: Dataset, kind: str, folder: Path) -> None:
        self._script = folder / "prepare.py"
        self._script.write_text(PREPARE)
        self._command = [sys.executable, str(self._script), dataset.url, kind]
        self._folder = folder
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        log = (self._folder / "driver.log").open("a")
        return subprocess.Popen(self._command, env=environment, cwd=ROOT, stdout=log, stderr=log)

    def again(self) -> None:
        """Starts it once more if it is gone."""
        if self.process.poll() is not None:
            self.process = self._start()

    def workers(self, kind: str) -> list[psutil.Process]:
        """The pool workers that run now."""
        if kind == "ray":
            running = psutil.process_iter(["cmdline"])
            return [each for each in running if "ray::_Server" in " ".join(each.info["cmdline"] or [])]
        children = psutil.Process(self.process.pid).children() if self.process.poll() is None else []
        return [child for child in children if "spawn_main" in _command(child)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # gone by now
        return ""


def prior_shards(dataset: Dataset) -> dict[str, str]:
    """Name -> sha256 of every file of the prior set."""
    folder = Path(dataset.url) / "priors/default"
    paths = [path for path in sorted(folder.glob("*")) if not path.name.startswith(".")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def prepare_under_fire(
    dataset: Dataset, folder: Path, *, kind: str, num_kills: int, seed: int
) -> list[tuple[str, float]]:
    """Prepares with `num_kills` kills; returns who was hit, and the seconds until another shard stood."""
    draws = random.Random(seed)
    kills: list[tuple[str, float]] = []
    waiting: list[tuple[str, float, int]] = []
    victims = draws.sample(["driver", "worker", "worker"] * num_kills, num_kills)
    num_shards = sum(len(split.shards) for split in dataset.manifest.splits.values())
    prior_folder = Path(dataset.url) / "priors/default"
    driver = Driver(dataset, kind, folder)
    deadline_s = time.monotonic() + 500
    while True:
        assert time.monotonic() < deadline_s, (folder / "driver.log").read_text()[-2000:]
        num_done = len(list(prior_folder.glob("*.tar")))
        if waiting and num_done > waiting[0][2]:
            victim, killed_s, _ = waiting.pop()
            kills.append((victim, time.monotonic() - killed_s))
        if not waiting and len(kills) < num_kills and num_done >= len(kills) * num_shards // (num_kills + 1):
            victim = victims[len(kills)]
            workers = driver.workers(kind)
            if victim == "worker" and workers:
                draws.choice(workers).kill()
                waiting.append((victim, time.monotonic(), num_done))
            elif victim == "driver" and driver.process.poll() is None and workers:
                driver.process.kill()
                driver.process.wait()
                waiting.append((victim, time.monotonic(), num_done))
        if driver.process.poll() == 0 and (len(kills) == num_kills or num_done == num_shards):
            return kills
        driver.again()
        time.sleep(draws.uniform(0, 0.01))


def assert_ends_as_unbroken(folder: Path, *, kind: str, num_images: int, num_kills: int) -> None:
    """Prepares under fire and unbroken, in 40 shards each, and compares every file."""
    images = draw(folder / "images", num_images=num_images)
    broken = pack_folder(images, folder / "broken", samples_per_shard=num_images // 40)
    kills = prepare_under_fire(broken, folder, kind=kind, num_kills=num_kills, seed=num_images)
    assert len(kills) == num_kills, kills
    assert {victim for victim, _ in kills} == {"worker", "driver"}, kills
    unbroken = pack_folder(images, folder / "unbroken", samples_per_shard=num_images // 40)
    prepare_under_fire(unbroken, folder, kind="local", num_kills=0, seed=0)
    assert len(prior_shards(unbroken)) == 81  # a shard, its index, and the manifest
    same = prior_shards(broken) == prior_shards(unbroken)
    for victim, recovery_s in kills:
        outcome = report.SURVIVED if same else "the maps are others"
        report.record(f"prepare, {kind} pool", fault="SIGKILL", target=victim, outcome=outcome, recovery_s=recovery_s)
    assert same


@pytest.mark.nightly
def test_after_a_few_kills_every_shard_is_that_of_an_unbroken_run(tmp_path):
    assert_ends_as_unbroken(tmp_path, kind="local", num_images=240, num_kills=4)


@pytest.mark.chaos
def test_after_20_kills_over_2000_images_every_shard_is_that_of_an_unbroken_run(tmp_path):
    assert_ends_as_unbroken(tmp_path, kind="local", num_images=2000, num_kills=20)


@pytest.mark.chaos
@pytest.mark.usefixtures("ray_connection")
def test_after_20_kills_on_ray_every_shard_is_that_of_an_unbroken_run(tmp_path):
    assert_ends_as_unbroken(tmp_path, kind="ray", num_images=2000, num_kills=20)
