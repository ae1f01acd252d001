"""JSON that somebody else may have written, read so that any bytes give plain values or a ValueError."""

import json
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 64
"""Lists and objects inside one another; json, pickle and msgpack each give up at some hundreds, and not at the same."""


def parse_json(data: str | bytes) -> Any:
    """The value; raises ValueError for what is not JSON, nests deeper than `MAX_DEPTH`, or holds half a character."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} lists and objects inside one another") from None
    for part, depth in _parts(value):
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} lists and objects inside one another")
        if isinstance(part, str):
            part.encode()  # half of a surrogate pair, which no file can hold
    return value


def _parts(value: Any) -> Iterator[tuple[Any, int]]:
    """(value, depth) of everything in it, keys too; without recursion."""
    left = [(value, 0)]
    while left:
        part, depth = left.pop()
        yield part, depth
        if isinstance(part, dict):
            left += ((each, depth + 1) for pair in part.items() for each in pair)
        elif isinstance(part, list):
            left += ((each, depth + 1) for each in part)
