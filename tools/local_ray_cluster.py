"""Starts a Ray cluster of several nodes on this machine, apart from any other: free ports, a token of its own.

The dashboard listens on loopback; Ray's other ports, as on any node, on every address of the machine.

    python tools/local_ray_cluster.py --cpus 2 2

prints the variables that a shell needs to submit jobs to it, and ends it at Ctrl-C. Tests use `LocalCluster`.
"""

import argparse
import http.client
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Self

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
_PORTS_GIVEN: set[int] = set()


class LocalCluster:
    """A head and further raylets as processes of this one, one for each entry of `cpus`; a context manager.

    `gpus` says how many GPUs each node claims to have; Ray hands them out whether they are there or not.
    """

    def __init__(
        self, cpus: Sequence[int], *, gpus: Sequence[int] = (), environment: dict[str, str] | None = None
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dpkd-ray-", dir="/tmp"))  # short: it becomes part of socket paths
        gcs, dashboard = _free_ports(2)
        self.address = f"127.0.0.1:{gcs}"
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.variables["RAY_USAGE_STATS_ENABLED"] = "0"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._environment = inherited | (environment or {}) | self.variables
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._head = ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
        self._head += [f"--temp-dir={self._folder}", f"--ray-client-server-port={_free_ports(1)[0]}"]
        try:
            for num_cpus, num_gpus in zip_longest(cpus, gpus, fillvalue=0):
                self.add_node(num_cpus, num_gpus=num_gpus)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def client_variables(self) -> dict[str, str]:
        """What a driver or `ray job submit` needs in its environment."""
        return self.variables | {"RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.dashboard}

    def submit(self, command: Sequence[str], *, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs `ray job submit -- command` from outside the cluster."""
        flags = ["--address", self.dashboard, *([] if wait else ["--no-wait"])]
        submit = [_ray(), "job", "submit", *flags, "--", *command]
        return subprocess.run(submit, env=self._environment, capture_output=True, text=True, check=False)

    def add_node(self, num_cpus: int, *, num_gpus: int = 0) -> int:
        """Starts one more node, the head first, and waits until it runs; returns its place."""
        place = len(self._nodes)
        role = self._head if place == 0 else [f"--address={self.address}"]
        self._start_node([*role, f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"])
        self._wait_for_node(place)
        return place

    def kill_node(self, place: int) -> None:
        """Ends one node at once, as when its machine fails."""
        self._nodes[place].kill()
        self._nodes[place].wait()

    def stop(self) -> None:
        """Ends every node and removes what they wrote."""
        for node in self._nodes:
            node.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline and any(node.poll() is None for node in self._nodes):
            time.sleep(0.1)
        for place in range(len(self._nodes)):
            self.kill_node(place)  # its processes die with it
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start_node(self, arguments: Sequence[str]) -> None:
        listen, grpc = _free_ports(2)  # the defaults are fixed, and two nodes of one machine would meet there
        command = [_ray(), "start", "--block", "--node-ip-address=127.0.0.1"]
        command += [f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={grpc}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000", *arguments]
        log = (self._folder / f"node-{len(self._nodes)}.log").open("wb")
        with log:
            self._nodes.append(subprocess.Popen(command, env=self._environment, stdout=log, stderr=subprocess.STDOUT))

    def _wait_for_node(self, place: int) -> None:
        """Returns once the node says it runs and, for the head, once its dashboard answers."""
        log = self._folder / f"node-{place}.log"
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._nodes[place].poll() is not None:
                raise RuntimeError(f"node {place} did not start:\n{log.read_text(errors='replace')}")
            if "Ray runtime started." in log.read_text(errors="replace") and (place > 0 or self._dashboard_answers()):
                return
            time.sleep(0.2)
        raise RuntimeError(f"node {place} did not start in {START_TIMEOUT_S} s:\n{log.read_text(errors='replace')}")

    def _dashboard_answers(self) -> bool:
        token = self.variables["RAY_AUTH_TOKEN"]
        connection = http.client.HTTPConnection(self.dashboard.removeprefix("http://"), timeout=2)
        try:
            connection.request("GET", "/api/version", headers={"Authorization": f"Bearer {token}"})
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            connection.close()


def _ray() -> str:
    return str(Path(sys.executable).parent / "ray")


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and that this process has not given away before: the nodes open theirs later."""
    ports: list[int] = []
    with ExitStack() as stack:
        while len(ports) < count:
            port = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            if port not in _PORTS_GIVEN:
                ports.append(port)
    _PORTS_GIVEN.update(ports)
    return ports


def main() -> None:
    """Starts a cluster, prints how to reach it, and waits for Ctrl-C."""
    parser = argparse.ArgumentParser(description="Starts a Ray cluster of several nodes on this machine.")
    parser.add_argument("--cpus", type=int, nargs="+", default=[1, 1], help="CPUs of each node, the head first")
    with LocalCluster(parser.parse_args().cpus) as cluster:
        for name, value in cluster.client_variables().items():
            print(f"export {name}={shlex.quote(value)}")
        print("# ray job submit -- python -m dpkd.pretrain --config FILE.yaml; Ctrl-C here ends the cluster")
        with suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
