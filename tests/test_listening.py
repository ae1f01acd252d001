"""What runs on one machine listens on loopback alone, and what runs on several asks for a token."""

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import psutil
import pytest

from dpkd.backends.local_workers import LocalWorkers
from dpkd.launch.settings import LauncherSettings
from tests.worker_group_work import listening, write_where_they_listen
from tools.local_ray_cluster import LocalCluster

ROOT = Path(__file__).resolve().parents[1]
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, ::1 and the first as an IPv6 address, in the kernel's hexadecimal."""


def listeners(process: psutil.Process) -> set[tuple[str, int]]:
    """Hosts and ports on which a process listens."""
    open_now = process.net_connections("tcp")
    return {(each.laddr.ip, each.laddr.port) for each in open_now if each.status == psutil.CONN_LISTEN}


def is_loopback(host: str) -> bool:
    """Whether no other machine reaches it; IPv4 written as IPv6 too."""
    address = ip_address(host)
    return ((isinstance(address, IPv6Address) and address.ipv4_mapped) or address).is_loopback


@contextmanager
def sampled_listeners() -> Iterator[set[tuple[str, int]]]:
    """A set that grows, during the body, by what this process listens on and did not before."""
    process, over, found = psutil.Process(), threading.Event(), set()
    before = listeners(process)

    def sample() -> None:
        while not over.wait(0.02):
            found.update(listeners(process) - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_of_one_machine_and_their_driver_listen_on_loopback_alone(tmp_path):
    before = listening(os.getpid())  # what other tests left open
    with sampled_listeners() as of_the_driver:
        LocalWorkers(2, LauncherSettings(max_restarts=0, threads=1)).run(write_where_they_listen, str(tmp_path))
    assert of_the_driver
    assert all(is_loopback(host) for host, _ in of_the_driver), of_the_driver
    found = {address for path in tmp_path.iterdir() for address in path.read_text().split()} - (before - LOOPBACK)
    assert len(list(tmp_path.iterdir())) == 2
    assert found
    assert found <= LOOPBACK


@pytest.mark.serial
@pytest.mark.slow
def test_the_dashboard_of_a_cluster_on_this_machine_listens_on_loopback_alone(ray_cluster: LocalCluster):
    port = int(ray_cluster.dashboard.rpartition(":")[2])
    open_now = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    hosts = {each.laddr.ip for each in open_now if each.laddr.port == port}
    assert hosts
    assert all(map(is_loopback, hosts)), hosts


def test_no_page_script_or_hint_opens_a_port_to_all():
    files = [path for folder in ("cluster", "docs", "tools", "configs", "dpkd") for path in (ROOT / folder).rglob("*")]
    texts = {
        path: path.read_text() for path in [*files, ROOT / "README.md"] if path.suffix in (".py", ".md", ".yaml", ".sh")
    }
    wide = re.compile(r"--bind_all|--host[ =]0\.0\.0\.0|dashboard-host[=: \"]+0\.0\.0\.0|AUTH_MODE=disabled")
    found = {str(path.relative_to(ROOT)): wide.findall(text) for path, text in texts.items() if wide.search(text)}
    # in a pod's own network, where the operator's health checks come from; a token guards it
    assert found == {"cluster/rayjob.yaml": ['dashboard-host: "0.0.0.0']}
