"""A whole run submitted to a Ray cluster of two nodes, beside the same run on this machine alone."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dpkd.io.checkpoint_store import CheckpointStore
from dpkd.log import EventReader
from dpkd.run.folder import RunFolder
from dpkd.verbs.audit import audit
from tests.chaos import report
from tests.chaos.test_run_kills import CALM, differences
from tests.runs import Command, all_weights, tiny
from tools.local_ray_cluster import LocalCluster

pytestmark = [pytest.mark.serial, pytest.mark.slow]


RAY = str(Path(sys.executable).parent / "ray")
ROOT = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
TEACH = ("--stages", "teach")
STEPS, MANY_STEPS = 400, 2000
"""The many take as long as it takes a node to join, and some."""
CHECKPOINT_EVERY = 20
Unbroken = Callable[[int], RunFolder]


def teacher(folder: Path, *, shards: Path, steps: int) -> dict[str, Any]:
    """Settings of a run whose teacher two workers train."""
    tree = tiny(folder, source=None, shards=shards)
    tree["launcher"]["workers"] = 2
    tree["teachers"]["teacher"]["optimizer"] = CALM
    tree["teachers"]["teacher"]["training"] |= {"steps": steps, "checkpoint_every": CHECKPOINT_EVERY}
    tree["teachers"]["teacher"]["training"] |= {"evaluate_every": steps, "panels_every": steps}
    return tree


@pytest.fixture(scope="module")
def shards(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed images with prior maps; read only."""
    tree = tiny(tmp_path_factory.mktemp("packed") / "run", source=sample_folder)
    command = Command(tree, "--stages", "pack,prepare")
    assert command.wait() == 0, command.output
    return command.folder.path / "shards"


@pytest.fixture(scope="module")
def unbroken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Gives the run of so many steps that two workers of this machine made, and nothing interrupted; read only."""
    folder = tmp_path_factory.mktemp("unbroken")

    @cache
    def run(steps: int) -> RunFolder:
        command = Command(teacher(folder / str(steps), shards=shards, steps=steps), *TEACH)
        assert command.wait() == 0, command.output
        return command.folder

    return run


@dataclass(frozen=True)
class Pass:
    """One pass through the training loop: the step after which it began, and the last that it logged."""

    began: int
    ended: int


def passes(folder: RunFolder) -> list[Pass]:
    """All passes of the teacher, in the order in which they began."""
    made: list[Pass] = []
    for event in EventReader(folder.events).new():
        if event["kind"] == "loop_began":
            made.append(Pass(event["step"], event["step"]))
        elif event["kind"] == "train":
            made[-1] = replace(made[-1], ended=event["step"])
    return made


def reached(folder: RunFolder) -> int:
    """The last step that the newest pass logged."""
    return passes(folder)[-1].ended if passes(folder) else 0


def restarts(folder: RunFolder) -> list[str]:
    """The causes of all restarts."""
    return [event["cause"] for event in EventReader(folder.events).new() if event["kind"] == "restart"]


def newest(folder: RunFolder) -> int:
    """The step of the newest published checkpoint, 0 without one."""
    return max((mark.step for mark in CheckpointStore(folder.checkpoints("teach")).committed()), default=0)


def has_saved(folder: RunFolder, number: int) -> bool:
    """Whether the pass of this number is the newest, and has saved something."""
    made = passes(folder)
    return len(made) == number and newest(folder) > made[-1].began


def wait_for(fact: Callable[[], bool], *, driver: "subprocess.Popen[Any]", folder: RunFolder) -> None:
    """Returns once it is so, while the driver of the run must not end."""
    while not fact():
        assert driver.poll() is None, output(folder)
        time.sleep(0.1)


def output(folder: RunFolder) -> str:
    """All that the run has printed."""
    return folder.path.with_suffix(".log").read_text()


def drain(cluster: LocalCluster, *, node: str) -> None:
    """Runs `ray drain-node`, as for a spot machine that will be gone in 10 minutes."""
    command = [RAY, "drain-node", "--address", cluster.address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    environment = os.environ | cluster.client_variables()
    subprocess.run([*command, "--deadline-remaining-seconds", "600"], env=environment, check=True)


def ray_job(cluster: LocalCluster, verb: str, job: str) -> str:
    """What `ray job` with this verb prints."""
    command = [RAY, "job", verb, "--address", cluster.dashboard, job]
    environment = os.environ | cluster.client_variables()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def record(*faults: str, target: str) -> None:
    """Puts faults that were survived into the chaos report."""
    for fault in faults:
        report.record("ray", fault=fault, target=target)


@pytest.mark.timeout(900)
def test_a_job_on_two_nodes_ends_as_the_local_run_does(
    ray_cluster: LocalCluster, sample_folder: Path, tmp_path: Path
) -> None:
    tree = tiny(tmp_path / "local", source=sample_folder)
    tree["launcher"]["workers"] = 2
    local = Command(tree)
    assert local.wait() == 0, local.output

    submitted = tmp_path / "cluster"
    tree["launcher"]["kind"] = "auto"
    config = tmp_path / "cluster.yaml"
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "dpkd.pretrain", "--config", str(config), f"run.dir={submitted}"]
    job = ray_cluster.submit(command)
    assert job.returncode == 0, job.stdout + job.stderr

    for name in ("shards/dataset.json", "shards/priors/default/base-000000.tar"):
        assert (submitted / name).read_bytes() == (local.folder.path / name).read_bytes()
    here, there = all_weights(local.folder), all_weights(type(local.folder)(submitted))
    assert here.keys() == there.keys()
    different = [name for name in here if not torch.allclose(here[name], there[name], atol=1e-5)]
    assert not different, different[:5]
    assert _figures(submitted) == _figures(local.folder.path)
    assert "few-shot" in job.stdout.lower() or "5way" in job.stdout, job.stdout


@pytest.mark.nightly
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_workers_leave_a_node_that_drains_and_go_on_elsewhere(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        "import pathlib, ray\n"
        "from dpkd.backends.ray_workers import RayWorkers\n"
        "from dpkd.launch.settings import LauncherSettings\n"
        "from tests.worker_group_work import save_and_move\n"
        "workers = RayWorkers(2, LauncherSettings(max_restarts=0, threads=1))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'driver').write_text(ray.get_runtime_context().get_node_id())\n"
        f"workers.run(save_and_move, {str(tmp_path)!r})\n"
    )
    with LocalCluster([1, 1, 1], environment=ROOT) as cluster:
        environment = os.environ | ROOT | cluster.client_variables()
        driver = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
        try:
            while len(list(tmp_path.glob("node-0-*"))) < 2:
                assert driver.poll() is None
                time.sleep(0.1)
            before = [(tmp_path / f"node-0-{rank}").read_text() for rank in range(2)]
            leaving = next(node for node in before if node != (tmp_path / "driver").read_text())
            drain(cluster, node=leaving)
            printed, _ = driver.communicate(timeout=400)
        finally:
            driver.kill()
    assert driver.returncode == 0, printed
    assert "a node is about to leave the cluster" in printed
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    after = [(tmp_path / f"node-1-{rank}").read_text() for rank in range(2)]
    assert leaving not in after
    record("a node drains", target="the node of a worker")


@pytest.mark.nightly
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_session_shrinks_with_the_cluster_and_grows_with_it_after_a_save(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        "from dpkd.backends.ray_workers import RayWorkers\n"
        "from dpkd.launch.settings import LauncherSettings\n"
        "from dpkd.launch.world_size import WorldSizeRange\n"
        "from tests.worker_group_work import save_until_the_end\n"
        "workers = RayWorkers(WorldSizeRange((1, 2), grow_after_s=1.0), LauncherSettings(max_restarts=1, threads=1))\n"
        f"workers.run(save_until_the_end, {str(tmp_path)!r})\n"
    )
    generations = tmp_path / "generations"

    def wait_for(number: int) -> list[str]:
        while not (generations.exists() and len(generations.read_text().splitlines()) >= number):
            assert driver.poll() is None
            time.sleep(0.1)
        return generations.read_text().splitlines()

    with LocalCluster([1, 1], environment=ROOT) as cluster:
        environment = os.environ | ROOT | cluster.client_variables()
        driver = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert wait_for(1) == ["2 from 0"]
            cluster.kill_node(1)
            assert wait_for(2)[1] == "1 from 0"  # nothing was saved
            cluster.add_node(1)
            size, _, steps = wait_for(3)[2].split()
            assert size == "2"
            assert int(steps) > 0
            assert steps == (tmp_path / "saved").read_text()
            (tmp_path / "end").touch()
            printed, _ = driver.communicate(timeout=100)
        finally:
            driver.kill()
    assert driver.returncode == 0, printed
    assert "there is room for 2 workers instead of 1; all saved and start again" in printed
    assert "no room came free" not in printed  # the lost node is not counted, though Ray lists it for some time yet
    record("a node is killed", "a node joins", target="a session of 2 workers")


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_that_loses_a_node_and_gains_one_ends_as_unbroken(
    unbroken: Unbroken, shards: Path, tmp_path: Path
) -> None:
    tree = teacher(tmp_path / "run", shards=shards, steps=MANY_STEPS)
    tree["launcher"] |= {"kind": "ray", "min_workers": 1, "grow_after_s": 0.0}
    folder = RunFolder(tmp_path / "run")
    with LocalCluster([1, 1], environment=ROOT) as cluster:
        command = Command(tree, *TEACH, environment=ROOT | cluster.client_variables())
        try:
            wait_for(lambda: reached(folder) > 50, driver=command.process, folder=folder)
            cluster.kill_node(1)
            wait_for(lambda: len(restarts(folder)) == 1, driver=command.process, folder=folder)
            published = newest(folder)
            wait_for(lambda: len(passes(folder)) == 2, driver=command.process, folder=folder)  # on one node
            cluster.add_node(1)
            wait_for(lambda: len(restarts(folder)) == 2, driver=command.process, folder=folder)
            assert command.process.wait(timeout=400) == 0, command.output
        finally:
            command.process.kill()
    assert restarts(folder)[1] == "there is room for 2 workers instead of 1"
    starts = re.findall(r"^starts (\d) workers", command.output, re.MULTILINE)
    assert starts == ["2", "1", "2"]  # the lost node is not counted, though Ray lists it for some time yet
    with_two, with_one, with_two_again = passes(folder)
    assert 0 < published <= with_one.began
    assert with_two.ended - with_one.began <= 2 * CHECKPOINT_EVERY  # a save may still be under way when it is lost
    assert with_one.ended > with_one.began
    assert (with_two_again.began, with_two_again.ended) == (with_one.ended, MANY_STEPS)
    audit(str(folder.path))
    # one worker or two: a step adds up two micro-batches, whose sum has no order
    assert not differences(unbroken(MANY_STEPS), folder)
    record("a node is killed", "a node joins", target="a run of 2 workers")


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_that_leaves_a_draining_node_loses_no_step(unbroken: Unbroken, shards: Path, tmp_path: Path) -> None:
    """Both nodes have a worker, and a third one joins before the one that has no driver drains."""
    tree = teacher(tmp_path / "run", shards=shards, steps=MANY_STEPS)
    tree["launcher"]["kind"] = "ray"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    folder, script = RunFolder(tmp_path / "run"), tmp_path / "driver.py"
    script.write_text(
        "import pathlib, sys, ray\n"
        "from dpkd import cli, pretrain\n"
        "from dpkd.backends.ray_cluster import connect\n"
        "connect()\n"
        "nodes = {node['NodeID'] for node in ray.nodes()} - {ray.get_runtime_context().get_node_id()}\n"
        f"pathlib.Path({str(tmp_path)!r}, 'other').write_text(*nodes)\n"
        "cli.whole_process(pretrain.main)\n"
    )
    command = [sys.executable, script, "--config", tmp_path / "run.yaml", *TEACH]
    with LocalCluster([1, 1], environment=ROOT) as cluster, (tmp_path / "run.log").open("w") as log:
        environment = os.environ | ROOT | cluster.client_variables()
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: reached(folder) > 50, driver=driver, folder=folder)
            cluster.add_node(1)
            drain(cluster, node=(tmp_path / "other").read_text())
            assert driver.wait(timeout=400) == 0, output(folder)
        finally:
            driver.kill()
    assert restarts(folder) == ["a node is about to leave the cluster"]
    before, after = passes(folder)
    assert (after.began, after.ended) == (before.ended, MANY_STEPS)
    audit(str(folder.path))
    assert not differences(unbroken(MANY_STEPS), folder)
    record("a node drains", target="a run of 2 workers")


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_killed_driver_leaves_nothing_that_blocks_the_next_attempt(
    unbroken: Unbroken, shards: Path, tmp_path: Path
) -> None:
    """The cluster has room for the two workers of one attempt alone."""
    tree = teacher(tmp_path / "run", shards=shards, steps=STEPS)
    tree["launcher"]["kind"] = "ray"
    folder = RunFolder(tmp_path / "run")
    stood = [0]
    with LocalCluster([1, 1], environment=ROOT) as cluster:
        environment = ROOT | cluster.client_variables()
        for attempt in range(1, 4):
            command = Command(tree, *TEACH, environment=environment)
            wait_for(partial(has_saved, folder, attempt), driver=command.process, folder=folder)
            stood.append(newest(folder))
            command.kill_all()
        last = Command(tree, *TEACH, environment=environment)
        assert last.wait() == 0, last.output
    made = passes(folder)
    assert len(made) == 4
    assert all(each.began >= step for each, step in zip(made, stood, strict=True))
    assert made[-1].ended == STEPS
    audit(str(folder.path))
    assert not differences(unbroken(STEPS), folder)
    record(*["SIGKILL"] * 3, target="a driver")


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_job_that_is_stopped_saves_and_goes_on_when_submitted_again(
    unbroken: Unbroken, shards: Path, tmp_path: Path
) -> None:
    tree = teacher(tmp_path / "run", shards=shards, steps=STEPS)
    tree["launcher"]["kind"] = "auto"
    tree["teachers"]["teacher"]["training"]["checkpoint_every"] = STEPS
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    folder = RunFolder(tmp_path / "run")
    # Ray keeps no exit code of a job that it has stopped
    command = shlex.join([sys.executable, "-m", "dpkd.pretrain", "--config", str(config), *TEACH])
    script = tmp_path / "job.sh"
    script.write_text(f'trap : TERM\n{command}\ncode=$?\necho "left with code $code"\nexit $code\n')
    with LocalCluster([1, 1], environment=ROOT | {"RAY_JOB_STOP_WAIT_TIME_S": "100"}) as cluster:
        submitted = cluster.submit(["sh", str(script)], wait=False)
        job = re.search(r"raysubmit_\w+", submitted.stdout)
        assert job is not None, submitted.stdout + submitted.stderr
        while reached(folder) < 20:
            time.sleep(0.1)
        assert "was stopped" in ray_job(cluster, "stop", job[0])
        assert "left with code 75" in ray_job(cluster, "logs", job[0])
        (saved,) = CheckpointStore(folder.checkpoints("teach")).committed()
        again = cluster.submit(["sh", str(script)])
        assert again.returncode == 0, again.stdout + again.stderr
        assert f"continues after step {saved.step} of {STEPS}" in again.stdout
    first, second = passes(folder)
    assert first.ended == saved.step == second.began < second.ended == STEPS
    audit(str(folder.path))
    assert not differences(unbroken(STEPS), folder)
    record("ray job stop", target="a job")


def test_a_cluster_refuses_who_has_no_token(ray_cluster: LocalCluster) -> None:
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    job = subprocess.run(
        [RAY, "job", "submit", "--address", ray_cluster.dashboard, "--", "true"],
        env=without | {"HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode != 0
    assert "token" in (job.stdout + job.stderr).lower()


def _figures(folder: Path) -> dict[str, object]:
    """What the summary says of each network, but for its speed; and which stages are done."""
    summary = json.loads((folder / "summary.json").read_text())
    networks = summary["teachers"] | summary["students"] | summary["baselines"]
    figures = {name: (network["parameters"], network["scores"]) for name, network in networks.items()}
    return figures | {stage: record["status"] for stage, record in summary["stages"].items()}
