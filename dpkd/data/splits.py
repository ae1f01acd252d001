"""Which split each sample belongs to. Pure; a group (a patient, a sign, a tile) is never cut."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpkd.data.settings import ClassSplits, FileSplits, FractionSplits, GivenSplits
from dpkd.data.sources.records import Record, keys_of, nearest
from dpkd.data.sources.text import match_lines
from dpkd.errors import UserError
from dpkd.log import logger

Splits = GivenSplits | FractionSplits | ClassSplits | FileSplits


@dataclass(frozen=True)
class Assignment:
    """The split of every sample, None for one that the settings leave out, and the listed names that are no sample."""

    splits: tuple[str | None, ...]
    unknown: tuple[tuple[str, str], ...] = ()


def draw(seed: int, name: str) -> bytes:
    """A number for sorting, drawn from the seed and a name alone."""
    return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()


def groups_of(records: Sequence[Record], pattern: str | None) -> list[str | None]:
    """The group of every sample: by the pattern's first group where there is a pattern, else as the source names it.

    A None means that the sample stands alone, or, where there is a pattern, that it does not match. Raises `UserError`
    for a pattern that cannot be used or matches no sample.
    """
    if pattern is None:
        return [record.group for record in records]
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"data.group_pattern={pattern!r} is not a regular expression: {error}") from error
    if compiled.groups < 1:
        raise UserError(
            f"data.group_pattern={pattern!r} has no group: put the part that names the group in parentheses"
        )
    matches = [compiled.search(record.name) for record in records]
    if records and not any(matches):
        raise UserError(
            f"data.group_pattern={pattern!r} matches no sample; a sample's path is, for one, {records[0].name!r}"
        )
    return [match.group(1) if match else None for match in matches]


def assign(
    records: Sequence[Record],
    splits: Splits,
    *,
    groups: Sequence[str | None],
    seed: int,
    train: str,
    listed: Mapping[str, Sequence[str]],
) -> Assignment:
    """Assigns every sample to a split; the same for the same samples, settings and seed.

    `train` names the split of samples for which the source names none. `listed` holds the lines of the files of
    `FileSplits`. Raises `UserError` for a split that stays empty, a class or number that cannot be had, and a group
    that would be cut.
    """
    match splits:
        case GivenSplits():
            assignment = Assignment(tuple(record.split or train for record in records))
        case FractionSplits():
            assignment = Assignment(tuple(_by_fraction(records, splits.fractions, groups=groups, seed=seed)))
        case ClassSplits():
            assignment = Assignment(tuple(_by_class(records, splits.classes, seed=seed, train=train)))
        case FileSplits():
            assignment = _by_file(records, listed)
    _refuse_cut_groups(records, assignment.splits, groups)
    _refuse_empty(splits, assignment.splits)
    return assignment


def _by_fraction(
    records: Sequence[Record], fractions: Mapping[str, float], *, groups: Sequence[str | None], seed: int
) -> list[str | None]:
    """Whole groups in drawn order, each to the split that lacks most of the group's main class."""
    if abs(sum(fractions.values()) - 1) > 1e-6 or min(fractions.values(), default=0) <= 0:
        raise UserError(f"data.splits.fractions={dict(fractions)} must be above 0 and sum to 1")
    members: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for i, (record, group) in enumerate(zip(records, groups, strict=True)):
        members[group is not None, record.name if group is None else group].append(i)
    strata: dict[str, list[tuple[bool, str]]] = defaultdict(list)
    for unit, rows in members.items():
        counts = Counter(records[i].class_name or "" for i in rows)
        strata[min(counts, key=lambda name: (-counts[name], name))].append(unit)
    split_of: list[str | None] = [None] * len(records)
    lacking = dict.fromkeys(
        fractions, 0.0
    )  # carried from class to class, so that rare classes reach the small splits too
    for stratum in sorted(strata):
        units = sorted(strata[stratum], key=lambda unit: draw(seed, unit[1]))
        num_samples = sum(len(members[unit]) for unit in units)
        for name, fraction in fractions.items():
            lacking[name] += fraction * num_samples
        for unit in units:
            chosen = max(lacking, key=lambda name: lacking[name])
            lacking[chosen] -= len(members[unit])
            for i in members[unit]:
                split_of[i] = chosen
    return split_of


def _by_class(
    records: Sequence[Record], classes: Mapping[str, int | tuple[str, ...]], *, seed: int, train: str
) -> list[str | None]:
    """Classes by name, or drawn where only a number is given; unlabelled samples go to the training split."""
    known = {record.class_name for record in records if record.class_name is not None}
    split_of: dict[str | None, str] = {None: train} if train in classes else {}
    for split, wanted in classes.items():
        for name in wanted if not isinstance(wanted, int) else ():
            if name not in known:
                raise UserError(
                    f"data.splits.classes.{split} has {name!r}, no class of the source{nearest(name, known)}"
                )
            if name in split_of:
                raise UserError(f"data.splits.classes gives the class {name!r} to {split_of[name]!r} and to {split!r}")
            split_of[name] = split
    free = sorted(known - set(split_of), key=lambda name: draw(seed, name))
    num_free = len(free)
    num_wanted = sum(wanted for wanted in classes.values() if isinstance(wanted, int))
    if num_wanted > num_free:
        raise UserError(
            f"data.splits.classes asks for {num_wanted} classes, and the source has {num_free}: ask for fewer"
        )
    for split, wanted in classes.items():
        for _ in range(wanted if isinstance(wanted, int) else 0):
            split_of[free.pop(0)] = split
    return [split_of.get(record.class_name) for record in records]


def _by_file(records: Sequence[Record], listed: Mapping[str, Sequence[str]]) -> Assignment:
    """A line is a sample's path, with or without its suffix, or its key, as `match_lines` finds it."""
    number_of: dict[str, int] = {}
    for i, (record, key) in enumerate(zip(records, keys_of([record.name for record in records]), strict=True)):
        for name in (record.name, record.name.rpartition(".")[0], key):
            number_of.setdefault(name, i)
    split_of: list[str | None] = [None] * len(records)
    unknown: list[tuple[str, str]] = []
    for split, lines in listed.items():
        found = match_lines(lines, number_of)
        if lines and not found.numbers:
            raise UserError(
                f"data.splits.files.{split} lists {len(lines)} names, and the source has no such sample: a line such "
                f"as {lines[0]!r} must name a sample by its path below the source, such as {records[0].name!r}"
            )
        if found.prefix:
            logger.info(f"data.splits.files.{split}: {found.prefix!r} before the names is passed over")
        for name, number in found.numbers:
            before = split_of[number]
            if before not in (None, split):
                raise UserError(f"data.splits.files lists {name!r} for {before!r} and for {split!r}: keep one")
            split_of[number] = split
        unknown += [(name, f"listed for split {split!r}, and the source has no such sample") for name in found.unknown]
    return Assignment(tuple(split_of), tuple(unknown))


def _refuse_cut_groups(records: Sequence[Record], splits: Sequence[str | None], groups: Sequence[str | None]) -> None:
    first: dict[str, int] = {}
    for i, group in enumerate(groups):
        if group is None or splits[i] is None:
            continue
        j = first.setdefault(group, i)
        if splits[j] != splits[i]:
            raise UserError(
                f"the group {group!r} would be cut: {records[j].name} is in split {splits[j]!r} "
                f"and {records[i].name} in {splits[i]!r}; change data.splits, or what puts them into one group"
            )


def _refuse_empty(settings: Splits, splits: Sequence[str | None]) -> None:
    match settings:
        case FractionSplits():
            wanted = set(settings.fractions)
        case ClassSplits():
            wanted = set(settings.classes)
        case FileSplits():
            wanted = set(settings.files)
        case GivenSplits():
            wanted = set()
    empty = sorted(wanted - set(splits))
    if empty:
        raise UserError(
            f"data.splits leaves the split {empty[0]!r} without a sample ({len(splits)} samples in all): "
            "change the numbers, or leave that split out"
        )
