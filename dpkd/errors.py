"""The errors that end a run, each with the exit code of the command, and what keeps the secrets of URLs out of text."""

import difflib
import pickle
import re
from collections.abc import Iterable
from typing import Any

# one slash is what a path makes of two
_AUTHORITY = re.compile(r"(?<=:/)(/?)[^/\s'\"]{1,4096}@")
_QUERY = re.compile(r"(?<=:/)([^\s'\"?]{1,4096})\?[^\s'\"]*=[^\s'\"]*")
# a user without a password is none in abfs://container@account, and a `?` without such a key is a pattern of names
_SECRET = re.compile(
    r"://[^/\s]*:[^/\s]*@|https?://[^/\s]+@|://.*[?&](x-(amz|goog|oss)-[\w-]+|sig|signature|\w*token|\w*key(id)?|\w*secret|\w*password)=",
    re.IGNORECASE,
)


class UserError(Exception):
    """The user's settings or data are at fault: the message names key or file, value and way out. Exit code 2."""


class StorageError(OSError):
    """A file or a store cannot be read or written: the message names place, cause and way out. Exit code 2."""


class StorageUnavailable(StorageError):
    """Storage failed in a way that may pass: `dpkd.io.errors.retry` and a pool try again before they give up."""


class StopRequested(Exception):
    """A run that was asked to stop saved its state; the same command continues it. Exit code 75."""


class WorkerFailed(RuntimeError):
    """A training worker died and no restart was left; carries the first failing rank's traceback. Exit code 1."""


def portable(error: Exception) -> Exception:
    """The error itself where it survives its way between processes, else one of the same text."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  whatever an exception's own pickling raises
        copy = None
    return error if type(copy) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint `, did you mean 'x'?` for a misspelt name, empty where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def without_secrets(text: str) -> str:
    """The text with *** for the user, password and query (which may be a signature) of each URL in it."""
    if ":/" not in text:
        return text
    return _QUERY.sub(r"\1?***", _AUTHORITY.sub(r"\1***@", text))


def refuse_secrets(tree: Any, *, key: str = "") -> None:
    """Raises `UserError` for a password or a signed query in a URL of a tree of settings; it names the dotted key."""
    if isinstance(tree, dict | list | tuple):
        for name, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
            refuse_secrets(child, key=f"{key}.{name}" if key else str(name))
    elif isinstance(tree, str) and _SECRET.search(tree):
        raise UserError(
            f"{key}={without_secrets(tree)} holds a user, a password or a signature, and a run writes its "
            "settings into files: leave it out, and give it to the storage's library by environment variables or its "
            "own configuration (for s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )


def printable(text: str) -> str:
    """The text for a terminal: secrets masked, what could steer it or has no encoding shown as escapes."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t\u00a0" else ascii(letter)[1:-1]
        for letter in without_secrets(text)
    )
