"""`dpkd ledger`: what teacher, tricks and priors bring to the exported students on the user's own images.

    OUT/prepared/, shards/                      images and prior maps, packed once for all runs
    OUT/<row>/seed-0/, seed-0.yaml, seed-0.log  one run of a row (`dpkd.stages.rows`): folder, settings, output
    OUT/ledger.md, ledger.json, gains.svg, labels.svg

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
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from dpkd.errors import UserError, did_you_mean
from dpkd.io import storage
from dpkd.log import duration, logger
from dpkd.report.charts import Point, interval_chart, line_chart
from dpkd.report.figures import KNOWN, column_words, markdown_table
from dpkd.run.folder import RunFolder
from dpkd.settings import Settings, parse_settings
from dpkd.stages import driver
from dpkd.stages.plan import POOL_STAGES, left_to_do, stages_of
from dpkd.stages.rows import ALL, LABELS, at, prior_uses, rows_of, with_overrides, without
from dpkd.verbs.ledger_report import FEW, Figures, Results, advise

STAGES = ("teach", "distill", "baselines", "evaluate")
UNITS_S = {"d": 86_400, "h": 3600, "m": 60, "min": 60, "s": 1}
NEVER = 1_000_000_000
STOPPED = 75
"""The exit code of a run that the same command continues."""
POLL_S = 0.2


@dataclass(frozen=True)
class Training:
    """A run of one row with one seed."""

    row: str
    seed: int
    settings: Settings

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
        left = left_to_do(folder, self.settings, stages_of(self.settings, STAGES))
        return not left and (self.path / "summary.json").is_file()

    def run(self, stop: Callable[[], bool]) -> str | None:
        """Starts or continues it, and asks it to save once `stop()`; returns why it failed, if it did.

        A Ctrl-C in this terminal does not reach its process.
        """
        config, log = self.path.with_suffix(".yaml"), self.path.with_suffix(".log")
        storage.write_bytes_atomic(config, yaml.safe_dump(self.settings.model_dump(mode="json")).encode())
        command = [sys.executable, "-m", "dpkd.pretrain", "--config", str(config), "--stages", ",".join(STAGES)]
        logger.info(f"ledger: {self} runs; its output is in {log}")
        with log.open("a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, process_group=0)
        while process.poll() is None and not stop():
            time.sleep(POLL_S)
        process.terminate()  # does nothing if it has ended
        if process.wait() in (0, STOPPED) or stop():
            return None
        text = log.read_text(errors="replace").strip()
        last_error = max(0, f"\n{text}".rfind("\nerror: "))
        return f"{self}: {text[last_error:][-2000:]}"

    def figures(self) -> Figures:
        """The figures of the students as exported; of trainings of several lengths, of the best on the first split."""
        summary, splits = json.loads((self.path / "summary.json").read_text()), self.settings.data.evaluated_splits
        found = {}
        for name, student in summary["students"].items():
            longer = [other for key, other in summary["baselines"].items() if key.partition(".")[0] == name]
            exported = [network.get("plain_pooling", network["scores"]) for network in (student, *longer)]
            best = max(exported, key=lambda by_split: list(by_split[splits[0]].values())[-1]["mean"])
            found[name] = {
                f"{split} {column_words(key)}": score["mean"] for split in splits for key, score in best[split].items()
            }
        return found


class Ledger:
    """The rows of the settings, and their runs in the order in which they run."""

    def __init__(
        self, settings: Settings, out: Path, *, pairs: int, rows: str = "", shares: str = "", command: str = ""
    ) -> None:
        """Raises `UserError` for settings and options that allow no comparison."""
        if pairs < 1:
            raise UserError(f"--pairs {pairs}: give 1 or more")
        if not re.fullmatch(r"((0?\.\d+|1)(,(?=.)|$))*", shares):
            raise UserError(f"--shares {shares!r}: give shares of the labels, such as 0.05,0.1,0.25")
        if not settings.teachers:
            raise UserError("the settings have no teachers, so there is nothing to compare with labels alone: add one")
        if settings.evaluate is None or not settings.data.evaluated_splits:
            raise UserError("a ledger compares figures: set evaluate, and data.val or data.test")
        self.out, self._settings, self._command, derived = out, settings, command, dict[str, Settings]()
        self._shares = sorted(float(share) for share in shares.split(",") if share)
        self._rows, self._notes = rows_of(settings, shares=self._shares), list[str]()
        asked = [name.strip() for name in rows.split(",")] if rows else list(self._rows)
        for name in asked:
            if name not in self._rows:
                hint, known = did_you_mean(name, self._rows), ", ".join(self._rows)
                raise UserError(f"--rows {name!r}: no such row{hint} (they are {known})")
        for name, overrides in self._rows.items():
            try:
                derived[name] = with_overrides(settings, overrides, origin=f"row {name!r}")
            except UserError as error:
                self._notes.append(f"left out: {error}")
        self.same = {name: next(row for row, other in derived.items() if other == derived[name]) for name in derived}
        """By row, the first row with equal settings, which is the one that runs."""
        self._notes += [f"{name}: the same as {row}" for name, row in self.same.items() if name != row]
        if settings.data.labels.kind in ("all", "listed"):
            self._notes.append("all seeds see the same labels: pairs differ in first weights and batches alone")
        if any(teacher.seen for teacher in settings.teachers.values()):
            self._notes.append("a teacher knows the classes of its `seen`: figures of `all` on them are not few-shot")
        run = settings.run.model_copy(update={"dir": str(out / "prepared")})
        data = settings.data.model_copy(update={"shards": settings.data.shards or str(out / "shards")})
        self._images = settings.model_copy(update={"run": run, "data": data})
        chosen = dict.fromkeys(self.same[name] for name in asked if name in self.same)
        seeds = range(run.seed, run.seed + pairs)
        self.trainings = [self._training(derived[row], row, seed) for seed, row in product(seeds, chosen)]

    def _training(self, settings: Settings, row: str, seed: int) -> Training:
        """A run of a row: it shares images and maps, and measures what a ledger reads, at its end alone."""
        place = f"{re.sub(r'[^A-Za-z0-9._]+', '-', row).strip('-')}/seed-{seed}"
        tree = settings.model_dump(mode="json")
        checkpoints = settings.run.checkpoints and storage.join(settings.run.checkpoints, place)
        tree["run"] |= {"dir": str(self.out / place), "seed": seed, "checkpoints": checkpoints}
        tree["data"] |= {"source": None, "shards": self._images.data.shards}
        tree["evaluate"]["probes"] = None
        for owner in (tree["distill"], *tree["teachers"].values()):
            owner["training"] |= {"evaluate_every": NEVER, "panels_every": NEVER}
        for student in tree["distill"]["students"].values():  # on labels alone a student is its own baseline
            student["baseline"] = [length for length in student["baseline"] if length != 1 and row.startswith(LABELS)]
        return Training(row, seed, parse_settings(tree, origin=f"row {row!r}"))

    def run(self, *, budget: str | None = None, jobs: int = 1) -> None:
        """Runs what is left and is expected to end within the budget, and writes the report after each run.

        Raises `UserError` for settings other than before, for a fault of the first run, and at the end for runs that
        failed.
        """
        deadline_s, ended, failed = time.monotonic() + seconds_of(budget), threading.Event(), list[str]()
        if jobs < 1:
            raise UserError(f"--jobs {jobs}: give 1 or more")
        left = [training for training in self.trainings if not training.is_done()]
        done = [training for training in self.trainings if training not in left]

        def expected_s(training: Training) -> float:
            """The longest finished run of this row, or else of any, less what this run has behind it."""
            seconds = [other.seconds for other in done if other.row == training.row] or [run.seconds for run in done]
            return max(0.0, max(seconds, default=0.0) - training.seconds)

        def stop(within_s: float = 0.0) -> bool:
            return ended.is_set() or time.monotonic() + within_s >= deadline_s

        logger.info(f"ledger: {len(self.trainings)} runs in {self.out}, {len(done)} of them done")
        if left:
            driver.run(self._images, stages=POOL_STAGES)
        with ThreadPoolExecutor(jobs) as pool:
            work = {pool.submit(lambda t: None if stop(expected_s(t)) else t.run(stop), each): each for each in left}
            try:
                for future in as_completed(work):
                    training, fault = work[future], future.result()
                    if fault is not None:
                        left.remove(training)
                        failed.append(fault)
                        logger.info(f"ledger: {fault}")
                        if not done:
                            raise UserError(fault)
                    elif training.is_done():
                        left.remove(training)
                        done.append(training)
                        # a finished run does not go on, and checkpoints of all runs would fill the disk
                        shutil.rmtree(training.path / "checkpoints", ignore_errors=True)
                        words = f"{len(done)} done, about {duration(sum(map(expected_s, left)) / jobs)} left"
                        logger.info(f"ledger: {training} took {duration(training.seconds)}; {words}")
                    if done:
                        runs = [(run.row, run.seed, run.seconds, run.figures()) for run in done]
                        self.write(runs, left=[str(training) for training in left], failed=failed)
            finally:
                ended.set()  # the pool waits for its threads, which now stop their runs
        logger.info(f"ledger: {self.out / 'ledger.md'}")
        if left:
            logger.info(f"ledger: {len(left)} runs are left; go on with: {self._command}")
        if failed:
            raise UserError("\n".join([f"{len(failed)} runs failed, and the ledger lacks them:", *failed]))

    def write(
        self, runs: Sequence[tuple[str, int, float, Figures]], *, left: Sequence[str], failed: Sequence[str]
    ) -> None:
        """Writes the report, from (row, seed, seconds, figures) of each finished run and the names of the others."""
        results = Results([(row, seed, figures) for row, seed, _, figures in runs], self.same)
        uses, places, last = prior_uses(self._settings), results.places, results.places[-1]
        pairs = len({seed for _, seed, *_ in runs})
        kind = "Accuracy" if last.endswith(("shot", column_words(KNOWN))) else "Figures"
        advised, removed, why = advise(results, uses)
        overrides = without(self._settings, removed) if advised == ALL else self._rows[advised]
        lines = ["# What helps on these images", "", f"`{self._command}`", "", "## What to do", ""]
        lines += [f"**{pairs} of at least {FEW} pairs: a direction, not a measurement.**", ""] if pairs < FEW else []
        lines += [f"By the gains on {results.judged}, {why}.", ""]
        lines += ["```", *" \\\n".join(map(shlex.quote, overrides)).split("\n"), "```", ""] if overrides else []
        took = {row: duration(mean(other[2] for other in runs if other[0] == row)) for row, *_ in runs}
        accuracies = [(row, None, f"{time} a run") for row, time in took.items()]
        curves, drawn, records = defaultdict[str, list[Point]](list), dict[str, tuple[float, float]](), []
        for compared in (results.comparisons(uses, self._shares), accuracies):
            table = [["", "student", *places, "pairs"]]
            for (row, over, shows), student in product(compared, results.students):
                found = {place: each for place in places if (each := results.estimate(row, over, student, place))}
                title, words = f"{row}, {shows}", [each.words("+" if over else "") for each in found.values()]
                if over:
                    title = f"{row} − {over}: {shows}"
                    records.append({"row": row, "over": over, "shows": shows, "student": student, "by_place": found})
                    if student == results.students[-1]:
                        drawn[f"{row} − {over}"] = (100 * found[last].mean, 100 * (found[last].half or 0))
                table.append([title, student, *words, str(found[last].num_seeds)])
            title = f"{kind} in %" if compared is accuracies else "Gains in points"
            lines += [f"## {title}", "", "As exported, with 95 % intervals over pairs.", "", *markdown_table(table), ""]
        for share, row, student in product(self._shares, (ALL, LABELS), results.students):
            if accuracy := results.estimate(row + at(share), None, student, last):
                curves[f"{row}, {student}"].append((100 * share, 100 * accuracy.mean, 100 * (accuracy.half or 0)))
        charts = (
            {"gains.svg": interval_chart(drawn, title=f"Gain in points, {last}, {student}", gains=True)}
            if drawn
            else {}
        )
        if curves:
            charts["labels.svg"] = line_chart(curves, title=f"{kind} in %, {last}", x_title="% of the labels")
        for name, chart in charts.items():
            storage.write_bytes_atomic(self.out / name, chart.encode())
            lines += [f"![{name}]({name})", ""]
        lines += [f"- {note}" for note in (*self._notes, *(f"failed: {fault}" for fault in failed))]
        lines += ["", "## Not run yet", "", *(f"- {name}" for name in left), "", f"`{self._command}`"] if left else []
        record = {
            "command": self._command,
            "advice": {"row": advised, "removed": removed, "reason": why, "overrides": overrides},
            "gains": records,
            "runs": [dict(zip(("row", "seed", "seconds", "figures"), run, strict=True)) for run in runs],
            "rows": self._rows,
            "same": self.same,
            "left": left,
            "failed": failed,
        }
        storage.write_bytes_atomic(self.out / "ledger.json", (json.dumps(record, indent=1) + "\n").encode())
        storage.write_bytes_atomic(self.out / "ledger.md", ("\n".join(lines) + "\n").encode())


def ledger(
    settings: Settings, *, out: str | None = None, budget: str | None = None, jobs: int = 1, **options: Any
) -> None:
    """Does the runs of a `Ledger` with these options in the folder `out`, by default `<run.dir>-ledger`."""
    Ledger(settings, Path(out or f"{settings.run.dir}-ledger"), **options).run(budget=budget, jobs=jobs)


def seconds_of(budget: str | None) -> float:
    """The seconds of a duration such as `90m`, `2h` or `1h30m`; infinite without one. Raises `UserError`."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(d|h|min|m|s)", budget or "")
    if budget is not None and (not parts or "".join(map("".join, parts)) != budget):
        raise UserError(f"--budget {budget!r} is no duration: write it as 90m, 2h or 1h30m")
    return sum(float(number) * UNITS_S[unit] for number, unit in parts) if parts else float("inf")
