"""A whole run submitted to a Ray cluster of two nodes, beside the same run on this machine alone."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from dpkd.audit import audit
from dpkd.stages.record import RunFolder
from dpkd.train.checkpoint_store import CheckpointStore
from tests.chaos import report
from tests.runs import Command, all_weights, tiny, train_events
from tools.local_ray_cluster import LocalCluster

pytestmark = pytest.mark.slow


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


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_workers_leave_a_node_that_drains_and_go_on_elsewhere(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        "import pathlib, ray\n"
        "from dpkd.backends.ray_gang import RayGang\n"
        "from tests.gang_work import save_and_move\n"
        "gang = RayGang(2, max_restarts=0, threads=1)\n"
        f"pathlib.Path({str(tmp_path)!r}, 'driver').write_text(ray.get_runtime_context().get_node_id())\n"
        f"gang.run(save_and_move, {str(tmp_path)!r})\n"
    )
    root = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with LocalCluster([1, 1, 1], environment=root) as cluster:
        environment = os.environ | root | cluster.client_variables()
        driver = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
        try:
            while len(list(tmp_path.glob("node-0-*"))) < 2:
                assert driver.poll() is None
                time.sleep(0.1)
            before = [(tmp_path / f"node-0-{rank}").read_text() for rank in range(2)]
            leaving = next(node for node in before if node != (tmp_path / "driver").read_text())
            drain = [
                Path(sys.executable).parent / "ray",
                "drain-node",
                "--address",
                cluster.address,
                "--node-id",
                leaving,
            ]
            drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
            subprocess.run([*drain, "--deadline-remaining-seconds", "600"], env=environment, check=True)
            printed, _ = driver.communicate(timeout=400)
        finally:
            driver.kill()
    assert driver.returncode == 0, printed
    assert "a node is about to leave the cluster" in printed
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    after = [(tmp_path / f"node-1-{rank}").read_text() for rank in range(2)]
    assert leaving not in after
    record("a node drains", target="the node of a worker")


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_session_shrinks_with_the_cluster_and_grows_with_it_after_a_save(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        "from dpkd.backends.ray_gang import RayGang\n"
        "from dpkd.placement import Sizes\n"
        "from tests.gang_work import save_until_the_end\n"
        "gang = RayGang(Sizes((1, 2), grow_after_s=1.0), max_restarts=1, threads=1)\n"
        f"gang.run(save_until_the_end, {str(tmp_path)!r})\n"
    )
    generations = tmp_path / "generations"

    def wait_for(number: int) -> list[str]:
        while not (generations.exists() and len(generations.read_text().splitlines()) >= number):
            assert driver.poll() is None
            time.sleep(0.1)
        return generations.read_text().splitlines()

    root = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with LocalCluster([1, 1], environment=root) as cluster:
        environment = os.environ | root | cluster.client_variables()
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
    record("a node is killed", "a node joins", target="a session of 2 workers")


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_that_loses_a_node_and_gains_one_uses_each_sample_once(sample_folder: Path, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "run", source=sample_folder)
    tree["launcher"] |= {"kind": "ray", "workers": 2, "min_workers": 1, "grow_after_s": 0.0}
    tree["teach"]["training"] |= {"steps": 2000, "checkpoint_every": 20, "evaluate_every": 2000, "panels_every": 2000}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    folder = RunFolder(tmp_path / "run")

    def wait_for(fact: Callable[[], bool]) -> None:
        while not fact():
            assert driver.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)

    def restarts() -> list[str]:
        lines = folder.events.read_text().splitlines() if folder.events.exists() else []
        return [event["cause"] for event in map(json.loads, lines) if event["kind"] == "restart"]

    root = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-m", "dpkd.pretrain", "--config", config, "--stages", "pack,prepare,teach"]
    with LocalCluster([1, 1], environment=root) as cluster, (tmp_path / "log").open("w") as log:
        environment = os.environ | root | cluster.client_variables()
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: len(train_events(folder)) > 50)
            cluster.kill_node(1)
            wait_for(lambda: len(restarts()) == 1)
            cluster.add_node(1)
            wait_for(lambda: len(restarts()) == 2)
            assert driver.wait(timeout=400) == 0, (tmp_path / "log").read_text()
        finally:
            driver.kill()
    assert restarts()[1] == "there is room for 2 workers instead of 1"
    started = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("starts ")]
    assert [line.split()[1] for line in started] == ["2", "1", "2"]
    audit(str(tmp_path / "run"))
    record("a node is killed", "a node joins", target="a run of 2 workers")


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_killed_driver_leaves_nothing_that_blocks_the_next_attempt(sample_folder: Path, tmp_path: Path) -> None:
    """The cluster has room for the two workers of one attempt alone."""
    tree = tiny(tmp_path / "run", source=sample_folder)
    tree["launcher"] |= {"kind": "ray", "workers": 2}
    tree["teach"]["training"] |= {"steps": 60, "evaluate_every": 60, "panels_every": 60}
    folder = RunFolder(tmp_path / "run")
    root = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with LocalCluster([1, 1], environment=root) as cluster:
        environment = root | cluster.client_variables()
        for steps in (10, 20, 30):
            command = Command(tree, "--stages", "pack,prepare,teach", environment=environment)
            command.wait_for_step("teach", steps)
            command.kill_all()
        last = Command(tree, "--stages", "pack,prepare,teach", environment=environment)
        assert last.wait() == 0, last.output
    assert max(event["step"] for event in train_events(folder)) == 60
    audit(str(folder.path))
    record(*["SIGKILL"] * 3, target="a driver")


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_job_that_is_stopped_saves_and_goes_on_when_submitted_again(sample_folder: Path, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "run", source=sample_folder)
    tree["launcher"] |= {"kind": "auto", "workers": 2}
    tree["teach"]["training"] |= {"steps": 400, "checkpoint_every": 400, "evaluate_every": 400, "panels_every": 400}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    folder = RunFolder(tmp_path / "run")
    root = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "RAY_JOB_STOP_WAIT_TIME_S": "100"}
    command = [sys.executable, "-m", "dpkd.pretrain", "--config", str(config), "--stages", "pack,prepare,teach"]
    with LocalCluster([1, 1], environment=root) as cluster:
        submitted = cluster.submit(command, wait=False)
        job = re.search(r"raysubmit_\w+", submitted.stdout)
        assert job is not None, submitted.stdout + submitted.stderr
        while len(train_events(folder)) < 20:
            time.sleep(0.1)
        ray = Path(sys.executable).parent / "ray"
        stop = [ray, "job", "stop", "--address", cluster.dashboard, job[0]]
        stopped = subprocess.run(
            stop, env=os.environ | cluster.client_variables(), capture_output=True, text=True, check=False
        )
        assert "was stopped" in stopped.stdout, stopped.stdout + stopped.stderr
        (saved,) = CheckpointStore(folder.checkpoints("teach")).standing()
        assert saved.step == max(event["step"] for event in train_events(folder))
        again = cluster.submit(command)
        assert again.returncode == 0, again.stdout + again.stderr
        assert f"continues after step {saved.step} of 400" in again.stdout
    audit(str(folder.path))
    record("ray job stop", target="a job")


def test_a_cluster_refuses_who_has_no_token(ray_cluster: LocalCluster) -> None:
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ray = Path(sys.executable).parent / "ray"
    job = subprocess.run(
        [ray, "job", "submit", "--address", ray_cluster.dashboard, "--", "true"],
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
    networks = {"teacher": summary["teacher"]} | summary["students"] | summary["baselines"]
    figures = {name: (network["parameters"], network["few_shot"]) for name, network in networks.items()}
    return figures | {stage: record["status"] for stage, record in summary["stages"].items()}
