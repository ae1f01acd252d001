"""Tar archives, byte for byte: writing them the same way every time, and listing where members are.

A tar is a sequence of members, each a header of 512 bytes (more for long names) and its data padded to 512, and ends in
two blocks of zeros. Nothing of the writer enters a header: no time, owner or host.
"""

import hashlib
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from dpkd.launch.heartbeat import pulse

BLOCK = 512


@dataclass(frozen=True, slots=True)
class Member:
    """Where the data of one member is in its tar."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Listing:
    """The whole members of a tar, in order, and what is wrong with its end, if anything."""

    members: Sequence[Member]
    refused: Sequence[tuple[str, str]]
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
    """Lists a tar by its headers alone; one that was cut or damaged gives the members before that, and the fault.

    The standard library's own walk believes negative sizes, goes as deep as headers of headers do, and reads headers of
    any length. Only its reading of a single block is used.
    """
    members: list[Member] = []
    refused: list[tuple[str, str]] = []
    at, extended = 0, _Extended()
    while True:
        pulse()  # a read each, where it is remote
        file.seek(at)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            return Listing(members, refused, f"the tar is cut short: it ends at byte {size_bytes} without an end mark")
        if not any(block):
            return Listing(members, refused, None)
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            name, start, size = extended.name or info.name, at + BLOCK, _size(info, extended)
            if start + size > size_bytes:
                fault = f"the tar is cut short: it ends at byte {size_bytes} inside a member"
                return Listing(members, refused, fault)
            if info.type in _HEADERS:
                extended = _read_header(info.type, file, start, size, before=extended)
            else:
                reason = "it is stored with holes (sparse)" if extended.sparse else _REFUSED.get(info.type)
                if reason is not None:
                    refused.append((name, f"{reason}: store the file itself in the tar"))
                elif info.isreg():
                    members.append(Member(name, start, size))
                extended = _Extended()
        except (tarfile.TarError, ValueError) as error:
            return Listing(members, refused, f"the tar is damaged at byte {at}: {error}")
        at = start + size + -size % BLOCK


@dataclass(frozen=True)
class _Extended:
    """What extended headers say of the member that follows them."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False


MAX_HEADER_BYTES = 1 << 20
"""Longer headers of long names and attributes are taken for damage."""

_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_REFUSED = {
    tarfile.LNKTYPE: "it is a link, which is not followed",
    tarfile.SYMTYPE: "it is a link, which is not followed",
    tarfile.CHRTYPE: "it is a device",
    tarfile.BLKTYPE: "it is a device",
    tarfile.FIFOTYPE: "it is a pipe",
    tarfile.GNUTYPE_SPARSE: "it is stored with holes (sparse)",
}


def _size(info: tarfile.TarInfo, extended: _Extended) -> int:
    """Bytes of data after the header, which links, folders and devices have none of whatever they say."""
    if info.type in tarfile.SUPPORTED_TYPES and not info.isreg() and info.type not in _HEADERS:
        return 0
    size = info.size if extended.size is None else extended.size
    if size < 0:
        raise ValueError(f"a member of {size} bytes")
    return size


def _read_header(kind: bytes, file: BinaryIO, start: int, size: int, *, before: _Extended) -> _Extended:
    """What a header of its own says of the member after it; raises ValueError for one that cannot be read."""
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes")
    file.seek(start)
    data = file.read(size)
    if kind == tarfile.GNUTYPE_LONGNAME:
        return replace(before, name=data.partition(b"\0")[0].decode("utf-8", "surrogateescape"))
    if kind in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
        return before
    records = _pax_records(data)
    name = records["path"].decode("utf-8", "surrogateescape") if "path" in records else before.name
    length = int(records["size"]) if "size" in records else before.size
    return _Extended(name, length, sparse=any(key.startswith("GNU.sparse.") for key in records))


def _pax_records(data: bytes) -> dict[str, bytes]:
    """The records of a pax header: length, space, key, =, value and a line break each."""
    records, at = {}, 0
    while at < len(data) and data[at] != 0:
        length = data[at : at + 8].partition(b" ")[0]
        end = at + int(length)
        key, equals, value = data[at + len(length) + 1 : end].partition(b"=")
        if end <= at + len(length) + 1 or end > len(data) or not equals or not value.endswith(b"\n"):
            raise ValueError("a pax header that cannot be read")
        records[key.decode("utf-8", "replace")] = value[:-1]
        at = end
    return records
