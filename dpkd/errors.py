"""The errors that end a run, each with the exit code that the command returns for it."""

import pickle
import re
from typing import Any

# one slash is what a path makes of two
_AUTHORITY = re.compile(r"(?<=:/)(/?)[^/\s'\"]{1,4096}@")
_QUERY = re.compile(r"(?<=:/)([^\s'\"?]{1,4096})\?[^\s'\"]*=[^\s'\"]*")


class UserError(ValueError):
    """The user's settings or data are at fault: the message names key or file, value and way out. Exit code 2.

    Secrets in URLs are masked, wherever the message comes from.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class StorageUnavailable(UserError):
    """Storage failed in a way that may pass. A pool tries the item again before it gives up."""


class StopRequested(Exception):
    """A run that was asked to stop saved its state; the same command continues it. Exit code 75."""


class WorkerFailed(RuntimeError):
    """A training worker died and no restart was left; carries the first failing rank's traceback. Exit code 1."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


def portable(error: Exception) -> Exception:
    """The error itself where it survives its way between processes, else one that says the same."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  whatever an exception's own pickling raises
        copy = None
    return error if type(copy) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")


def without_secrets(text: str) -> str:
    """The text with *** for the user, password and query (which may be a signature) of each URL in it."""
    if ":/" not in text:
        return text
    return _QUERY.sub(r"\1?***", _AUTHORITY.sub(r"\1***@", text))


def masked(tree: Any) -> Any:
    """The tree with the secrets of each URL in it masked."""
    if isinstance(tree, str):
        return without_secrets(tree)
    if isinstance(tree, dict):
        return {key: masked(value) for key, value in tree.items()}
    return [masked(each) for each in tree] if isinstance(tree, list | tuple) else tree


def printable(text: str) -> str:
    """The text for a terminal: secrets masked, what could steer it or has no encoding shown as escapes."""
    masked = without_secrets(text)
    return "".join(each if each.isprintable() or each in "\n\t\u00a0" else ascii(each)[1:-1] for each in masked)
