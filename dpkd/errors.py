"""The errors that end a run, each with the exit code that the command returns for it."""


class UserError(ValueError):
    """The user's settings or data are at fault: the message names the key or file, the value and the way out. Exit code 2."""


class StopRequested(Exception):
    """A run that was asked to stop saved its state; the same command continues it. Exit code 75."""


class WorkerFailed(RuntimeError):
    """A training worker died and no restart was left; carries the first failing rank's traceback. Exit code 1."""
