"""What the fuzz tests share: any bytes, damaged copies of real bytes, and a child process with little memory.

The profiles `quick`, `nightly` and `fuzz` of Hypothesis stand in tests/conftest.py; `make fuzz` takes the long one.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from dpkd.errors import StorageError, UserError

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


@st.composite
def damaged(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A real file after up to four changes: bytes flipped, cut out, put in, doubled, or set to an extreme."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        at, count = draw(st.integers(0, max(len(data) - 1, 0))), draw(st.integers(1, 16))
        match draw(st.sampled_from(["flip", "cut", "put", "double", "extreme", "end"])):
            case "flip" if data:
                data[at] ^= draw(st.integers(1, 255))
            case "cut":
                del data[at : at + count]
            case "put":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "double":
                data[at:at] = data[at : at + 8 * count]
            case "extreme":
                data[at : at + count] = draw(st.sampled_from([b"\0", b"\x7f", b"\x80", b"\xff"])) * count
            case "end":
                del data[at:]
    return bytes(data)


def any_bytes(originals: list[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes of any kind, most of them near to real ones."""
    return damaged(originals) | damaged(originals) | st.binary(max_size=300)


def outcome(read: Callable[[], Any]) -> str | None:
    """None where `read` gives a value, the message of its error where it refuses; other errors pass through."""
    try:
        read()
    except (UserError, StorageError, ValueError) as error:
        assert str(error).strip(), "refused without a reason"  # noqa: PT017 (either outcome is right)
        return str(error)
    return None


def in_child(code: str, *arguments: str, memory_bytes: int = 2 * GIB, timeout_s: float = 120) -> str:
    """What Python code prints in a process that may have no more than `memory_bytes`; raises where it dies."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def unvouched(content: dict[str, Any]) -> dict[str, Any]:
    """What a file holds without its checksum, to be changed and given a true one."""
    return {key: value for key, value in content.items() if key != "checksum"}
