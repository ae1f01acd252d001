"""One sample as it is read from its shard."""

from typing import Any, NamedTuple

from dpkd.io.record import parse_json


class Sample(NamedTuple):
    """One sample as stored in its shard."""

    key: str
    image: bytes
    json: bytes
    given: dict[str, bytes]
    """The expert's maps: image files by `given_name`."""

    @property
    def meta(self) -> dict[str, Any]:
        """The content of the JSON; training does not look at it."""
        meta: dict[str, Any] = parse_json(self.json)
        return meta


class Unreadable(NamedTuple):
    """A sample whose bytes are missing or damaged, and the reason."""

    key: str
    reason: str
