"""The work of a training worker; the driver names it without loading torch."""

from collections.abc import Collection
from typing import Any

from dpkd.backends.local_pool import LocalPool
from dpkd.launch.forking import load_ahead

SESSION = "dpkd.stages.session"
"""The module with the work, which loads torch, timm and the stages."""


def train_stages(argument: tuple[dict[str, Any], list[str], int | None]) -> None:
    """Runs the training stages in this worker; `argument` is (settings as plain values, stages, attempt).

    It runs again after a failure: it skips the stages that are done, and continues an interrupted stage.
    """
    from dpkd.stages.session import run_session  # noqa: PLC0415

    run_session(*argument)


def check_in_child(tree: dict[str, Any], stages: Collection[str]) -> None:
    """Checks the networks of the stages in a process of its own; raises the errors of `check_networks`."""
    method = load_ahead("dpkd.backends.local_workers", SESSION)  # the training workers' server, if they are local
    for _ in LocalPool(1, start_method=method).map(_check, [(tree, list(stages))]):
        pass


def _check(argument: tuple[dict[str, Any], list[str]]) -> None:
    from dpkd.settings import parse_settings  # noqa: PLC0415
    from dpkd.stages.check_networks import check_networks  # noqa: PLC0415

    check_networks(parse_settings(argument[0], origin="settings of the run"), argument[1])
