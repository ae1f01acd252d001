"""Runs a module of the tests in several processes that train as one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(module: str, *arguments: str, size: int, environment: dict[str, str] | None = None) -> str:
    """Runs the module's `main` once a rank, over gloo; returns what all ranks printed, and raises where one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | (environment or {})
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", f"from {module} import main; main()", *arguments],
            cwd=ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(printed)
    return "".join(printed)
