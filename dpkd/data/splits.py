"""Assigns samples to splits by pure functions; a group (a patient, a sign, a tile) is never cut."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from dpkd.data.settings import ClassSplits, FileSplits, FractionSplits, GivenSplits, Splits
from dpkd.data.sources.records import Record, keys_of
from dpkd.data.text import match_lines
from dpkd.errors import UserError, did_you_mean
from dpkd.log import logger


class Assignment(NamedTuple):
    """The split of every sample (None if in no split), and the listed names that match no sample."""

    splits: Sequence[str | None]
    unknown: Sequence[tuple[str, str]] = ()


def draw(seed: int, name: str) -> bytes:
    """A pseudo-random sort key; depends only on the seed and the name."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def group_by_pattern(records: Sequence[Record], pattern: str | None) -> tuple[list[Record], list[tuple[str, str]]]:
    """The samples with the group that the pattern finds in the path, and (name, reason) of samples without a match.

    Without a pattern, the groups of the source stay. Raises `UserError` for a pattern that cannot be used or matches no
    sample.
    """
    if pattern is None:
        return list(records), []
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"data.group_pattern={pattern!r} is not a regular expression: {error}") from error
    if not compiled.groups:
        raise UserError(f"data.group_pattern={pattern!r} has no group: put parentheses around the group's part")
    reason = f"data.group_pattern={pattern!r} does not match the path: change it to match every path"
    matches = [(record, compiled.search(record.name)) for record in records]
    grouped = [replace(record, group=match[1]) for record, match in matches if match and match[1] is not None]
    unmatched = [(record.name, reason) for record, match in matches if not match or match[1] is None]
    if records and not grouped:
        raise UserError(
            f"data.group_pattern={pattern!r} matches no sample: change it to match paths such as {records[0].name!r}"
        )
    return grouped, unmatched


def assign(
    records: Sequence[Record], splits: Splits, *, seed: int, train: str, listed: Mapping[str, Sequence[str]]
) -> Assignment:
    """Assigns every sample to a split; the same for the same samples, settings and seed.

    `train` is the split of samples that have none in the source. `listed` has the lines of the files of `FileSplits`.
    Raises `UserError` for an empty split, an unknown class, too many classes, and a group that would be cut.
    """
    match splits:
        case GivenSplits():
            wanted, assignment = set(), Assignment([record.split or train for record in records])
        case FractionSplits():
            wanted = set(splits.fractions)
            assignment = Assignment(_by_fraction(records, splits.fractions, seed=seed, train=train))
        case ClassSplits():
            wanted = set(splits.classes)
            assignment = Assignment(_by_class(records, splits.classes, seed=seed, train=train))
        case FileSplits():
            wanted, assignment = set(splits.files), _by_file(records, listed)
    first: dict[str, tuple[str, str]] = {}
    for record, split in zip(records, assignment.splits, strict=True):
        if record.group is None or split is None:
            continue
        first_name, first_split = first.setdefault(record.group, (record.name, split))
        if split != first_split:
            raise UserError(
                f"the group {record.group!r} would be cut: {first_name} is in split {first_split!r} and {record.name} "
                f"in {split!r}; change data.splits or the groups"
            )
    if empty := sorted(wanted - set(assignment.splits)):
        raise UserError(
            f"data.splits gives the split {empty[0]!r} no sample ({len(records)} samples in all): change the numbers, "
            "or remove that split"
        )
    return assignment


def _by_fraction(
    records: Sequence[Record], fractions: Mapping[str, float], *, seed: int, train: str
) -> list[str | None]:
    """Assigns whole groups, in a drawn order, to the split that lacks most samples of the group's main class.

    Where samples are labelled, groups without a label train, because nothing could be measured on them.
    """
    if abs(sum(fractions.values()) - 1) > 1e-6 or min(fractions.values(), default=0) <= 0:
        raise UserError(f"data.splits.fractions={dict(fractions)} must be above 0 and sum to 1")
    members: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        members[(False, record.name) if record.group is None else (True, record.group)].append(i)
    strata: dict[str, list[tuple[bool, str]]] = defaultdict(list)
    any_label = train in fractions and any(record.labelled for record in records)
    split_of: dict[int, str] = {}
    several: dict[tuple[bool, str], Counter[str]] = {}
    for unit, rows in members.items():
        counts = Counter(records[i].class_name or "" for i in rows)
        if any_label and not any(records[i].labelled for i in rows):
            split_of |= dict.fromkeys(rows, train)
        elif any(records[i].labels is not None for i in rows):
            several[unit] = Counter(name for i in rows for name in records[i].label_names or [""])
        else:
            strata[min(counts, key=lambda name: (-counts[name], name))].append(unit)
    for unit, split in _by_label(several, fractions, seed=seed).items():
        split_of |= dict.fromkeys(members[unit], split)
    # kept from class to class, so that small splits also get rare classes
    lacking = dict.fromkeys(fractions, 0.0)
    for stratum in sorted(strata):
        units = sorted(strata[stratum], key=lambda unit: draw(seed, unit[1]))
        num_samples = sum(len(members[unit]) for unit in units)
        for name, fraction in fractions.items():
            lacking[name] += fraction * num_samples
        for unit in units:
            chosen = max(lacking, key=lambda name: lacking[name])
            lacking[chosen] -= len(members[unit])
            split_of |= dict.fromkeys(members[unit], chosen)
    return [split_of[i] for i in range(len(records))]


def _by_label(
    labels_of: Mapping[tuple[bool, str], Counter[str]], fractions: Mapping[str, float], *, seed: int
) -> dict[tuple[bool, str], str]:
    """Assigns groups with several labels, so that each split has its share of each label, rare ones first.

    Iterative stratification (Sechidis et al. 2011), by groups in a drawn order; having no label is a label, "".
    """
    left = sorted(labels_of, key=lambda unit: draw(seed, unit[1]))
    counts = Counter(name for of_unit in labels_of.values() for name in of_unit.elements())
    lacking = {split: {name: share * count for name, count in counts.items()} for split, share in fractions.items()}
    split_of: dict[tuple[bool, str], str] = {}
    while left:
        rarest = min((count, name) for name, count in counts.items() if count)[1]
        for unit in [unit for unit in left if labels_of[unit][rarest]]:
            split = max(fractions, key=lambda name: (lacking[name][rarest], sum(lacking[name].values())))
            for name, count in labels_of[unit].items():
                lacking[split][name] -= count
            counts.subtract(labels_of[unit])
            split_of[unit] = split
        left = [unit for unit in left if unit not in split_of]
    return split_of


def _by_class(
    records: Sequence[Record], classes: Mapping[str, int | tuple[str, ...]], *, seed: int, train: str
) -> list[str | None]:
    """Assigns classes by name, or by a draw if the settings have a number; unlabelled samples train."""
    if any(record.labels is not None for record in records):
        raise UserError("data.splits has the kind class, and images may have several labels: use the kind fraction")
    known = {record.class_name for record in records if record.class_name is not None}
    split_of: dict[str | None, str] = {None: train} if train in classes else {}
    for split, wanted in classes.items():
        for name in wanted if not isinstance(wanted, int) else ():
            if name not in known:
                raise UserError(
                    f"data.splits.classes.{split} has {name!r}, not a class of the source{did_you_mean(name, known)}"
                )
            if name in split_of:
                raise UserError(f"data.splits.classes has {name!r} in {split_of[name]!r} and in {split!r}: keep one")
            split_of[name] = split
    free = sorted(known - set(split_of), key=lambda name: draw(seed, name))
    num_wanted = sum(wanted for wanted in classes.values() if isinstance(wanted, int))
    if num_wanted > len(free):
        raise UserError(
            f"data.splits.classes needs {num_wanted} classes, and the source has {len(free)}: reduce the numbers"
        )
    places = [split for split, wanted in classes.items() if isinstance(wanted, int) for _ in range(wanted)]
    split_of |= dict(zip(free, places, strict=False))
    return [split_of.get(record.class_name) for record in records]


def _by_file(records: Sequence[Record], listed: Mapping[str, Sequence[str]]) -> Assignment:
    """Assigns listed samples; a line is a path, with or without suffix, or a key, as in `match_lines`."""
    number_of: dict[str, int] = {}
    for i, (record, key) in enumerate(zip(records, keys_of([record.name for record in records]), strict=True)):
        for name in (record.name, record.name.rpartition(".")[0], key):
            number_of.setdefault(name, i)
    split_of: list[str | None] = [None] * len(records)
    missing: list[tuple[str, str]] = []
    for split, lines in listed.items():
        numbers, unknown, prefix = match_lines(lines, number_of)
        if lines and not numbers:
            raise UserError(
                f"data.splits.files.{split} lists {len(lines)} names, and none is a sample of the source, such as "
                f"{lines[0]!r}: give paths relative to the source, such as {records[0].name!r}"
            )
        if prefix:
            logger.info(f"data.splits.files.{split}: the prefix {prefix!r} of the names is ignored")
        for name, number in numbers:
            earlier = split_of[number]
            if earlier not in (None, split):
                raise UserError(f"data.splits.files lists {name!r} for {earlier!r} and for {split!r}: keep one")
            split_of[number] = split
        missing += [(name, f"listed for split {split!r}, and the source has no such sample") for name in unknown]
    return Assignment(split_of, missing)
