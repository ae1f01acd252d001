"""The one checksummed record: a JSON object that tells whether it was changed since it was written.

{…, "checksum": CRC-32 of the other keys, as `json.dumps` writes them sorted and without spaces}
"""

import json
import zlib
from typing import Any

import msgpack

from dpkd.io.untrusted import parse_json

KEY = "checksum"


def checked(content: dict[str, Any]) -> bytes:
    """The object as lines of JSON, with its checksum."""
    plain = json.loads(json.dumps(content))
    return (json.dumps({**plain, KEY: _checksum(plain)}, indent=1) + "\n").encode()


def parse_checked(data: bytes) -> dict[str, Any]:
    """The object without its checksum; raises ValueError where it is none, or its checksum is missing or wrong."""
    content = parse_json(data)
    if not isinstance(content, dict):
        raise ValueError("it is no object")  # noqa: TRY004 (a fault of the file)
    if content.pop(KEY, None) != _checksum(content):
        raise ValueError("its checksum is wrong: it was changed since it was written")
    return content


def pack_checked(content: dict[str, Any]) -> bytes:
    """The object as msgpack, with a CRC-32 of all of it as its last entry."""
    packed: bytes = msgpack.packb({**content, KEY: zlib.crc32(msgpack.packb(content))})
    return packed


def unpack_checked(data: bytes) -> dict[str, Any]:
    """The object given to `pack_checked`, lists as tuples; raises ValueError where it is damaged."""
    try:
        content: dict[str, Any] = msgpack.unpackb(data, use_list=False)
        checksum = content.pop(KEY)
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise ValueError(f"not a packed record: {error!r}") from error
    if checksum != zlib.crc32(msgpack.packb(content)):
        raise ValueError("its checksum is wrong: it was changed since it was written")
    return content


def _checksum(plain: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())
