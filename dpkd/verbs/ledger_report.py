"""What a ledger says: paired gains with their intervals, a recommendation, and pictures.

A figure is the accuracy of an exported student, by place (`val 5-shot`). Rows of one seed share labels, first weights
and episodes, so the gain of one row over another is the mean over seeds of their differences.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dpkd.report.summary import Table
from dpkd.stages.rows import ALL, LABELS, PLAIN, RANDOM, TRICKS, TRICKS_ON_ALL, at

Figures = Mapping[str, Mapping[str, float]]
"""Accuracy by student and place; the first split is that of choices, and the number of shots grows."""
MEAN = "mean of students"
FEW = 3
"""Fewer pairs than these show a direction only."""


class Interval(NamedTuple):
    """A mean over seeds, and half its 95 % interval, which one seed does not have."""

    mean: float
    half: float | None
    num_seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is clear of 0, else 0; with fewer than `FEW` seeds, the sign of the mean."""
        margin = self.half if self.half is not None and self.num_seeds >= FEW else 0.0
        return int(np.sign(self.mean)) if abs(self.mean) > margin else 0

    def words(self, sign: str = "+") -> str:
        """In percent: `+1.2 ± 0.4`."""
        return f"{100 * self.mean:{sign}.1f}" + ("" if self.half is None else f" ± {100 * self.half:.1f}")


def interval(values: Collection[float]) -> Interval | None:
    """The mean and half its 95 % interval by Student's t distribution; None without values."""
    from scipy.stats import t  # noqa: PLC0415  slow to import

    count, value_N = len(values), np.array(list(values))
    half = float(t.ppf(0.975, count - 1) * value_N.std(ddof=1) / count**0.5) if count > 1 else None
    return Interval(float(value_N.mean()), half, count) if count else None


@dataclass(frozen=True)
class Results:
    """The figures of the finished runs by row and seed; there is at least one."""

    runs: Mapping[tuple[str, int], Figures]
    same: Mapping[str, str]
    """By row, the first row with equal settings, which is the one that runs."""

    @property
    def students(self) -> tuple[str, ...]:
        """Their names, then `MEAN` if there are several."""
        names = tuple(next(iter(self.runs.values())))
        return (*names, MEAN) if len(names) > 1 else names

    @property
    def places(self) -> tuple[str, ...]:
        """Splits and numbers of shots."""
        return tuple(next(iter(next(iter(self.runs.values())).values())))

    @property
    def judged(self) -> str:
        """The place by which advice is given: most shots on the first split."""
        return [place for place in self.places if place.split()[0] == self.places[0].split()[0]][-1]

    def by_seed(self, row: str, student: str, place: str) -> dict[int, float]:
        """The accuracy of a row."""
        of_row = {seed: figures for (name, seed), figures in self.runs.items() if name == self.same.get(row)}
        return {
            seed: float(np.mean([by_place[place] for name, by_place in figures.items() if student in (name, MEAN)]))
            for seed, figures in of_row.items()
        }

    def gain(self, row: str, over: str, student: str, place: str | None = None) -> Interval | None:
        """The gain of a row over another, by default where advice is given; None without a pair."""
        left, right = (self.by_seed(name, student, place or self.judged) for name in (row, over))
        return interval([left[seed] - right[seed] for seed in left if seed in right])


class Measured(NamedTuple):
    """The gains of one student in one comparison of rows, and what they show."""

    row: str
    over: str
    shows: str
    student: str
    gains: dict[str, Interval]


def measured(results: Results, uses: Collection[str], shares: Sequence[float]) -> list[Measured]:
    """The gains of all comparisons that have pairs; comparisons of equal rows once."""
    compared = [
        (ALL, LABELS, "distilling"),
        (ALL, TRICKS, "distilling, beyond its tricks"),
        (ALL, TRICKS_ON_ALL, "distilling, beyond its tricks"),
        (ALL, PLAIN, "all priors"),
        (ALL, RANDOM, "maps, beyond those of other images"),
        (TRICKS, LABELS, "tricks without a teacher"),
        (PLAIN, TRICKS, "a teacher without priors"),
        *((ALL, f"without {name}", f"{name}, beside the others") for name in uses),
        *((f"only {name}", PLAIN, f"{name}, alone") for name in uses),
        *((ALL + at(share), LABELS + at(share), f"distilling{at(share)}") for share in shares),
    ]
    found, pairs = [], dict[tuple[str | None, str | None], tuple[str, str, str]]()
    for row, over, shows in compared:
        pairs.setdefault((results.same.get(row), results.same.get(over)), (row, over, shows))
    for (first, second), comparison in pairs.items():
        for student in results.students if first != second else ():
            gains = {place: results.gain(*comparison[:2], student, place) for place in results.places}
            known = {place: gain for place, gain in gains.items() if gain is not None}
            if known:
                found.append(Measured(*comparison, student, known))
    return found


class Advice(NamedTuple):
    """The recommended row, the uses of priors to remove from it, and the reasons."""

    row: str
    removed: tuple[str, ...]
    reasons: tuple[str, ...]

    def lines(self, results: Results) -> list[str]:
        """The reasons as a list in Markdown, with a warning where pairs are few."""
        pairs = len({seed for _, seed in results.runs})
        few = f"**{pairs} of at least {FEW} pairs: a direction, not a measurement.**"
        lines = [*([few, ""] if pairs < FEW else []), f"By the gains in points on {results.judged}:", ""]
        return [*lines, *(f"- {reason}" for reason in self.reasons)]


def advise(results: Results, uses: Collection[str]) -> Advice:
    """What to keep: a part that is not shown to help is not recommended, and a use of a prior goes if it hurts."""
    reasons: list[str] = []
    *each, together = results.students if MEAN in results.students else results.students * 2

    def judge(over: str, students: Sequence[str], *words: str) -> list[int]:
        """The signs of the gains over a row; adds a reason for each, in the words of (unclear, better, worse)."""
        gains = {student: gain for student in students if (gain := results.gain(ALL, over, student))}
        figures = {student: f"{gain.words()} over {over}" for student, gain in gains.items()}
        reasons.extend(f"{student}: {words[gain.sign]} ({figures[student]})" for student, gain in gains.items())
        return [gain.sign for gain in gains.values()]

    hurts = "distilling does not help here, it hurts: train on labels alone"
    helped = judge(LABELS, each, "distilling brings no clear gain", "distilling helps", hurts)
    better, worse = "a teacher brings more than its tricks", "the tricks do better without a teacher"
    unclear, tricks = "a teacher brings no clear gain over its tricks", [TRICKS, TRICKS_ON_ALL]
    signs = [judge(row, each, unclear, better, worse) for row in tricks]
    beyond = [min(both) for both in zip(*filter(None, signs), strict=True)]
    best = max(tricks, key=lambda row: gain.mean if (gain := results.gain(row, LABELS, together)) else -1.0)
    whole = judge(PLAIN, [together], "the priors bring no clear gain", "the priors help", "the priors hurt")
    unclear = "the maps are no better than those of other images, so a gain is not shown to be theirs"
    judge(RANDOM, [together], unclear, "the maps themselves help", "maps of other images do better")
    verdicts = {}
    for name in uses:
        beside, alone = results.gain(ALL, f"without {name}", together), results.gain(f"only {name}", PLAIN, together)
        if beside or alone:
            verdicts[name] = sign = (beside.sign if beside else 0) or (alone.sign if alone else 0)
            words = ("no effect seen; without it training is shorter", "keep it", "remove it")[sign]
            figures = " and ".join(
                f"{gain.words()} {how}" for gain, how in ((beside, "beside the others"), (alone, "alone")) if gain
            )
            reasons.append(f"{name}: {words} ({figures})")
    row, removed = ALL, tuple(name for name, sign in verdicts.items() if sign < 0)
    if helped and max(helped) <= 0:
        over = results.gain(best, LABELS, together)
        row = best if over and over.sign > 0 else LABELS
    elif beyond and max(beyond) <= 0:
        row = best
    elif whole and whole[0] <= 0 and max(verdicts.values(), default=0) <= 0:
        row = PLAIN
    return Advice(row, removed if row == ALL else (), tuple(reasons))


def gain_table(results: Results, gains: Sequence[Measured]) -> Table:
    """A line for each comparison and student."""
    rows = [["", "student", *results.places, "pairs"]]
    for row, over, shows, student, by_place in gains:
        pairs = {str(gain.num_seeds) for gain in by_place.values()}
        rows.append([f"{row} − {over}: {shows}", student, *(gain.words() for gain in by_place.values()), *pairs])
    return rows


def accuracy_table(results: Results, took: Mapping[str, str]) -> Table:
    """A line for each row that ran and student; `took` has the mean time of a run in words."""
    rows = [["row", "student", *results.places, "time of a run"]]
    for row, time in took.items():
        for student in results.students:
            found = [interval(results.by_seed(row, student, place).values()) for place in results.places]
            rows.append([row, student, *(accuracy.words("") for accuracy in found if accuracy), time])
    return rows


def accuracies(results: Results, rows: Sequence[str]) -> dict[str, Interval]:
    """The accuracy at the last place of each of the rows that ran and each student, by its name in a picture."""
    pairs = [(row, student) for student in results.students for row in rows]
    found = {pair: interval(results.by_seed(*pair, results.places[-1]).values()) for pair in pairs}
    return {f"{row}, {student}": accuracy for (row, student), accuracy in found.items() if accuracy}


def draw_intervals(lines: Mapping[str, Interval], *, title: str, sign: str = "+") -> bytes:
    """A PNG with a dot and an interval for each line, on one axis; with a sign, 0 is marked."""
    height, left, width, font = 24, 460, 420, ImageFont.load_default(14)
    ends = [line.mean + side * (line.half or 0) for line in lines.values() for side in (-1, 1)]
    low, high = min(ends + [0.0] * bool(sign)), max(ends + [0.0] * bool(sign))
    scale = width / max(high - low, 1e-9)
    picture = Image.new("RGB", (left + width + 140, height * (len(lines) + 2)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((10, 4), title, "black", font)
    if sign:
        draw.line([(left - low * scale, height), (left - low * scale, height * (len(lines) + 1))], "grey")
    for number, (name, line) in enumerate(lines.items(), start=1):
        y, x, reach = number * height + height // 2, left + (line.mean - low) * scale, (line.half or 0) * scale
        colour = ("dimgrey", "seagreen", "firebrick")[line.sign if sign else 0]
        draw.text((10, y - 8), name, "black", font)
        draw.line([(x - reach, y), (x + reach, y)], colour, 2)
        draw.ellipse([(x - 4, y - 4), (x + 4, y + 4)], colour)
        draw.text((left + width + 12, y - 8), line.words(sign), "black", font)
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
