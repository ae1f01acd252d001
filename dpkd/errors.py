"""The errors that end a run, each with the exit code that the command returns for it."""

import pickle
import re

_SECRETS = (
    (re.compile(r"(?<=://)[^\s/@]+@"), "***@"),
    (
        re.compile(r"(?i)\b(x-amz-(?:signature|credential|security-token)|x-goog-signature|sig|token)=[^\s&'\"]+"),
        r"\1=***",
    ),
)


class UserError(ValueError):
    """The user's settings or data are at fault: the message names key or file, value and way out. Exit code 2."""

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class StorageUnavailable(UserError):
    """Storage failed in a way that may pass. A pool tries the item again before it gives up."""


class StopRequested(Exception):
    """A run that was asked to stop saved its state; the same command continues it. Exit code 75."""


class WorkerFailed(RuntimeError):
    """A training worker died and no restart was left; carries the first failing rank's traceback. Exit code 1."""


def portable(error: Exception) -> Exception:
    """The error itself where it survives its way between processes, else one that says the same."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  whatever an exception's own pickling raises
        copy = None
    return error if type(copy) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")


def without_secrets(text: str) -> str:
    """The text with the user and password of its URLs and the values of their signatures replaced by `***`."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text
