"""Ways to damage a file, and to tell whether a message names it."""

import ctypes
import os
import random
from collections.abc import Callable
from pathlib import Path

CAN_OVERRIDE = (1, 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, with which root reads and writes whatever the permission bits say."""
READ_ONLY = 0o555


def flip(data: bytes, draws: random.Random) -> bytes:
    """One bit the other way."""
    at = draws.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << draws.randrange(8))]) + data[at + 1 :]


def zero(data: bytes, draws: random.Random) -> bytes:
    """Up to 512 bytes as a disk that lost them gives them back."""
    at = draws.randrange(len(data))
    return data[:at] + bytes(len(data[at : at + 512])) + data[at + 512 :]


CONTENT: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncate": lambda data, draws: data[: draws.randrange(len(data))],
    "cut a byte": lambda data, _: data[:-1],
    "empty": lambda _, __: b"",
    "flip a bit": flip,
    "zero a block": zero,
    "append": lambda data, draws: data + draws.randbytes(100),
}
"""Faults of what a file holds."""


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def make_read_only(path: Path) -> None:
    path.chmod(0o444)
    path.parent.chmod(READ_ONLY)


PLACE: dict[str, Callable[[Path], None]] = {
    "delete": Path.unlink,
    "folder": make_folder,
    "dangling link": make_dangling,
    "unreadable": lambda path: path.chmod(0),
    "read-only": make_read_only,
}
"""Faults of where a file stands."""
FAULTS = (*CONTENT, *PLACE, "swap", "stale")


def damage(path: Path, fault: str, *, draws: random.Random, others: list[Path], stale: list[Path]) -> list[Path]:
    """Damages a file; the files it touched, none where nothing differs that it could be swapped with or replaced by."""
    data = path.read_bytes()
    if fault in PLACE:
        PLACE[fault](path)
    elif fault in CONTENT:
        if not data:
            return []
        path.write_bytes(CONTENT[fault](data, draws))
    else:
        found = [
            each for each in (others if fault == "swap" else stale) if each.is_file() and each.read_bytes() != data
        ]
        if not found:
            return []
        other = draws.choice(found)
        path.write_bytes(other.read_bytes())
        if fault == "swap":
            other.write_bytes(data)
            return [path, other]
    return [path]


def obey_permissions() -> None:
    """Takes from this process, where it is root's, the right to read and write what permissions forbid."""
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    for capability in CAN_OVERRIDE:
        sets[0] &= ~(1 << capability)
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def names_file(printed: str, path: Path) -> bool:
    """Whether what was printed names the file, its checkpoint, or another file of its folder that is read-only."""
    if path.parent.exists() and path.parent.stat().st_mode & 0o777 == READ_ONLY and f"write {path.parent}/" in printed:
        return True
    steps = [part for part in path.parts if part.startswith("step-")]
    return path.name in printed or any(step in printed for step in steps)
