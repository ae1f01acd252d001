"""The entry of a run: settings, then the stages in order, then the summary.

    python -m dpkd.pretrain --config configs/quickstart.yaml [key.path=value ...] [--stages pack,prepare]

Exit codes: 0 done, 2 the user's settings or data, 75 stopped on request and resumable, 1 anything else.
"""

import argparse
import difflib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from types import FrameType
from typing import NoReturn

from dpkd.backends.factory import make_accelerator, make_pool, make_worker_group
from dpkd.data.shards import Dataset
from dpkd.errors import StopRequested, StorageError, UserError, WorkerFailed, printable
from dpkd.launch.pool import Pool
from dpkd.launch.signals import install_stop_handlers, start_resource_tracker, stop_handlers
from dpkd.log import Progress, duration, logger, safe_output
from dpkd.priors.base import accelerated
from dpkd.report.quarantine import Quarantine
from dpkd.report.summary import final_words, write_summary
from dpkd.run.attempt import Attempt, attempt_at, supervision
from dpkd.run.folder import RunFolder
from dpkd.run.provenance import write_provenance
from dpkd.settings import Settings, load_settings
from dpkd.stages.attributes import log_unused_rows, refuse_unknown_classes
from dpkd.stages.pack import pack
from dpkd.stages.plan import (
    POOL_STAGES,
    STAGES,
    find_faults,
    left_to_do,
    log_plan,
    stage_inputs,
    stage_outputs,
    stages_of,
)
from dpkd.stages.prepare import prepare

EXIT_USER, EXIT_STOPPED = 2, 75


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    install_stop_handlers(interrupt)
    return exit_code(lambda: run(load_settings(options.config, options.overrides), stages=stage_names(options.stages)))


def whole_process(main: Callable[[], int]) -> NoReturn:
    """Ends this process with the exit code that `main` returns, whatever signals come after."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some parents leave it, no child could be waited for
    code = main()
    install_stop_handlers(signal.SIG_IGN)
    with safe_output():
        sys.stdout.flush()
    sys.exit(code)


def run(settings: Settings, *, stages: Sequence[str] = STAGES) -> None:
    """Runs the stages that are left, in order, and prints the summary.

    Raises `UserError` for settings that contradict what stands in the run folder, before any work.
    """
    began = time.monotonic()
    folder = RunFolder(settings.run.dir, checkpoints=settings.run.checkpoints)
    stages = stages_of(settings, stages)
    faults = find_faults(folder, stages)
    left = left_to_do(folder, settings, stages, faults=faults)
    log_plan(settings, folder, left=left, stages=stages)
    for stage in stages:
        for fault in faults[stage]:
            logger.info(f"{fault}: the stage {stage} makes it again")
    if left:
        write_provenance(folder, settings.model_dump(mode="json"))
        start_resource_tracker()
        folder = folder.acquire()
        with attempt_at(folder, left) as attempt:
            run_pool_stages(settings, folder, [each for each in left if each in POOL_STAGES], around=attempt.stage)
            run_training_stages(settings, folder, [each for each in left if each not in POOL_STAGES], attempt=attempt)
    logger.info(final_words(write_summary(folder.path)))
    logger.info(f"{'done' if left else 'all was done before; nothing to do'}, {duration(time.monotonic() - began)}")


def run_pool_stages(
    settings: Settings,
    folder: RunFolder,
    stages: Sequence[str],
    *,
    around: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Packs and prepares, as far as named, each inside what `around` gives for its name."""
    if not stages:
        return
    pool = make_pool(settings.launcher, hangs=folder.hangs)
    quarantine = Quarantine(folder.quarantine, limit=settings.data.bad_limit)
    for stage in stages:
        recorded = folder.running(stage, stage_inputs(stage, settings), makes=partial(stage_outputs, stage, settings))
        with around(stage), recorded:
            _run_pool_stage(stage, settings, folder, pool=pool, quarantine=quarantine)


def run_training_stages(settings: Settings, folder: RunFolder, stages: Sequence[str], *, attempt: Attempt) -> None:
    """Runs the named stages in the training workers."""
    if not stages:
        return
    workers = make_worker_group(settings.launcher, sizes=settings.world_sizes, module="dpkd.stages.worker")
    # here, not at the top: the driver of a cluster run needs no torch
    from dpkd.stages.worker import train_stages  # noqa: PLC0415

    argument = (settings.model_dump(mode="json"), list(stages), folder.attempt)
    workers.run(train_stages, argument, supervision=supervision(folder, attempt))


def _run_pool_stage(stage: str, settings: Settings, folder: RunFolder, *, pool: Pool, quarantine: Quarantine) -> None:
    if stage == "pack" and settings.data.source is None:
        return  # the shards stand already
    url = settings.data.shards or str(folder.path / "shards")
    accelerator = None
    if stage == "prepare" and accelerated(settings.prepare.chosen):  # else the driver needs no torch to look for GPUs
        accelerator = make_accelerator(settings.launcher, hangs=folder.hangs)
    with Progress(stage, 0) as progress:
        if stage == "pack":
            pack(settings.data, url, seed=settings.run.seed, pool=pool, quarantine=quarantine, progress=progress.reach)
        else:
            dataset = Dataset.open(url)
            refuse_unknown_classes(dataset, settings)
            log_unused_rows(dataset, settings.data)
            prepare(
                dataset,
                settings.prepare,
                pool=pool,
                accelerator=accelerator,
                quarantine=quarantine,
                progress=progress.reach,
            )


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """Ends packing and preparing as Ctrl-C does: what is finished stays. Training workers are asked to stop."""
    raise KeyboardInterrupt


def exit_code(work: Callable[[], None]) -> int:
    """Runs `work` and turns the errors that users meet into a message and an exit code."""
    try:
        work()
    except (UserError, StorageError) as error:
        _complain(f"error: {error}")
        return EXIT_USER
    except (StopRequested, KeyboardInterrupt) as stop:
        with stop_handlers(signal.SIG_IGN):  # it stops already
            logger.info(f"{str(stop) or 'interrupted'}; the same command goes on from there")
        return EXIT_STOPPED
    except WorkerFailed as error:
        _complain(f"error: a worker failed and no restart was left\n{error}")
        return 1
    except Exception:  # noqa: BLE001 (ours: Python would print the traceback with what secrets it holds)
        _complain(traceback.format_exc())
        return 1
    return 0


def _complain(text: str) -> None:
    with suppress(OSError):  # a closed terminal ends nothing
        print(printable(text), file=sys.stderr, flush=True)


def stage_names(text: str | None) -> list[str]:
    """The stages of a comma-separated list, in their order; all without one. Raises `UserError` for an unknown name."""
    if text is None:
        return list(STAGES)
    named = [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise UserError(f"--stages {name!r}: no such stage{hint} (they are {', '.join(STAGES)})")
    return [stage for stage in STAGES if stage in named]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpkd.pretrain",
        description=f"Runs the stages {', '.join(STAGES)}. Given again, it goes on where it stopped.",
        epilog="Exit codes: 0 done, 2 settings or data at fault, 75 stopped on request and resumable, 1 anything else.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="settings, YAML")
    parser.add_argument("--stages", metavar="A,B", help=f"only these of {','.join(STAGES)}")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="settings that replace those of the file"
    )
    return parser


if __name__ == "__main__":
    whole_process(main)
