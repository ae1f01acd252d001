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


def test_no_file_publishes_the_ports_of_the_dashboard_or_of_ray_clients():
    """The client server (10001) and the dashboard (8265) run code for whoever reaches them."""
    for path in sorted(CLUSTER.iterdir()):
        text = path.read_text()
        assert "10001" not in text or path.name == "README.md", path
        assert "LoadBalancer" not in text, path
        assert "NodePort" not in text, path
        assert "EXPOSE" not in text, path
        assert "--publish" not in text, path


def test_every_start_of_a_node_and_the_image_turn_tokens_on():
    starts = 0
    for path in sorted(CLUSTER.iterdir()):
        if path.name == "README.md":
            continue
        text = path.read_text()
        starts += text.count("ray start")
        assert text.count("ray start") == 0 or "RAY_AUTH_MODE=token" in text, path
    assert starts >= 4
    assert "ENV RAY_AUTH_MODE=token" in (CLUSTER / "Dockerfile").read_text()
    slurm = (CLUSTER / "slurm.sh").read_text()
    assert slurm.index("export RAY_AUTH_MODE=token") < slurm.index("ray start")
    assert "--dashboard-host=127.0.0.1" in slurm


def test_the_head_of_kubernetes_is_reached_through_its_token_alone():
    cluster = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    ports = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert {port["name"] for port in ports} == {"gcs", "dashboard"}
    assert all("hostPort" not in port for port in ports)
    assert "serviceType" not in cluster["headGroupSpec"]


def test_the_slurm_script_parses():
    subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], check=True)
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "slurm.sh").read_text()


@pytest.mark.parametrize("name", ["rayjob.yaml", "ray_up.yaml", "slurm.sh", "Dockerfile"])
def test_the_page_on_clusters_names_every_file(name):
    assert f"`{name}`" in (CLUSTER / "README.md").read_text()
