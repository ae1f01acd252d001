"""What an expert says of classes: graded attributes, a row a class. A file in, a frozen table out.

YAML (`.yaml`, `.yml`), every scalar taken as its text, so that a class may be called `no` or `00014`:

    attributes:
      border:   [smooth, notched, irregular]     an ordered scale, evenly spaced: 0, 0.5, 1
      pigment:  {none: 0, light: 0.3, dark: 1}   grades with values of their own
      colour:   {one_of: [red, brown, black]}    one or another: three attributes `colour=red`, …, of which one is 1
      symmetry: graded                           a number in [0, 1]
    classes:
      melanoma: {border: irregular, pigment: dark, colour: black, symmetry: 0.1}
      naevus:   {border: smooth, pigment: 0.5, colour: brown, symmetry: 0.9}
      scar:     {border: notched}                what is absent, empty or ~ is not known, and trains nothing

A scale takes the name of one of its grades (this first, where grades are called by numbers) or a number in [0, 1].

CSV (`.csv`): the first column is called `class`, every other is an attribute; a cell is a number in [0, 1] or empty.
Names of grades are for YAML alone: a CSV has no place that says what they are worth. A table of more than 20,000 values
goes into a CSV, as YAML is read within bounds.

Axes: K class, A attribute.
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from dpkd.config import read_yaml
from dpkd.data.sources.records import nearest
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE

GRADED, ONE_OF = "graded", "one_of"
MAX_SHOWN = 12
"""Faults of a file that an error shows."""


@dataclass(frozen=True)
class AttributeTable:
    """Graded attributes of classes, each in [0, 1], NaN where not known."""

    path: str
    names: tuple[str, ...]
    classes: tuple[str, ...]
    value_KA: NDArray[np.float32]

    def rows(self, classes: Sequence[str]) -> NDArray[np.float32]:
        """The rows of these classes, in their order; raises `UserError` that names those which are missing."""
        missing = [name for name in classes if name not in self.classes]
        if missing:
            named = ", ".join(f"{name!r}{nearest(name, self.classes)}" for name in missing[:MAX_SHOWN])
            more = f" and {len(missing) - MAX_SHOWN} more" if len(missing) > MAX_SHOWN else ""
            raise UserError(
                f"data.attributes {self.path} says nothing of {len(missing)} of {len(classes)} classes that are "
                f"trained on: {named}{more}; add a row for each, an empty one where nothing is known"
            )
        place = {name: position for position, name in enumerate(self.classes)}
        return self.value_KA[[place[name] for name in classes]]

    def known(self) -> dict[str, dict[str, float]]:
        """What is known of each class, as plain values by attribute."""
        return {
            name: {
                attribute: round(value, 6)
                for attribute, value in zip(self.names, row_A, strict=True)
                if not math.isnan(value)
            }
            for name, row_A in zip(self.classes, self.value_KA.tolist(), strict=True)
        }


def score_weights(value_KA: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights KA and biases K of classes, `score_K = weight_KA @ logit_A + bias_K` for predicted attribute logits.

    A score is `-Σ_A KL(row ‖ sigmoid(logit))` up to a term that all classes share. Where every value is 0 or 1 that
    is the log-likelihood of direct attribute prediction (Lampert et al. 2014, eq. 2, with even attribute priors); with
    graded values it is largest where the prediction equals the row, while cross-entropy would never choose a middle
    grade. An attribute that is not known of a class counts as of the average class that it is known of.
    """
    exact_KA = value_KA.astype(np.float64)
    entropy_KA = -_x_log_x(exact_KA) - _x_log_x(1 - exact_KA)
    return _filled(exact_KA).astype(np.float32), _filled(entropy_KA).sum(1).astype(np.float32)


def _x_log_x(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(x == 0, 0.0, x * np.log(np.where(x == 0, 1.0, x)))


def _filled(value_KA: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN replaced by the mean of its column, by 0 in a column of NaN alone."""
    known_KA = ~np.isnan(value_KA)
    mean_A = np.where(known_KA, value_KA, 0).sum(0) / known_KA.sum(0).clip(min=1)
    return np.where(known_KA, value_KA, mean_A)


def read_attributes(path: str) -> AttributeTable:
    """Reads the table at a path or fsspec URL; raises `UserError` that names every fault, its value and the way out."""
    suffix = path.rpartition(".")[2].lower()
    readers = {"yaml": _read_yaml, "yml": _read_yaml, "csv": _read_csv}
    if suffix not in readers:
        raise UserError(f"data.attributes {path}: a table of attributes is a .yaml, .yml or .csv file")
    try:
        scales, rows = readers[suffix](storage.read_bytes(path).decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"data.attributes {path} does not exist: give the table of the classes' attributes") from None
    except (*NO_FILE, UnicodeDecodeError, yaml.YAMLError, csv.Error) as error:
        raise UserError(f"data.attributes {path} cannot be read as .{suffix}: {error}") from None
    except ValueError as error:
        raise UserError(f"data.attributes {path}: {error}") from None
    return _table(path, scales, rows)


@dataclass(frozen=True)
class _Scale:
    """One attribute: a number, or the name of a grade."""

    name: str
    grades: Mapping[str, float]

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name,)

    def values(self, text: str) -> tuple[float, ...]:
        if text in self.grades:
            return (self.grades[text],)
        try:
            return (_share(text),)
        except ValueError as error:
            if not self.grades or _is_number(text):
                raise
            known = ", ".join(self.grades)
            raise ValueError(f"{text!r} is no grade{nearest(text, self.grades)} of {known}, nor a number") from error


@dataclass(frozen=True)
class _OneOf:
    """An attribute for each option, of which one holds."""

    name: str
    options: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"{self.name}={option}" for option in self.options)

    def values(self, text: str) -> tuple[float, ...]:
        if text not in self.options:
            raise ValueError(f"{text!r} is none{nearest(text, self.options)} of {', '.join(self.options)}")
        return tuple(float(option == text) for option in self.options)


_Rows = list[tuple[str, dict[str, str]]]
"""(class, attribute -> cell), as the file has them."""


def _table(path: str, scales: Sequence[_Scale | _OneOf], rows: _Rows) -> AttributeTable:
    """Reads the cells; raises `UserError` with all faults."""
    names = tuple(column for scale in scales for column in scale.columns)
    value_KA = np.full((len(rows), len(names)), np.nan, np.float32)
    faults = [f"the attribute {name!r} stands twice" for name in sorted({n for n in names if names.count(n) > 1})]
    named = [name for name, _ in rows]
    faults += [f"the class {name!r} stands twice" for name in sorted({n for n in named if named.count(n) > 1})]
    by_name = {scale.name: scale for scale in scales}
    for row, (class_name, cells) in enumerate(rows):
        for attribute, text in cells.items():
            if attribute not in by_name:
                hint = nearest(attribute, by_name) or f" (declared are {', '.join(by_name)})"
                faults.append(f"{class_name}.{attribute}: no such attribute{hint}")
            elif text not in ("", "~", "null"):
                scale = by_name[attribute]
                start = names.index(scale.columns[0])
                try:
                    value_KA[row, start : start + len(scale.columns)] = scale.values(text)
                except ValueError as error:
                    faults.append(f"{class_name}.{attribute}: {error}")
    if not faults:
        unknown = [scale.name for scale in scales if np.isnan(value_KA[:, names.index(scale.columns[0])]).all()]
        faults += [f"the attribute {name!r} is known of no class: say it of some, or take it out" for name in unknown]
    _refuse(path, faults)
    return AttributeTable(path=path, names=names, classes=tuple(named), value_KA=value_KA)


def _refuse(path: str, faults: Sequence[str]) -> None:
    if faults:
        more = [f"and {len(faults) - MAX_SHOWN} more"] if len(faults) > MAX_SHOWN else []
        lines = "\n  ".join([*faults[:MAX_SHOWN], *more])
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise UserError(f"data.attributes {path} has {count}; mend the file:\n  {lines}")


def _share(text: str) -> float:
    if not _is_number(text):
        raise ValueError(f"{text!r} is no number")
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(f"{text} is out of range: a value is a number from 0 to 1")
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_yaml(text: str) -> tuple[list[_Scale | _OneOf], _Rows]:
    tree = read_yaml(text, scalars_as_text=True)
    if not isinstance(tree, dict) or not {"attributes", "classes"} <= set(tree):
        raise ValueError("a table has the two sections `attributes` and `classes`")
    for key in tree:
        if key not in ("attributes", "classes"):
            raise ValueError(f"no such section {key!r}{nearest(key, ('attributes', 'classes'))}: leave it out")
    for section, what in (("attributes", "an attribute"), ("classes", "a class")):
        if not isinstance(tree[section], dict) or not tree[section]:
            raise ValueError(f"the section `{section}` holds nothing: name {what} with what is known of it")
    rows: _Rows = []
    for name, row in tree["classes"].items():
        cells = {} if row in ("", "~", "null") else row
        if not isinstance(cells, dict) or not all(isinstance(cell, str) for cell in cells.values()):
            raise ValueError(f"the class {name!r} holds {row!r}: write {{attribute: value, …}}, one value each")
        rows.append((name, cells))
    return [_scale(name, declared) for name, declared in tree["attributes"].items()], rows


def _scale(name: str, declared: Any) -> _Scale | _OneOf:
    """What the YAML says an attribute may be; raises `ValueError`."""
    if declared == GRADED:
        return _Scale(name, {})
    if isinstance(declared, dict) and set(declared) == {ONE_OF} and isinstance(declared[ONE_OF], list):
        return _OneOf(name, tuple(_grades(name, declared[ONE_OF])))
    if isinstance(declared, list):
        grades = list(_grades(name, declared))
        return _Scale(name, {grade: position / (len(grades) - 1) for position, grade in enumerate(grades)})
    if isinstance(declared, dict) and all(isinstance(value, str) for value in declared.values()):
        try:
            return _Scale(name, {grade: _share(value) for grade, value in declared.items()})
        except ValueError as error:
            raise ValueError(f"attributes.{name}: {error}") from None
    raise ValueError(
        f"attributes.{name}: {declared!r} declares no attribute: write {GRADED}, a list of grades from least to most, "
        f"{{grade: value, …}}, or {{{ONE_OF}: [option, …]}}"
    )


def _grades(name: str, listed: Sequence[Any]) -> Iterator[str]:
    if len(listed) < 2:
        raise ValueError(f"attributes.{name}: a list has two grades or more, this one {len(listed)}")
    for grade in listed:
        if not isinstance(grade, str) or not grade or listed.count(grade) > 1:
            raise ValueError(f"attributes.{name}: the grade {grade!r} is no name of its own: name each grade once")
        yield grade


def _read_csv(text: str) -> tuple[list[_Scale | _OneOf], _Rows]:
    lines = [
        [cell.strip() for cell in line] for line in csv.reader(io.StringIO(text, newline=""), strict=True) if any(line)
    ]
    if not lines or lines[0][0] != "class":
        found = ", ".join(lines[0]) if lines else "nothing"
        raise ValueError(f"the first column is called 'class', the others by attributes; the first line holds {found}")
    head = lines[0][1:]
    if not head or not all(head):
        raise ValueError("the first line names no attribute, or a column has no name: name each after `class`")
    if len(lines) == 1:
        raise ValueError("there is no class: add a line for each")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(head) + 1 or not line[0]:
            raise ValueError(
                f"row {number} has {len(line)} cells with the class {line[0]!r}; a row names its class and has "
                f"{len(head) + 1} cells"
            )
    repeated = sorted({name for name in head if head.count(name) > 1})
    if repeated:
        raise ValueError(f"the attribute {repeated[0]!r} stands twice")
    return [_Scale(name, {}) for name in head], [
        (line[0], dict(zip(head, line[1:], strict=True))) for line in lines[1:]
    ]
