"""The errors that end a run, each with the exit code of the command, and functions that remove secrets from text."""

import difflib
import pickle
import re
from collections.abc import Iterable
from typing import Any

# `Path` turns two slashes into one
_AUTHORITY = re.compile(r"(?<=:/)(/?)[^/\s'\"]{1,4096}@")
_QUERY = re.compile(r"(?<=:/)([^\s'\"?]{1,4096})\?[^\s'\"]*=[^\s'\"]*")
# abfs://container@account has no user, and a `?` without such a key is a glob pattern
_SECRET = re.compile(
    r"://[^/\s]*:[^/\s]*@|https?://[^/\s]+@|://.*[?&](x-(amz|goog|oss)-[\w-]+|sig|signature|\w*token|\w*key(id)?|\w*secret|\w*password)=",
    re.IGNORECASE,
)

EXIT_USER, EXIT_STOPPED = 2, 75


class UserError(Exception):
    """A fault of the user's settings or data; the message names key or file, value and way out. Exit code 2."""


class StorageError(OSError):
    """A file or a store cannot be read or written; the message names place, cause and way out. Exit code 2."""


class StorageUnavailable(StorageError):
    """A temporary failure of storage: `dpkd.io.errors.retry` and pools retry before they raise it."""


class StopRequested(Exception):
    """A run has stopped on request after saving its state; the same command continues it. Exit code 75."""


class WorkerFailed(RuntimeError):
    """A worker failed and no restart was left; has the traceback of the rank that failed first. Exit code 1."""


def portable(error: Exception) -> Exception:
    """The error if it can be pickled, else a `RuntimeError` with the same text."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 (pickling an exception may raise any error)
        copy = None
    return error if type(copy) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint ` (did you mean 'x'?)` for a misspelt name; empty if no known name is similar."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def without_secrets(text: str) -> str:
    """The text with *** instead of the user, password and query (it may be a signature) of each URL."""
    if ":/" not in text:
        return text
    return _QUERY.sub(r"\1?***", _AUTHORITY.sub(r"\1***@", text))


def refuse_secrets(tree: Any, *, key: str = "") -> None:
    """Raises `UserError` with the dotted key of a URL that holds a password or a signed query in a tree of settings."""
    if isinstance(tree, dict | list | tuple):
        for name, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
            refuse_secrets(child, key=f"{key}.{name}" if key else str(name))
    elif isinstance(tree, str) and _SECRET.search(tree):
        raise UserError(
            f"{key}={without_secrets(tree)} holds a user, a password or a signature, and a run writes its "
            "settings into files: remove it, and set it in environment variables or the configuration of the "
            "storage library (for s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )


def printable(text: str) -> str:
    """The text for a terminal: masks secrets, and escapes control characters and those without an encoding."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t\u00a0" else ascii(letter)[1:-1]
        for letter in without_secrets(text)
    )
