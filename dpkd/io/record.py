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
_PACKED_KEY: bytes = msgpack.packb(KEY)
_CHANGED = "its checksum is wrong: it was changed since it was written"
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
    content = parse_json(data)
    if not isinstance(content, dict):
        raise ValueError("it is not an object")  # noqa: TRY004 (a fault of the file)
    if content.pop(KEY, None) != _json_checksum(content):
        raise ValueError(_CHANGED)
    return content


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
    """The object of at most 14 keys as msgpack, with its checksum as the last entry."""
    assert len(content) < 15, "one byte holds the number of keys"
    plain: bytes = msgpack.packb(content)
    return bytes([plain[0] + 1]) + plain[1:] + _checksum_entry(plain)


def unpack_checked(data: bytes) -> dict[str, Any]:
    """The object from `pack_checked`, with lists as tuples; raises `ValueError` if it is damaged."""
    end = data.rfind(_PACKED_KEY)
    plain = bytes([data[0] - 1]) + data[1:end] if end > 0 and 0x80 < data[0] < 0x90 else b""
    if data[end:] != _checksum_entry(plain):
        raise ValueError(_CHANGED)
    try:
        content: dict[str, Any] = msgpack.unpackb(plain, use_list=False)
    except (TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"not a packed record: {error!r}") from error
    return content


def _checksum_entry(plain: bytes) -> bytes:
    entry: bytes = _PACKED_KEY + msgpack.packb(zlib.crc32(plain))
    return entry


def _json_checksum(plain: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())
