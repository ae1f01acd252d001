"""What a ledger says: paired gains with their intervals, and a recommendation.

A figure is the accuracy of an exported student, by place (`val 5-shot`). Rows of one seed share labels, first weights
and episodes, so the gain of one row over another is the mean over seeds of their differences.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dpkd.stages.rows import ALL, LABELS, PLAIN, RANDOM, TRICKS, TRICKS_ON_ALL, at

Figures = Mapping[str, Mapping[str, float]]
"""Accuracy by student and place; the first split is that of choices, and the number of shots grows."""
MEAN = "mean of students"
"""One student more, if there are several; the last one."""
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


class Results:
    """The figures of the finished runs."""

    def __init__(self, runs: Iterable[tuple[str, int, Figures]], same: Mapping[str, str]) -> None:
        """Takes (row, seed, figures) of each run, at least one, and by row the row with equal settings that runs."""
        self._same, self._by_seed = same, defaultdict[tuple[str | None, str, str], dict[int, float]](dict)
        for row, seed, figures in runs:
            self.students, self.places = list(figures), list(next(iter(figures.values())))
            for student, place in ((student, place) for student in figures for place in self.places):
                self._by_seed[row, student, place][seed] = figures[student][place]
            for place in self.places if len(figures) > 1 else ():
                self._by_seed[row, MEAN, place][seed] = float(np.mean([figures[name][place] for name in figures]))
        self.students += [MEAN] if len(self.students) > 1 else []
        self.judged = [place for place in self.places if place.split()[0] == self.places[0].split()[0]][-1]
        """The place by which advice is given: most shots on the first split."""

    def estimate(self, row: str, over: str | None, student: str, place: str | None = None) -> Interval | None:
        """The gain of a row over another, or its accuracy without one; None without runs of it, or without a pair."""
        by_seed = self._by_seed[self._same.get(row), student, place or self.judged]
        if over is None:
            return interval(by_seed.values())
        others = self._by_seed[self._same.get(over), student, place or self.judged]
        return interval([by_seed[seed] - others[seed] for seed in by_seed if seed in others])

    def comparisons(self, uses: Collection[str], shares: Sequence[float] = ()) -> list[tuple[str, str, str]]:
        """(row, other row, what it shows) of all comparisons that have pairs; those of equal rows once."""
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
        first = {(self._same.get(row), self._same.get(over)): (row, over, shows) for row, over, shows in compared[::-1]}
        unequal = [comparison for rows, comparison in first.items() if rows[0] != rows[1]]
        return [each for each in compared if each in unequal and self.estimate(*each[:2], self.students[0])]


def advise(results: Results, uses: Collection[str]) -> tuple[str, list[str], str]:
    """The row to take, uses of priors to remove from it, and why; a part is recommended only if it is shown to help."""
    each, together = results.students[:-1] or results.students, results.students[-1:]

    def sign(row: str, over: str, among: Sequence[str] = together) -> int | None:
        """The best sign of these students; None without a pair."""
        return max((gain.sign for student in among if (gain := results.estimate(row, over, student))), default=None)

    def over_all(row: str) -> float:
        gain = results.estimate(row, ALL, *together)
        return -1.0 if gain is None else gain.mean

    tricks, helps, priors = max((TRICKS, TRICKS_ON_ALL), key=over_all), sign(ALL, LABELS, each), sign(ALL, PLAIN)
    beyond = sign(ALL, tricks, each)
    signs = {name: sign(ALL, f"without {name}") or sign(f"only {name}", PLAIN) or 0 for name in uses}
    if helps is not None and helps <= 0:
        row = tricks if sign(tricks, LABELS) == 1 else LABELS
        return row, [], f"distilling {'hurts' if helps else 'brings no clear gain'} here: use {row}"
    if beyond is not None and beyond <= 0:
        return tricks, [], f"a teacher brings no clear gain over its tricks: use {tricks}"
    if priors is not None and priors <= 0 and max(signs.values(), default=0) <= 0:
        return PLAIN, [], "the priors bring no clear gain: leave them out, which shortens training"
    hurting = [name for name, found in signs.items() if found < 0]
    kept = f"remove {', '.join(hurting)}, and keep the other settings" if hurting else "keep the settings as they are"
    return ALL, hurting, f"{'distilling helps' if helps else 'no figure says otherwise'}: {kept}"
