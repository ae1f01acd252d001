"""JSON objects with a checksum of their own: a changed bit shows, also where what it makes would read well.

    {…, "checksum": CRC-32 of the other keys, as `json.dumps` writes them sorted and without spaces}

What an earlier dpkd wrote has no checksum, and is read as it is.
"""

import json
import zlib
from typing import Any

from dpkd.io.untrusted import parse_json

KEY = "checksum"


def checked(content: dict[str, Any]) -> bytes:
    """The object as lines of JSON, with its checksum."""
    plain = json.loads(json.dumps(content))
    return (json.dumps({**plain, KEY: _checksum(plain)}, indent=1) + "\n").encode()


def parse_checked(data: bytes) -> dict[str, Any]:
    """The object without its checksum; raises ValueError where it is none, or another than the checksum says."""
    content = parse_json(data)
    if not isinstance(content, dict):
        raise ValueError("it is no object")  # noqa: TRY004 (a fault of the file)
    checksum = content.pop(KEY, None)
    if checksum is not None and checksum != _checksum(content):
        raise ValueError("its checksum is wrong: it was changed since it was written")
    return content


def _checksum(plain: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())
