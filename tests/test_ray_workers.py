"""What Ray workers alone has to bear: its coordinator, a lost actor of Ray's own, a cluster that others use too."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray._private.state import actors

from dpkd.backends.ray_coordinator import Coordinator
from dpkd.backends.ray_workers import RayWorkers
from dpkd.errors import StopRequested
from dpkd.launch.settings import LauncherSettings
from dpkd.launch.worker_group import Restart, Supervision
from tests.chaos import report
from tests.worker_group_work import save_alone_when_asked_to_stop, wait_for_go
from tools.local_ray_cluster import LocalCluster

pytestmark = pytest.mark.serial


@pytest.mark.chaos
@pytest.mark.parametrize("actor", ["Coordinator", "TrainController"])
@pytest.mark.usefixtures("ray_connection")
def test_an_actor_that_is_lost_costs_a_restart_at_most(tmp_path, actor):
    def strike() -> None:
        while len(list(tmp_path.glob("up-*"))) < 2:
            time.sleep(0.1)
        (process,) = _processes(actor)
        os.kill(process, signal.SIGKILL)
        (tmp_path / "go").touch()

    threading.Thread(target=strike, daemon=True).start()
    restarts: list[Restart] = []
    RayWorkers(2, LauncherSettings(max_restarts=1)).run(
        wait_for_go, str(tmp_path), supervision=Supervision(on_restart=restarts.append)
    )
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
    assert len(restarts) == 1
    report.record(
        "ray", fault="SIGKILL", target={"Coordinator": "the coordinator"}.get(actor, "Ray Train's controller")
    )


def _processes(actor: str) -> list[int]:
    """Those of the actors of this class that are alive."""
    there = [each for each in actors().values() if each["ActorClassName"] == actor]
    return [each["Pid"] for each in there if each["State"] == "ALIVE"]


@pytest.mark.chaos
@pytest.mark.usefixtures("ray_connection")
def test_what_ray_keeps_of_a_generation_is_of_no_use_to_the_next(tmp_path, monkeypatch):
    """It is torn and removed while the first one works, which then loses a worker."""
    kept = tmp_path / "t"
    kept.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(kept))
    over = threading.Event()

    def wait_until_up() -> Path:
        while len(list(tmp_path.glob("up-*"))) < 2 and not over.is_set():
            time.sleep(0.1)
        (storage,) = kept.glob("dpkd-workers-*")
        (run,) = storage.iterdir()
        return run

    def strike() -> tuple[Path, Path]:
        first = wait_until_up()
        _damage(first)
        for mark in tmp_path.glob("up-*"):
            mark.unlink()
        os.kill(_processes("RayTrainWorker")[0], signal.SIGKILL)
        second = wait_until_up()
        (tmp_path / "go").touch()
        return first, second

    restarts: list[Restart] = []
    with ThreadPoolExecutor(1) as threads:
        struck = threads.submit(strike)
        struck.add_done_callback(lambda _: (tmp_path / "go").touch())
        try:
            RayWorkers(2, LauncherSettings(max_restarts=1)).run(
                wait_for_go, str(tmp_path), supervision=Supervision(on_restart=restarts.append)
            )
        finally:
            over.set()
        first, second = struck.result()
    assert len(restarts) == 1
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
    assert first.parent != second.parent
    assert first.name != second.name
    assert not list(kept.iterdir())
    report.record("ray", fault="files truncated and removed, SIGKILL", target="Ray Train's own state, a worker")


def _damage(run: Path) -> None:
    """Cuts every other file below the folder in half and removes the rest; leaves a torn list of checkpoints too."""
    snapshot = run / "checkpoint_manager_snapshot.json"  # which Ray Train writes once it was given a checkpoint
    files = sorted(path for path in run.rglob("*") if path.is_file() and path != snapshot)
    snapshot.write_text('{"ray_version": "2.')
    assert files
    for place, path in enumerate(files):
        if place % 2:
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.unlink()


@pytest.mark.chaos
def test_workers_start_with_what_another_job_leaves_them(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(
        "import ray\n"
        "from dpkd.backends.ray_workers import RayWorkers\n"
        "from dpkd.launch.settings import LauncherSettings\n"
        "from dpkd.backends.ray_coordinator import Coordinator\n"
        "from tests.worker_group_work import say_cpus\n"
        "workers = RayWorkers(1, LauncherSettings(max_restarts=0))\n"
        "other = ray.remote(num_cpus=2)(Coordinator).remote()\n"
        "ray.get(other.status.remote())\n"
        f"workers.run(say_cpus, {str(tmp_path)!r})\n"
    )
    root = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with LocalCluster([4], environment=root) as cluster:
        environment = os.environ | root | cluster.client_variables()
        command = [sys.executable, script]
        driver = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert driver.returncode == 0, driver.stderr
    assert (tmp_path / "cpus").read_text() == "2.0"
    assert "no room came free for 1 workers with 4 CPUs each" in driver.stdout


@pytest.mark.chaos
@pytest.mark.usefixtures("ray_connection")
def test_a_session_that_finds_no_room_may_be_stopped(tmp_path):
    other = ray.remote(num_cpus=1)(Coordinator).remote()
    ray.get(other.status.remote())
    threading.Timer(5.0, os.kill, (os.getpid(), 15)).start()
    with pytest.raises(StopRequested, match="before its workers were started"):
        RayWorkers(2, LauncherSettings(max_restarts=0)).run(save_alone_when_asked_to_stop, str(tmp_path))
    ray.kill(other)
    assert not list(tmp_path.iterdir())


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_processes_that_start_slowly_have_the_time_that_the_settings_give_them(tmp_path):
    """As on a busy machine: every process of Ray's that is to work takes some seconds more to start."""
    slow = "import sys, time\nif any('default_worker.py' in word for word in sys.orig_argv): time.sleep(8)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    script = tmp_path / "driver.py"
    script.write_text(
        "import sys\n"
        "from dpkd.backends.ray_workers import RayWorkers\n"
        "from dpkd.launch.settings import LauncherSettings\n"
        "from tests.worker_group_work import touch_for_rank\n"
        "workers = RayWorkers(1, LauncherSettings(max_restarts=0, start_timeout_s=float(sys.argv[1])))\n"
        f"workers.run(touch_for_rank, {str(tmp_path)!r})\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    slowly = {"PYTHONPATH": f"{tmp_path}:{root}", "RAY_worker_register_timeout_seconds": "300"}
    with LocalCluster([1], environment=slowly) as cluster:
        environment = os.environ | {"PYTHONPATH": root} | cluster.client_variables()

        def drive(start_timeout_s: int) -> "subprocess.CompletedProcess[str]":
            command = [sys.executable, script, str(start_timeout_s)]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)

        late = drive(2)
        assert late.returncode == 1
        assert "not at work 2 s after it was started. Is the machine busy? launcher.start_timeout_s" in late.stderr
        assert not (tmp_path / "done-0").exists()
        in_time = drive(700)
        assert in_time.returncode == 0, in_time.stderr
    assert (tmp_path / "done-0").exists()
