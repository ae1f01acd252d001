"""Whole runs that are struck again and again, and end as a run that nothing struck.

`make chaos` strikes 20 times in a row, on the same number of workers throughout and on another after every death of the
driver; DPKD_CHAOS_SEED draws other faults. A few strike in every test run.
"""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dpkd.io import storage
from dpkd.io.checkpoint_store import MANIFEST, CheckpointStore
from dpkd.run.folder import RunFolder
from dpkd.train.sample_log import read_history
from dpkd.verbs.audit import audit
from tests.chaos import report
from tests.chaos.campaign import DEADLY, Campaign, Fault, draw
from tests.runs import Command, all_weights, tiny

STEPS = 240
CALM = {"kind": "adamw", "learning_rate": 1e-5}
"""At rates that learn more, rounding grows a millionfold in 100 steps, and runs of one and two workers part."""
BOUND, STATISTICS_BOUND = 2e-6, 1e-4
"""How far weights, and running means and variances, may be from those of another number of workers, which adds
gradients up in another order. Seen were 5e-7 and 3.4e-5 (a sum over 72 weights); a step moves weights by 1e-5.
"""


def batches_for_six(folder: Path, *, source: Path) -> dict[str, Any]:
    """Settings of a run whose batches one, two and three workers share evenly, and whose dropout no rank draws."""
    tree = tiny(folder, source=source)
    for part in (tree["teachers"]["teacher"], tree["distill"]):
        part["training"] |= {"steps": STEPS, "batch_size": 12, "micro_batch_size": 2, "checkpoint_every": 3}
        part["training"] |= {"evaluate_every": STEPS // 2, "panels_every": STEPS}
    for network in (tree["teachers"]["teacher"], *tree["distill"]["students"].values()):
        network["optimizer"] = CALM
    tree["distill"]["students"]["conv"]["baseline"] = False  # the faults are for the two stages of the steps
    model = tree["distill"]["students"]["vit"]["model"]
    tree["distill"]["students"]["vit"]["model"] = model | {"arguments": model["arguments"] | {"pos_drop_rate": 0.0}}
    tree["launcher"] |= {"workers": 2, "hang_timeout_s": 5, "max_restarts": 20}
    tree["evaluate"]["episodes"]["episodes"] = 2000  # it takes long enough to be struck
    return tree


@pytest.fixture(scope="module")
def unbroken(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    command = Command(batches_for_six(tmp_path_factory.mktemp("unbroken") / "run", source=sample_folder))
    assert command.wait() == 0, command.output
    return command.folder


def differences(one: RunFolder, other: RunFolder) -> dict[str, float]:
    """The largest difference of each tensor of all networks that is not the same to the last bit."""
    first, second = all_weights(one), all_weights(other)
    assert first.keys() == second.keys()
    return {
        name: float((first[name].double() - second[name].double()).abs().max())
        for name in first
        if not torch.equal(first[name], second[name])
    }


def sizes_of(folder: RunFolder) -> set[int]:
    """Numbers of workers that made steps of this run, and saved them, by its sample logs."""
    histories = [read_history(folder.sample_log(stage)) for stage in ("teach", "distill")]
    return {step.world_size for history in histories for step in history.steps.values()}


def assert_tidy(campaign: Campaign, shared_memory_before: set[str]) -> None:
    """Nothing is left but what a run leaves: whole checkpoints, no half files, no processes, no shared memory."""
    folder = campaign.folder
    half = [path for path in folder.path.rglob("*") if path.name.startswith((storage.TEMPORARY_PREFIX, ".rank-"))]
    assert not half, half
    for stage in ("teach", "distill"):
        store = CheckpointStore(folder.checkpoints(stage))
        standing = store.committed()
        there = {name for name in storage.list_names(store.url) if not name.startswith("attempt-")}
        assert there == {mark.name for mark in standing}
        assert len(standing) == 2
        for mark in standing:
            files = {name for name, _ in storage.walk(store.place(mark))}
            lists = {name for name in files if name.startswith("files-")}
            assert files == {MANIFEST, *lists, *store.manifest(mark).files}
    deadline_s = time.monotonic() + 20
    while campaign.processes():  # the last ones end a little after their driver
        assert time.monotonic() < deadline_s, campaign.processes()
        time.sleep(0.1)
    left = {path.name for path in Path("/dev/shm").iterdir()} - shared_memory_before
    assert not [name for name in left if any(str(process) in name for process in campaign.seen)]
    strange = [each.name for each in campaign.temporary.iterdir() if not each.name.startswith(("pymp-", ".ses"))]
    assert not strange, strange  # `multiprocessing`'s, of processes that were killed, and onnxruntime's


def record(campaign: Campaign, suite: str, *, outcome: str) -> None:
    """Puts every fault of the campaign into the report."""
    for cost in campaign.costs():
        fault = f"{cost.fault.kind}, {cost.fault.moment}"
        costs = {"recovery_s": cost.recovery_s, "lost_steps": cost.lost_steps}
        report.record(suite, fault=fault, target=cost.target, outcome=outcome, **costs)


@pytest.mark.nightly
def test_after_a_few_faults_a_run_ends_as_unbroken(whole: RunFolder, library: Path, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "run", source=None, shards=whole.path / "shards")
    draws = random.Random(report.seed())
    faults = [
        Fault(draws.choice(DEADLY), "rank", "save", call=draws.randrange(25)),
        Fault("SIGKILL", "all", "start", wait_s=draws.uniform(0, 2)),
    ]
    campaign = Campaign(tree, sizes=[1], stages="teach", library=library, seed=report.seed())
    campaign.run(faults)
    name = "teachers/teacher/model.safetensors"
    assert (campaign.folder.path / name).read_bytes() == (whole.path / name).read_bytes()
    audit(str(campaign.folder.path))
    record(campaign, "runs, a few", outcome=report.SURVIVED)


@pytest.mark.chaos
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("sizes", [[2], [1, 2, 3]], ids=["two workers", "one two three workers"])
def test_after_20_faults_in_a_row_a_run_ends_as_unbroken(
    unbroken: RunFolder, sample_folder: Path, library: Path, tmp_path: Path, sizes: list[int]
) -> None:
    seed = report.seed() + len(sizes)
    faults = draw(20, steps=2 * STEPS, seed=seed)
    shared_memory_before = {path.name for path in Path("/dev/shm").iterdir()}
    tree = batches_for_six(tmp_path / "run", source=sample_folder)
    tree["data"]["loader"] = {"workers": len(sizes) % 2}
    campaign = Campaign(tree, sizes=sizes, library=library, seed=seed)
    campaign.run(faults)
    apart = differences(unbroken, campaign.folder)
    furthest = sorted(apart.items(), key=lambda each: -each[1])[:3]
    print(f"seed {seed}, workers {sizes}: largest differences {furthest}")
    far = [name for name, by in apart.items() if by > (STATISTICS_BOUND if "running_" in name else BOUND)]
    same = not apart if sizes == [2] else not far
    suite = "runs, same number of workers" if sizes == [2] else "runs, 1, 2, 3 workers"
    if not same:
        record(campaign, suite, outcome="the weights are others")
    assert same, furthest
    assert sizes_of(campaign.folder) == set(sizes)
    audit(str(campaign.folder.path))
    assert_tidy(campaign, shared_memory_before)
    record(campaign, suite, outcome=report.SURVIVED)
