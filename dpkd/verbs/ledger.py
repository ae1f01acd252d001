"""`dpkd ledger`: what teacher, tricks and priors bring to the exported students on the user's own images.

    OUT/prepared/, shards/                      images and prior maps, packed once for all runs
    OUT/<row>/seed-0/, seed-0.yaml, seed-0.log  one run of a row (`dpkd.stages.rows`): folder, settings, output
    OUT/ledger.md, ledger.json, gains.png, labels.png

Runs of one seed pair any two rows: the seed draws the visible labels, the first weights and the batches. Each run is a
`python -m dpkd.pretrain`, which continues where it was stopped. They run seed by seed, the rows that tell most first,
and the report is written after each: a stopped ledger is a smaller one.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import yaml

from dpkd.errors import StopRequested, UserError, did_you_mean
from dpkd.io import storage
from dpkd.log import duration, logger
from dpkd.report.summary import markdown_table
from dpkd.run.folder import RunFolder
from dpkd.settings import Settings, parse_settings
from dpkd.stages.plan import POOL_STAGES, left_to_do, stages_of
from dpkd.stages.rows import ALL, LABELS, at, prior_uses, rows_of, with_overrides, without
from dpkd.verbs.ledger_report import (
    Figures,
    Results,
    accuracies,
    accuracy_table,
    advise,
    draw_intervals,
    gain_table,
    measured,
)

UNITS_S = {"d": 86_400, "h": 3600, "m": 60, "min": 60, "s": 1}
NEVER = 1_000_000_000
STOPPED = 75
POLL_S = 0.2


@dataclass(frozen=True)
class Training:
    """A run of one row with one seed."""

    row: str
    seed: int
    settings: Settings
    stages: tuple[str, ...] = ("teach", "distill", "baselines", "evaluate")

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def path(self) -> Path:
        """The run folder; its settings and its output are beside it."""
        return Path(self.settings.run.dir)

    @property
    def seconds(self) -> float:
        """Seconds of its stages so far, over all attempts."""
        return sum(record["seconds"] for record in RunFolder(self.path).stages().values())

    def is_done(self) -> bool:
        """Whether it is finished; raises `UserError` if it began with other settings."""
        folder = RunFolder(self.path, checkpoints=self.settings.run.checkpoints)
        left = left_to_do(folder, self.settings, stages_of(self.settings, self.stages))
        return not left and (self.path / "summary.json").is_file()

    def start(self) -> "subprocess.Popen[bytes]":
        """Starts or continues it in a process that a Ctrl-C in this terminal does not reach."""
        config, log = self.path.with_suffix(".yaml"), self.path.with_suffix(".log")
        storage.write_bytes_atomic(config, yaml.safe_dump(self.settings.model_dump(mode="json")).encode())
        command = [sys.executable, "-m", "dpkd.pretrain", "--config", str(config), "--stages", ",".join(self.stages)]
        with log.open("a") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, process_group=0)

    def fault(self) -> str:
        """The end of its output, which names why it failed."""
        text = self.path.with_suffix(".log").read_text(errors="replace").strip()
        return text[text.rfind("\nerror: ") + 1 :] if "\nerror: " in text else text.rpartition("\n")[2]

    def figures(self) -> Figures:
        """The figures of the students as exported; of trainings of several lengths, of the best on the first split."""
        summary, splits = json.loads((self.path / "summary.json").read_text()), self.settings.data.evaluated_splits
        found = {}
        for name, student in summary["students"].items():
            longer = [other for key, other in summary["baselines"].items() if key.partition(".")[0] == name]
            exported = [network.get("plain_pooling", network["few_shot"]) for network in (student, *longer)]
            best = max(exported, key=lambda by_split: list(by_split[splits[0]].values())[-1]["mean"])
            scores = {(split, key): score["mean"] for split in splits for key, score in best[split].items()}
            found[name] = {
                f"{split} {key.partition('_')[2].replace('shot', '-shot')}": mean
                for (split, key), mean in scores.items()
            }
        return found


@dataclass(frozen=True)
class Plan:
    """The rows and runs of a ledger."""

    settings: Settings
    out: Path
    command: str
    shares: tuple[float, ...]
    overrides: Mapping[str, list[str]]
    """By row."""
    same: Mapping[str, str]
    """By row, the first row with equal settings, which is the one that runs."""
    prepared: Training
    trainings: tuple[Training, ...]
    """In the order in which they run."""
    notes: tuple[str, ...]
    """What the rows do not show."""


def plan_ledger(
    settings: Settings, out: Path, *, pairs: int, rows: str | None = None, shares: str | None = None, command: str = ""
) -> Plan:
    """Derives all rows and runs; raises `UserError` for settings and options that allow no comparison."""
    if pairs < 1:
        raise UserError(f"--pairs {pairs}: give 1 or more")
    if not settings.teachers:
        raise UserError("the settings have no teachers, so there is nothing to compare with labels alone: add one")
    if settings.evaluate is None or not settings.data.evaluated_splits:
        raise UserError("a ledger compares figures: set evaluate, and data.val or data.test")
    table, derived, notes = rows_of(settings, shares=_shares(shares)), dict[str, Settings](), []
    asked = [name.strip() for name in rows.split(",")] if rows else list(table)
    for name in asked:
        if name not in table:
            raise UserError(f"--rows {name!r}: no such row{did_you_mean(name, table)} (they are {', '.join(table)})")
    for name, overrides in table.items():
        try:
            derived[name] = with_overrides(settings, overrides, origin=f"row {name!r}")
        except UserError as error:
            notes.append(f"left out: {error}")
    same = {name: next(first for first, other in derived.items() if other == derived[name]) for name in derived}
    if settings.data.labels.kind in ("all", "listed"):
        notes.append("data.labels shows the same labels to every seed: pairs differ in first weights and batches alone")
    if any(teacher.seen for teacher in settings.teachers.values()):
        notes.append(
            "teachers.<name>.seen: a teacher knows classes, so figures of `all` on them are no few-shot figures"
        )
    run = settings.run.model_copy(update={"dir": str(out / "prepared")})
    data = settings.data.model_copy(update={"shards": settings.data.shards or str(out / "shards")})
    images = settings.model_copy(update={"run": run, "data": data})
    seeds, chosen = range(run.seed, run.seed + pairs), dict.fromkeys(same[name] for name in asked if name in same)
    trainings = [
        Training(row, seed, _of_run(derived[row], row, seed, out=out, images=images))
        for seed in seeds
        for row in chosen
    ]
    prepared = Training("images and maps", run.seed, images, stages=POOL_STAGES)
    return Plan(settings, out, command, _shares(shares), table, same, prepared, tuple(trainings), tuple(notes))


def _of_run(settings: Settings, row: str, seed: int, *, out: Path, images: Settings) -> Settings:
    """The settings of a run: it shares images and maps, and measures what a ledger reads, at its end alone."""
    place = f"{re.sub(r'[^A-Za-z0-9._]+', '-', row).strip('-')}/seed-{seed}"
    tree = settings.model_dump(mode="json") | {"export": None}
    tree["run"] |= {"dir": str(out / place), "seed": seed}
    if settings.run.checkpoints is not None:
        tree["run"]["checkpoints"] = storage.join(settings.run.checkpoints, place)
    tree["data"] |= {"source": None, "shards": images.data.shards}
    tree["evaluate"]["probes"] = None
    for owner in (tree["distill"], *tree["teachers"].values()):
        owner["training"] |= {"evaluate_every": NEVER, "panels_every": NEVER}
    for student in tree["distill"]["students"].values():  # on labels alone a student is its own baseline
        student["baseline"] = [length for length in student["baseline"] if length != 1 and row.startswith(LABELS)]
    return parse_settings(tree, origin=f"row {row!r}")


def ledger(plan: Plan, *, budget: str | None = None, jobs: int = 1) -> None:
    """Runs what is left within the budget, and writes the report after each run.

    Raises `UserError` for settings other than before, and at the end for runs that failed.
    """
    deadline_s = time.monotonic() + seconds_of(budget)
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: give 1 or more")
    waiting = [training for training in (plan.prepared, *plan.trainings) if not training.is_done()]
    runs = Runs(plan, waiting, done=[training for training in plan.trainings if training not in waiting])
    logger.info(f"ledger: {len(plan.trainings)} runs in {plan.out}, {len(runs.done)} of them done")
    runs.report()
    runs.run(jobs=jobs, deadline_s=deadline_s)
    if runs.done:
        logger.info(f"ledger: {plan.out / 'ledger.md'}")
    if runs.waiting:
        logger.info(f"ledger: {len(runs.waiting)} further runs do not fit into the budget; go on with: {plan.command}")
    if runs.failed:
        raise UserError("\n".join([f"{len(runs.failed)} runs failed, and the ledger lacks them:", *runs.failed]))


class Runs:
    """The runs of a ledger that wait, run, are done, or failed."""

    def __init__(self, plan: Plan, waiting: list[Training], *, done: list[Training]) -> None:
        self._plan, self._running = plan, list[tuple[Training, subprocess.Popen[bytes]]]()
        self.waiting, self.done, self.failed = waiting, done, list[str]()

    def run(self, *, jobs: int, deadline_s: float) -> None:
        """Runs what is expected to end before the deadline; what then still runs is asked to save and stop."""
        late = False
        try:
            while self.waiting or self._running:
                if not late:
                    self._start(jobs, deadline_s=deadline_s)
                if not self._running:
                    return
                if not late and time.monotonic() >= deadline_s:
                    late = True
                    for _, process in self._running:
                        process.terminate()
                time.sleep(POLL_S)
                for pair in [pair for pair in self._running if pair[1].poll() is not None]:
                    self._running.remove(pair)
                    self._end(pair[0], pair[1].returncode, jobs=jobs, late=late)
        finally:
            for _, process in self._running:
                process.terminate()
            for _, process in self._running:
                process.wait()

    def _start(self, jobs: int, *, deadline_s: float) -> None:
        while self.waiting and len(self._running) < jobs:
            first, prepared = self.waiting[0], self._plan.prepared
            blocked = any(training is prepared for training, _ in self._running)  # all others need it
            if blocked or time.monotonic() + self._expected_s(first) >= deadline_s:
                return
            self._running.append((self.waiting.pop(0), first.start()))
            logger.info(f"ledger: {first} runs; its output is in {first.path.with_suffix('.log')}")

    def _end(self, training: Training, code: int, *, jobs: int, late: bool) -> None:
        if code == 0:
            # a finished run does not go on, and checkpoints of all runs would fill the disk
            shutil.rmtree(training.path / "checkpoints", ignore_errors=True)
            self.done += [] if training is self._plan.prepared else [training]
            left_s = sum(map(self._expected_s, [*self.waiting, *(other for other, _ in self._running)])) / jobs
            left = f"; {len(self.done)} of {len(self._plan.trainings)} runs are done, about {duration(left_s)} left"
            logger.info(f"ledger: {training} took {duration(training.seconds)}{left if self.done else ''}")
            self.report()
        elif late:
            self.waiting.insert(0, training)
        elif code == STOPPED:
            raise StopRequested(f"{training} was stopped")
        else:
            self.failed.append(f"{training}: {training.fault()}")
            if not self.done or training is self._plan.prepared:
                raise UserError(self.failed[0])
            logger.info(f"ledger: {self.failed[-1]}")

    def _expected_s(self, training: Training) -> float:
        """The longest finished run of this row, or else of any, less what this run has behind it."""
        seconds = [other.seconds for other in self.done if other.row == training.row]
        return max(0.0, max(seconds or [other.seconds for other in self.done], default=0.0) - training.seconds)

    def report(self) -> None:
        """Writes the report of the finished runs."""
        if self.done:
            left = [str(training) for training in (*(training for training, _ in self._running), *self.waiting)]
            write_report(self._plan, self.done, left=left, failed=self.failed)


def write_report(plan: Plan, done: Sequence[Training], *, left: Sequence[str], failed: Sequence[str]) -> None:
    """Writes `ledger.json`, `ledger.md` and the pictures of the finished runs."""
    uses = list(prior_uses(plan.settings))
    results = Results({(run.row, run.seed): run.figures() for run in done}, plan.same)
    gains, advice = measured(results, uses, plan.shares), advise(results, uses)
    overrides = without(plan.settings, advice.removed) if advice.row == ALL else plan.overrides[advice.row]
    seconds = {
        row: mean(run.seconds for run in done if run.row == row) for row in dict.fromkeys(run.row for run in done)
    }
    facts = ("row", "seed", "seconds")
    record = {
        "command": plan.command,
        "advice": {**advice._asdict(), "overrides": overrides},
        "gains": [gain._asdict() for gain in gains],
        "runs": [{**{key: getattr(run, key) for key in facts}, "figures": run.figures()} for run in done],
        "rows": plan.overrides,
        "same": plan.same,
        "left": left,
        "failed": failed,
    }
    lines = [
        "# What helps on these images",
        "",
        f"`{plan.command}`",
        "",
        "## What to do",
        "",
        *advice.lines(results),
        "",
    ]
    lines += [f"Recommended: {advice.row}" + (", with these settings:" if overrides else ", as the settings are."), ""]
    lines += [*_block(overrides), "## Gains", "", "In points, as exported, with 95 % intervals over pairs.", ""]
    lines += ["![gains](gains.png)", "", *markdown_table(gain_table(results, gains)), "", "## Accuracy", ""]
    lines += [*markdown_table(accuracy_table(results, {row: duration(each) for row, each in seconds.items()})), ""]
    if curve := accuracies(results, [row + at(share) for share in plan.shares for row in (ALL, LABELS)]):
        picture = draw_intervals(curve, title=f"accuracy, {results.places[-1]}", sign="")
        storage.write_bytes_atomic(plan.out / "labels.png", picture)
        lines += ["![accuracy by share of labels](labels.png)", ""]
    lines += ["## Rows", ""]
    for row, first in plan.same.items():
        lines += [f"**{row}**" + (f": the same as {first}" if first != row else ""), ""]
        lines += _block(plan.overrides[row]) if first == row else []
    lines += [f"- {note}" for note in (*plan.notes, *(f"failed: {fault}" for fault in failed))]
    if left:
        lines += ["", "## Not run yet", "", *(f"- {name}" for name in left), "", "```", plan.command, "```"]
    drawn = {f"{gain.row} - {gain.over}, {gain.student}": gain.gains[results.places[-1]] for gain in gains}
    picture = draw_intervals(drawn, title=f"gain in points, {results.places[-1]}")
    storage.write_bytes_atomic(plan.out / "gains.png", picture)
    storage.write_bytes_atomic(plan.out / "ledger.json", (json.dumps(record, indent=1) + "\n").encode())
    storage.write_bytes_atomic(plan.out / "ledger.md", ("\n".join(lines) + "\n").encode())


def _block(overrides: Sequence[str]) -> list[str]:
    """A block to copy, an override a line; none without overrides."""
    return ["```", *" \\\n".join(map(shlex.quote, overrides)).split("\n"), "```", ""] if overrides else []


def seconds_of(budget: str | None) -> float:
    """The seconds of a duration such as `90m`, `2h` or `1h30m`; infinite without one. Raises `UserError`."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(d|h|min|m|s)", budget or "")
    if budget is not None and (not parts or "".join(map("".join, parts)) != budget):
        raise UserError(f"--budget {budget!r} is no duration: write it as 90m, 2h or 1h30m")
    return sum(float(number) * UNITS_S[unit] for number, unit in parts) if parts else float("inf")


def _shares(text: str | None) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        shares = (0.0,)
    if not all(0 < share <= 1 for share in shares):
        raise UserError(f"--shares {text!r}: give shares of the labels, such as 0.05,0.1,0.25")
    return shares
