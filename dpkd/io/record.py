"""Records with a checksum, as JSON or msgpack, and a safe reader of JSON from any source.

{…, "checksum": CRC-32 of the other keys}     of their JSON, sorted and without spaces, or of their msgpack
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE

KEY = "checksum"
MAX_DEPTH = 64
"""Deepest nesting of lists and objects; json, pickle and msgpack each fail at a different depth of some hundreds."""


def parse_json(data: str | bytes) -> Any:
    """The value; raises `ValueError` for invalid JSON, nesting deeper than `MAX_DEPTH`, or half a surrogate pair."""
    too_deep = f"more than {MAX_DEPTH} lists and objects inside one another"
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(too_deep) from None
    left = [(value, 0)]
    while left:
        part, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ValueError(too_deep)
        if isinstance(part, str):
            part.encode()  # fails for half of a surrogate pair, which no file can hold
        elif isinstance(part, dict):
            left += ((child, depth + 1) for pair in part.items() for child in pair)
        elif isinstance(part, list):
            left += ((child, depth + 1) for child in part)
    return value


def checked(content: dict[str, Any]) -> bytes:
    """The object as lines of JSON, with its checksum."""
    plain = json.loads(json.dumps(content))
    return (json.dumps({**plain, KEY: _json_checksum(plain)}, indent=1) + "\n").encode()


def parse_checked(data: bytes) -> dict[str, Any]:
    """The object without its checksum; raises `ValueError` if it is no object or its checksum is missing or wrong."""
    return _verified(parse_json(data), _json_checksum)


def read_record(
    path: Path, *, way_out: str, parse: Callable[[bytes], dict[str, Any]] = parse_checked
) -> dict[str, Any]:
    """A JSON object of a run, empty if the file does not exist; raises `UserError` with the way out if damaged."""
    try:
        return parse(storage.read_bytes(path))
    except FileNotFoundError:
        return {}
    except (*NO_FILE, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {way_out}") from error


def pack_checked(content: dict[str, Any]) -> bytes:
    """The object as msgpack, with its checksum as the last entry."""
    packed: bytes = msgpack.packb({**content, KEY: _msgpack_checksum(content)})
    return packed


def unpack_checked(data: bytes) -> dict[str, Any]:
    """The object from `pack_checked`, with lists as tuples; raises `ValueError` if it is damaged."""
    try:
        return _verified(msgpack.unpackb(data, use_list=False), _msgpack_checksum)
    except (TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"not a packed record: {error!r}") from error


def _verified(content: Any, checksum: Callable[[dict[str, Any]], int]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError("it is not an object")  # noqa: TRY004 (a fault of the file)
    if content.pop(KEY, None) != checksum(content):
        raise ValueError("its checksum is wrong: it was changed since it was written")
    return content


def _json_checksum(plain: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def _msgpack_checksum(plain: dict[str, Any]) -> int:
    return zlib.crc32(msgpack.packb(plain))
