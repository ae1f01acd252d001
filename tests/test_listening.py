"""What runs on one machine listens on loopback alone, and what runs on several asks for a token."""

import os
import re
import sys
from pathlib import Path

import pytest

from dpkd.backends.local_gang import LocalGang
from tests.gang_work import listening, write_where_they_listen

ROOT = Path(__file__).resolve().parents[1]
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, ::1 and the first as an IPv6 address, in the kernel's hexadecimal."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_of_one_machine_listen_on_loopback_alone(tmp_path):
    before = listening(os.getpid())  # what other tests left open
    LocalGang(2, max_restarts=0, threads=1).run(write_where_they_listen, str(tmp_path))
    found = {address for path in tmp_path.iterdir() for address in path.read_text().split()} - (before - LOOPBACK)
    assert len(list(tmp_path.iterdir())) == 2
    assert found
    assert found <= LOOPBACK


def test_no_page_script_or_hint_opens_a_port_to_all():
    files = [path for folder in ("cluster", "docs", "tools", "configs", "dpkd") for path in (ROOT / folder).rglob("*")]
    texts = {
        path: path.read_text() for path in [*files, ROOT / "README.md"] if path.suffix in (".py", ".md", ".yaml", ".sh")
    }
    wide = re.compile(r"--bind_all|--host[ =]0\.0\.0\.0|dashboard-host[=: \"]+0\.0\.0\.0|AUTH_MODE=disabled")
    found = {str(path.relative_to(ROOT)): wide.findall(text) for path, text in texts.items() if wide.search(text)}
    # in a pod's own network, where the operator's health checks come from; a token guards it
    assert found == {"cluster/rayjob.yaml": ['dashboard-host: "0.0.0.0']}
