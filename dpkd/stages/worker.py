"""The work of a training worker; the driver names it without loading torch."""

from typing import Any

SESSION = "dpkd.stages.session"
"""The module with the work, which loads torch, timm and the stages."""


def train_stages(argument: tuple[dict[str, Any], list[str], int | None]) -> None:
    """Runs the training stages in this worker; `argument` is (settings as plain values, stages, attempt).

    It runs again after a failure: it skips the stages that are done, and continues an interrupted stage.
    """
    from dpkd.stages.session import run_session  # noqa: PLC0415

    run_session(*argument)
