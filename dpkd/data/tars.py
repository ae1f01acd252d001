"""Tar archives, byte for byte: writing them the same way every time, and listing what stands where.

A tar is a sequence of members, each a header of 512 bytes (more for long names) and its data padded to 512, and ends in
two blocks of zeros. Nothing of the writer enters a header: no time, owner or host.
"""

import hashlib
import tarfile
from dataclasses import dataclass
from typing import BinaryIO

from dpkd.errors import UserError

BLOCK = 512


@dataclass(frozen=True, slots=True)
class Member:
    """Where the data of one member stands in its tar."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Listing:
    """The whole members of a tar, in order, and what is wrong with its end, if anything."""

    members: tuple[Member, ...]
    fault: str | None


class TarWriter:
    """Writes members to a binary file; the same names and data give the same bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of all that was written."""
        return self._digest.hexdigest()

    def add(self, name: str, data: bytes) -> Member:
        """Appends a member; returns where its data stands."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o444, 0
        header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
        self._write(header)
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
    """Lists a tar by its headers alone; one that was cut or damaged gives the members before that, and the fault."""
    members: list[Member] = []
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                end = info.offset_data + info.size + -info.size % BLOCK
                if info.isfile() and info.offset_data + info.size <= size_bytes:
                    members.append(Member(info.name, info.offset_data, info.size))
    except UserError:  # the storage's, which says nothing of the tar
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        return Listing(tuple(members), f"the tar is cut short or damaged at byte {min(end, size_bytes)}: {error}")
    if end > size_bytes:
        return Listing(tuple(members), f"the tar is cut short: it ends at byte {size_bytes} inside a member")
    file.seek(end)
    mark = file.read(BLOCK)
    if len(mark) < BLOCK:
        return Listing(tuple(members), f"the tar is cut short: it ends at byte {size_bytes} without an end mark")
    if any(mark):
        return Listing(tuple(members), f"the tar is damaged at byte {end}: no header can be read there")
    return Listing(tuple(members), None)
