"""Writes deterministic tar archives, and lists the positions of members.

A tar is a sequence of members and two blocks of zeros. A member is a header of 512 bytes (more for long names) and its
data, padded to 512. A header has no time, owner or host of the writer.
"""

import hashlib
import tarfile
from typing import BinaryIO, NamedTuple, cast

from dpkd.launch.heartbeat import pulse

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20
"""Longer headers (of long names and attributes) count as damage."""


class Member(NamedTuple):
    """The position of one member's data in its tar."""

    name: str
    offset: int
    size: int


class Listing(NamedTuple):
    """The complete members of a tar, in order, and the fault at its end, if any."""

    members: list[Member]
    refused: list[tuple[str, str]]
    """(name, reason) of members that are not regular files; folders are skipped."""
    fault: str | None


class TarWriter:
    """Writes members to a binary file; the same names and data give the same bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of all written bytes."""
        return self._digest.hexdigest()

    def add(self, name: str, data: bytes) -> Member:
        """Appends a member; returns the position of its data."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o444, 0
        self._write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
        member = Member(name, self.size_bytes, len(data))
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return member

    def finish(self) -> None:
        """Writes the end mark."""
        self._write(bytes(2 * BLOCK))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)


def list_members(file: BinaryIO, *, size_bytes: int) -> Listing:
    """Lists a tar by its headers; a truncated or damaged tar gives the members before the damage, and the fault."""
    members: list[Member] = []
    refused: list[tuple[str, str]] = []
    end, cause = 0, "it has no end mark"
    short_reads = cast(BinaryIO, _ShortReads(file))
    try:
        with tarfile.open(fileobj=short_reads, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                pulse()  # each member of a remote tar needs a read
                tar.members.clear()  # type: ignore[attr-defined]  # the library would keep all of them
                plain = info.isreg() and not info.issparse()
                if info.size < 0 or (plain and info.offset_data + info.size > size_bytes):
                    raise ValueError(f"a member of {info.size} bytes ends outside the tar")
                if plain:
                    members.append(Member(info.name, info.offset_data, info.size))
                elif not info.isdir():
                    reason = "it is a link, a device or a sparse file: store a regular file in the tar"
                    refused.append((info.name, reason))
                end = tar.offset
            file.seek(tar.offset)  # the library stops at a damaged header or the end of the file without an error
            mark = file.read(BLOCK)
        if len(mark) == BLOCK and not any(mark):
            return Listing(members, refused, None)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        cause = str(error)
    return Listing(members, refused, f"the tar is cut short or damaged after byte {end} of {size_bytes}: {cause}")


class _ShortReads:
    """A file that reads tar headers and refuses the large lengths of a damaged header."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError(f"a header has {size} bytes")
        return self._file.read(size)
