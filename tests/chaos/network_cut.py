"""Trains on two machines between which the network is cut, again and again; run inside namespaces of its own.

    unshare -rn python -m tests.chaos.network_cut SETTINGS.json CUTS.json

The two machines are network namespaces with a pair of virtual cards between them; each holds one rank, with its
watchdog, and both see the same disk. A cut takes the link down at a step or in the middle of a save of one rank, for
some seconds or until both ranks have ended; then both start again, over a whole link. A line of JSON a cut comes out,
with the steps that had been made since the last published save and those that were made again, and one once the run has
ended.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpkd.io.checkpoint_store import CheckpointStore
from dpkd.launch.watchdog import WatchOrder, watched
from dpkd.run.folder import RunFolder
from dpkd.stages.worker import train_stages
from tests.runs import settings_of, train_events

HERE, THERE = "10.99.0.1", "10.99.0.2"
HANG_TIMEOUT_S = 4.0
PATIENCE_S = 240.0
WAIT_AT_A_CALL = 9


class Link:
    """Two network namespaces, this one and another, and the cable between them."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        own = Path("/proc/self/ns/net").readlink()
        _until(lambda: Path(f"/proc/{self._holder.pid}/ns/net").readlink() != own)
        self.there = ["nsenter", "-t", str(self._holder.pid), "-n"]
        _do("ip", "link", "add", "cut0", "type", "veth", "peer", "name", "cut1", "netns", str(self._holder.pid))
        for before, card, address in (([], "cut0", HERE), (self.there, "cut1", THERE)):
            _do(*before, "ip", "address", "add", f"{address}/24", "dev", card)
            _do(*before, "ip", "link", "set", card, "up")
            _do(*before, "ip", "link", "set", "lo", "up")

    def down(self) -> None:
        """Cuts the cable."""
        _do("ip", "link", "set", "cut0", "down")

    def up(self) -> None:
        """Mends it."""
        _do("ip", "link", "set", "cut0", "up")

    def close(self) -> None:
        """Takes both away."""
        self._holder.kill()
        self._holder.wait()


class Pair:
    """The two ranks of one start of the run."""

    def __init__(self, config: Path, folder: RunFolder, link: Link, *, start: int) -> None:
        self.folder, self.plan = folder, config.with_suffix(".plan")
        self.log = config.with_suffix(".log")
        shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": HERE, "MASTER_PORT": str(29_500 + start)}
        shared |= {"FAULTS_BELOW": str(folder.path / "checkpoints"), "FAULTS_PLAN": str(self.plan)}
        self.ranks = []
        for rank, (before, card) in enumerate((([], "cut0"), (link.there, "cut1"))):
            environment = os.environ | shared | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": card}
            command = [*before, sys.executable, "-m", "tests.chaos.network_cut", str(config), str(start)]
            with self.log.open("a") as log:
                self.ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def wait_for_step(self, step: int) -> None:
        """Returns once this step is in the log."""
        self._until(lambda: any(event["step"] >= step for event in train_events(self.folder)))

    def wait_in_save(self, *, rank: int, call: int) -> Path:
        """Returns once a rank is held up at a storage call of a save, until the file stands that this names."""
        go, struck = self.plan.with_suffix(".plan.go"), self.plan.with_suffix(".plan.struck")
        for each in (go, struck):
            each.unlink(missing_ok=True)
        beside = self.plan.with_suffix(".part")
        beside.write_text(f"{time.time_ns()} {rank} {call} {WAIT_AT_A_CALL}")
        beside.rename(self.plan)
        self._until(struck.exists)
        return go

    def back(self, *, since: int) -> int:
        """The first step after so many lines of the log, once it is there."""
        self._until(lambda: len(train_events(self.folder)) > since)
        return int(train_events(self.folder)[since]["step"])

    def ended(self) -> list[int]:
        """Exit codes, once both have ended."""
        return [rank.wait(PATIENCE_S) for rank in self.ranks]

    def _until(self, fact: Callable[[], bool]) -> None:
        _until(lambda: fact() or any(rank.poll() is not None for rank in self.ranks))
        assert fact(), self.log.read_text()[-3000:]


def cut(pair: Pair, link: Link, given: dict[str, Any]) -> list[int | None]:
    """One cut; returns how both ranks ended, if they did."""
    pair.wait_for_step(given["step"])
    go = pair.wait_in_save(rank=given["rank"], call=given["call"]) if given["in_save"] else None
    last = train_events(pair.folder)[-1]["step"]
    link.down()
    if go is not None:
        go.touch()
    if given["for_s"] is None:
        codes = pair.ended()
        link.up()
        return [*codes]
    time.sleep(given["for_s"])
    link.up()
    pair.wait_for_step(last + 3)
    return [rank.poll() for rank in pair.ranks]


def main() -> None:
    """Trains under cuts to the end."""
    config, cuts = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    folder = RunFolder(json.loads(config.read_text())["run"]["dir"])
    link = Link()
    pair = Pair(config, folder, link, start=0)
    try:
        for number, given in enumerate(cuts, start=1):
            began_s = time.monotonic()
            codes = cut(pair, link, given)
            told = {**given, "codes": codes, "seconds": time.monotonic() - began_s, "lost_steps": 0, "unsaved_steps": 0}
            if codes != [None, None]:
                events, standing = train_events(folder), CheckpointStore(folder.checkpoints("teach")).committed()
                last = events[-1]["step"]
                told["unsaved_steps"] = last - max((mark.step for mark in standing), default=0)
                pair = Pair(config, folder, link, start=number)
                told["lost_steps"] = last - pair.back(since=len(events)) + 1
                told["recovery_s"] = time.monotonic() - began_s
            print(json.dumps(told), flush=True)
        print(json.dumps({"codes": pair.ended()}), flush=True)
    finally:
        for rank in pair.ranks:
            rank.kill()
        link.close()


def live() -> None:
    """The life of a rank: what the worker group of a cluster would do around the session."""
    tree = json.loads(Path(sys.argv[1]).read_text())
    order = WatchOrder(Path(tree["run"]["dir"]) / "hangs", f"start-{sys.argv[2]}", HANG_TIMEOUT_S)
    with watched(order, rank=int(os.environ["RANK"])):
        train_stages((settings_of(tree).model_dump(mode="json"), ["teach"], None))


def _until(fact: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not fact():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def _do(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    live() if "RANK" in os.environ else main()
