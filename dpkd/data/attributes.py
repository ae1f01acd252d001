"""Reads an expert's table of graded attributes, one row a class.

YAML (`.yaml`, `.yml`). Every scalar is read as text, so a class may be called `no` or `00014`:

    attributes:
      border:   [smooth, notched, irregular]     an ordered scale, evenly spaced: 0, 0.5, 1
      pigment:  {none: 0, light: 0.3, dark: 1}   grades with explicit values
      colour:   {one_of: [red, brown, black]}    three attributes `colour=red`, …; exactly one is 1
      symmetry: graded                           a number in [0, 1]
    classes:
      melanoma: {border: irregular, pigment: dark, colour: black, symmetry: 0.1}
      naevus:   {border: smooth, pigment: 0.5, colour: brown, symmetry: 0.9}
      scar:     {border: notched}                an absent value, an empty one or ~ is unknown and trains nothing

The value of a scale is the name of a grade or a number in [0, 1]. If it is both, it is the name.

CSV (`.csv`). The first column is called `class`; every other column is an attribute. A cell is a number in [0, 1] or
empty. A CSV cannot define named grades. A table of more than 20,000 values must be a CSV, because the YAML reader has
limits.

Axes: K class, A attribute.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from dpkd.config import read_yaml
from dpkd.errors import UserError, did_you_mean
from dpkd.io import storage
from dpkd.io.errors import NO_FILE

MAX_SHOWN = 12
"""Maximum number of faults that an error lists."""
_UNKNOWN = ("", "~", "null")
"""Cells that mean an unknown value."""


@dataclass(frozen=True)
class AttributeTable:
    """Graded attributes of classes, each in [0, 1], NaN if unknown."""

    path: str
    names: tuple[str, ...]
    classes: tuple[str, ...]
    value_KA: NDArray[np.float32]

    def rows(self, classes: Sequence[str]) -> NDArray[np.float32]:
        """The rows of these classes, in the same order; raises `UserError` with the names of missing classes."""
        row_of = {name: row for row, name in enumerate(self.classes)}
        if missing := [name for name in classes if name not in row_of]:
            named = ", ".join(f"{name!r}{did_you_mean(name, self.classes)}" for name in missing[:MAX_SHOWN])
            more = f" and {len(missing) - MAX_SHOWN} more" if len(missing) > MAX_SHOWN else ""
            raise UserError(
                f"data.attributes {self.path} lacks {len(missing)} of {len(classes)} training classes: {named}{more}; "
                "add a row for each; leave the row empty if nothing is known"
            )
        return self.value_KA[[row_of[name] for name in classes]]

    def known(self) -> dict[str, dict[str, float]]:
        """The known values as plain floats: class -> attribute -> value."""
        rows = (dict(zip(self.names, row_A, strict=True)) for row_A in self.value_KA.tolist())
        return {
            name: {attribute: round(value, 6) for attribute, value in row.items() if not math.isnan(value)}
            for name, row in zip(self.classes, rows, strict=True)
        }


def score_weights(value_KA: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights KA and biases K of classes, `score_K = weight_KA @ logit_A + bias_K` for predicted attribute logits.

    A score is `-Σ_A KL(row ‖ sigmoid(logit))` up to a term that all classes share. If every value is 0 or 1, it is the
    log-likelihood of direct attribute prediction (Lampert et al. 2014, eq. 2, with even attribute priors). If values
    are graded, the row equal to the prediction scores highest; cross-entropy would never choose a middle grade. For an
    unknown value, the term is the mean over the classes with a known value.
    """

    def filled(table_KA: NDArray[np.float64]) -> NDArray[np.float64]:
        """NaN replaced by the mean of its column, by 0 in a column of NaN alone."""
        known_KA = ~np.isnan(table_KA)
        mean_A = np.where(known_KA, table_KA, 0).sum(0) / known_KA.sum(0).clip(min=1)
        return np.where(known_KA, table_KA, mean_A)

    exact_KA = value_KA.astype(np.float64)
    x_log_x_KA, rest_KA = (
        np.where(x == 0, 0.0, x * np.log(np.where(x == 0, 1.0, x))) for x in (exact_KA, 1 - exact_KA)
    )
    entropy_KA = -x_log_x_KA - rest_KA
    return filled(exact_KA).astype(np.float32), filled(entropy_KA).sum(1).astype(np.float32)


def read_attributes(path: str) -> AttributeTable:
    """Reads the table at a path or fsspec URL; raises `UserError` that lists the faults with their values."""
    suffix = path.rpartition(".")[2].lower()
    readers = {"yaml": _read_yaml, "yml": _read_yaml, "csv": _read_csv}
    if suffix not in readers:
        raise UserError(f"data.attributes {path} has another suffix: give a .yaml, .yml or .csv file")
    try:
        attributes, rows = readers[suffix](storage.read_bytes(path).decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"data.attributes {path} does not exist: give the table of the classes' attributes") from None
    except (*NO_FILE, UnicodeDecodeError, yaml.YAMLError, csv.Error) as error:
        raise UserError(f"data.attributes {path} cannot be read as .{suffix}: {error}") from None
    except ValueError as error:
        raise UserError(f"data.attributes {path}: {error}") from None
    columns = [column for attribute in attributes for column in attribute.columns]
    classes = [name for name, _ in rows]
    value_KA = np.full((len(rows), len(columns)), np.nan, np.float32)
    faults = [f"the attribute {name!r} is given twice" for name, count in Counter(columns).items() if count > 1]
    faults += [f"the class {name!r} is given twice" for name, count in Counter(classes).items() if count > 1]
    by_name = {attribute.name: attribute for attribute in attributes}
    for row_A, (class_name, cells) in zip(value_KA, rows, strict=True):
        for name, text in cells.items():
            try:
                if name not in by_name:
                    raise ValueError(
                        f"no such attribute{did_you_mean(name, by_name)} (declared are {', '.join(by_name)})"
                    )
                if text not in _UNKNOWN:
                    row_A[[columns.index(column) for column in by_name[name].columns]] = by_name[name].values(text)
            except ValueError as error:
                faults.append(f"{class_name}.{name}: {error}")
    if not faults:
        faults = [
            f"the attribute {attribute.name!r} has no known value: give one for some class, or remove it"
            for attribute in attributes
            if np.isnan(value_KA[:, columns.index(attribute.columns[0])]).all()
        ]
    if faults:
        more = [f"and {len(faults) - MAX_SHOWN} more"] if len(faults) > MAX_SHOWN else []
        lines = "\n  ".join([*faults[:MAX_SHOWN], *more])
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(f"data.attributes {path} has {count}; correct the file:\n  {lines}")
    return AttributeTable(path=path, names=tuple(columns), classes=tuple(classes), value_KA=value_KA)


@dataclass(frozen=True)
class _Attribute:
    """One attribute of the file: its columns and its allowed cells."""

    name: str
    columns: tuple[str, ...]
    grades: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Name of a grade or option -> the value in each column."""
    takes_numbers: bool = True

    def values(self, text: str) -> tuple[float, ...]:
        """The value in each column; raises `ValueError`."""
        if text in self.grades:
            return self.grades[text]
        try:
            number = float(text)
        except ValueError:
            number = None
        if number is None or not self.takes_numbers:
            near = f"grade{did_you_mean(text, self.grades)} of {', '.join(self.grades)}" if self.grades else "number"
            raise ValueError(f"{text!r} is not a {near}")
        if not 0 <= number <= 1:
            raise ValueError(f"{text} is out of range: give a number from 0 to 1")
        return (number,)


_Table = tuple[list[_Attribute], list[tuple[str, dict[str, str]]]]
"""The attributes, and (class, attribute -> cell) of each row."""


def _read_yaml(text: str) -> _Table:
    tree = read_yaml(text, scalars_as_text=True)
    sections = tree if isinstance(tree, dict) else {}
    if set(sections) != {"attributes", "classes"}:
        raise ValueError(f"the sections must be `attributes` and `classes`, and are {list(sections) or 'none'}")
    for key, section in sections.items():
        if not isinstance(section, dict) or not section:
            raise ValueError(f"the section `{key}` is empty: list the {key}, each with its values")
    rows: list[tuple[str, dict[str, str]]] = []
    for name, row in tree["classes"].items():
        cells = {} if row in _UNKNOWN else row
        if not isinstance(cells, dict) or not all(isinstance(cell, str) for cell in cells.values()):
            raise ValueError(
                f"the class {name!r} has {row!r}: write {{attribute: value, …}}, one value for each attribute"
            )
        rows.append((name, cells))
    return [_declared(name, value) for name, value in tree["attributes"].items()], rows


def _declared(name: str, value: Any) -> _Attribute:
    """The attribute that the YAML declares; raises `ValueError`."""
    plain = _Attribute(name, (name,))
    if value == "graded":
        return plain
    if isinstance(value, dict) and all(isinstance(number, str) for number in value.values()):
        try:
            return replace(plain, grades={grade: plain.values(number) for grade, number in value.items()})
        except ValueError as error:
            raise ValueError(f"attributes.{name}: {error}") from None
    one_of = isinstance(value, dict) and list(value) == ["one_of"]
    listed = value["one_of"] if one_of else value
    names = {grade for grade in listed if isinstance(grade, str) and grade} if isinstance(listed, list) else set()
    if len(names) < 2 or len(names) < len(listed):
        raise ValueError(
            f"attributes.{name}: {value!r} is not a declaration: write graded, a list of two or more different grades "
            "(least to most), {grade: value, …}, or {one_of: [option, …]}"
        )
    if one_of:
        options = {option: tuple(float(option == other) for other in listed) for option in listed}
        return _Attribute(name, tuple(f"{name}={option}" for option in listed), options, takes_numbers=False)
    return replace(plain, grades={grade: (place / (len(listed) - 1),) for place, grade in enumerate(listed)})


def _read_csv(text: str) -> _Table:
    lines = [
        [cell.strip() for cell in line] for line in csv.reader(io.StringIO(text, newline=""), strict=True) if any(line)
    ]
    head = lines[0] if lines else ["nothing"]
    if head[0] != "class" or len(head) == 1 or not all(head):
        raise ValueError(f"the first line must be 'class' and the attribute names, and is {', '.join(head)}")
    if len(lines) == 1:
        raise ValueError("the table has no classes: add a line for each class")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(head) or not line[0]:
            raise ValueError(
                f"row {number} has {len(line)} cells and the class {line[0]!r}: write {len(head)} cells, with a class "
                "name"
            )
    rows = [(line[0], dict(zip(head[1:], line[1:], strict=True))) for line in lines[1:]]
    return [_Attribute(name, (name,)) for name in head[1:]], rows
