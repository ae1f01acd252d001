"""Tar archives, byte for byte: writing them the same way every time, and listing where members are.

A tar is a sequence of members, each a header of 512 bytes (more for long names) and its data padded to 512, and ends in
two blocks of zeros. Nothing of the writer enters a header: no time, owner or host.
"""

import hashlib
import tarfile
from typing import BinaryIO, NamedTuple, cast

from dpkd.launch.heartbeat import pulse

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20
"""Longer headers of long names and attributes are taken for damage."""


class Member(NamedTuple):
    """Where the data of one member is in its tar."""

    name: str
    offset: int
    size: int


class Listing(NamedTuple):
    """The whole members of a tar, in order, and what is wrong with its end, if anything."""

    members: list[Member]
    refused: list[tuple[str, str]]
    """(name, reason) of members that are no plain files; folders are passed over."""
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
        """Appends a member; returns where its data is."""
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
    """Lists a tar by its headers alone; one that was cut or damaged gives the members before that, and the fault."""
    members: list[Member] = []
    refused: list[tuple[str, str]] = []
    end, cause = 0, "it has no end mark"
    short_reads = cast(BinaryIO, _ShortReads(file))
    try:
        with tarfile.open(fileobj=short_reads, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                pulse()  # a read for each member where the tar is remote
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                plain = info.isreg() and not info.issparse()
                if info.size < 0 or (plain and info.offset_data + info.size > size_bytes):
                    raise ValueError(f"a member of {info.size} bytes does not end inside it")
                if plain:
                    members.append(Member(info.name, info.offset_data, info.size))
                elif not info.isdir():
                    reason = (
                        "it is a link, a device or a sparse file, which is not read: store the file itself in the tar"
                    )
                    refused.append((info.name, reason))
                end = tar.offset
            file.seek(tar.offset)  # the library takes a damaged header, and the end of the file, for the end of the tar
            mark = file.read(BLOCK)
        if len(mark) == BLOCK and not any(mark):
            return Listing(members, refused, None)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        cause = str(error)
    return Listing(members, refused, f"the tar is cut short or damaged after byte {end} of {size_bytes}: {cause}")


class _ShortReads:
    """A file that gives a header of a tar and refuses the lengths that a damaged one asks for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        return self._file.read(size)
