"""Parses text of other systems, by the same rules for every source: encodings, lines, cells, labels and paths."""

import codecs
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
MAX_LABEL_LENGTH = 1000
MISSING = frozenset(
    {
        "", "nan", "-nan", "NaN", "-NaN", "None", "null", "NULL", "NA", "N/A", "n/a", "<NA>", "#NA", "#N/A", "#N/A N/A",
        "NaT", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN",
    }
)  # fmt: skip
"""Words for a missing value: all words that pandas reads or writes as missing."""


def decode_text(data: bytes) -> str:
    """The text without its byte order mark: UTF-8, or UTF-16 by the mark; raises `UnicodeDecodeError`."""
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_utf16 else "utf-8-sig")


def split_lines(data: bytes) -> list[str]:
    r"""The non-empty lines, without white space around them; only \n and \r\n end a line."""
    return [line.strip() for line in decode_text(data).split("\n") if line.strip()]


def read_lines(path: str, *, key: str) -> list[str]:
    """The lines of a text file, as `split_lines` gives them; raises `UserError` with the settings key."""
    try:
        return split_lines(storage.read_bytes(path))
    except (*NO_FILE, UnicodeDecodeError) as error:
        raise UserError(f"{key}={path} cannot be read as text: {error}; give a file with one line a sample") from error


def cell_value(cell: Any) -> Any:
    """The cell as a JSON value; None if it is empty, NaN or a word for a missing value."""
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", "surrogateescape")
    if isinstance(cell, str):
        return None if cell.strip() in MISSING else cell
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    return cell if isinstance(cell, int | float | bool | list | dict) else cell_value(str(cell))


def cell_name(cell: Any) -> str | None:
    """The cell as the name of a file, class, group or split, None if missing; whole floats become integers."""
    value = cell_value(cell)
    if value is None:
        return None
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    return re.sub(r"^(-?\d+)\.0*$", r"\1", text)


def class_of_label(label: Any) -> str | None:
    """The class name of a label, None for -1 or a missing label; raises `ValueError` for a label that is not a name."""
    label = cell_value(label)
    if label is None:
        return None
    if not isinstance(label, str | int | float) or (isinstance(label, float) and not label.is_integer()):
        raise ValueError(f"label {reprlib.repr(label)} is neither a name nor a whole number")
    text = cell_name(label) or ""
    if len(text) > MAX_LABEL_LENGTH:
        raise ValueError(f"the label has {len(text)} characters, more than {MAX_LABEL_LENGTH}")
    if not re.fullmatch(r"-\d+", text):
        return text
    if int(text) < -1:
        raise ValueError(
            f"label {text} is out of range: use a name, a number from 0, or -1 or an empty cell for no label"
        )
    return None if int(text) == -1 else "0"


def is_image(name: str) -> bool:
    """True for the suffixes of images."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def key_of(name: str) -> str:
    """A WebDataset key for a name: the path without extension; dots and unsafe characters are replaced."""
    text = name.encode("utf-8", "backslashreplace").decode("utf-8").split("://")[-1]
    text = text.removeprefix("***@").removesuffix("?***")  # the mask of secrets
    parts = [part for part in PurePosixPath(text).parts if part not in ("/", ".")] or ["_"]
    if is_image(parts[-1]):
        parts[-1] = parts[-1].rpartition(".")[0]
    parts = ["__" if part == ".." else part for part in parts]
    parts[-1] = parts[-1].replace(".", "_")
    return re.sub(r"[\x00-\x1f\x7f\\]", "_", "/".join(parts))


class Listed(NamedTuple):
    """The samples named by the lines of a list."""

    numbers: list[tuple[str, int]]
    """(line, number of the sample)."""
    unknown: list[str]
    prefix: str
    """The common prefix removed from longer paths."""


def match_lines(lines: Sequence[str], number_of: Mapping[str, int]) -> Listed:
    r"""Finds the sample of each line by path or key.

    A line may start with `./`, contain backslashes, and end with a label (`a/0.jpg 3`). It may start with folders that
    are not part of the names, if all lines with such folders have the same ones.
    """
    by_name: dict[str, int] = {}
    by_longer_path: dict[str, tuple[str, int]] = {}
    for line in lines:
        without_label = re.sub(r"[\s,;]+\S+$", "", line)
        plain = [re.sub(r"^(\./+)+", "", text.replace("\\", "/")) for text in (line, without_label)]
        number = next((number_of[name] for name in (line, *plain, *map(key_of, plain)) if name in number_of), None)
        if number is not None:
            by_name[line] = number
            continue
        for path in plain:
            for slash in re.finditer("/", path):
                shorter = path[slash.end() :]
                number = number_of.get(shorter, number_of.get(key_of(shorter)))
                if number is not None:
                    by_longer_path.setdefault(line, (path[: slash.end()], number))
    prefixes = {prefix for prefix, _ in by_longer_path.values()}
    if len(prefixes) == 1:
        by_name |= {line: number for line, (_, number) in by_longer_path.items()}
    return Listed(
        numbers=[(line, by_name[line]) for line in lines if line in by_name],
        unknown=[line for line in lines if line not in by_name],
        prefix=prefixes.pop() if len(prefixes) == 1 else "",
    )
