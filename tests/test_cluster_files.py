"""The templates for clusters are well formed, and every one turns token authentication on."""

import subprocess
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[1] / "cluster"


def test_a_kubernetes_job_asks_for_tokens_and_shares_one_volume():
    spec = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())["spec"]
    assert "python -m dpkd.pretrain --config configs/" in spec["entrypoint"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    volumes = [group["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] for group in groups]
    assert len(set(volumes)) == 1


def test_machines_reached_by_ssh_ask_for_tokens_and_keep_the_dashboard_to_themselves():
    cluster = yaml.safe_load((CLUSTER / "ray_up.yaml").read_text())
    head = cluster["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert all("RAY_AUTH_MODE=token" in command for command in [head, cluster["worker_start_ray_commands"][-1]])
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_the_slurm_script_parses():
    subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], check=True)
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "slurm.sh").read_text()


@pytest.mark.parametrize("name", ["rayjob.yaml", "ray_up.yaml", "slurm.sh", "Dockerfile"])
def test_the_page_on_clusters_names_every_file(name):
    assert f"`{name}`" in (CLUSTER / "README.md").read_text()
