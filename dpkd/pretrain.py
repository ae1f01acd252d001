"""The entry point of a run: settings, then the stages in order, then the summary.

    python -m dpkd.pretrain --config configs/quickstart.yaml [key.path=value ...] [--stages pack,prepare]

Exit codes: 0 done, 2 settings, data or storage at fault, 75 stopped on request and resumable, 1 any other error.
"""

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from dpkd.backends.factory import make_accelerator, make_pool, make_worker_group
from dpkd.data.shards import Dataset
from dpkd.errors import StopRequested, StorageError, UserError, WorkerFailed, did_you_mean, printable
from dpkd.launch.signals import install_stop_handlers, start_resource_tracker, stop_handlers
from dpkd.log import Progress, duration, logger, safe_output
from dpkd.priors.base import accelerated
from dpkd.report.quarantine import Quarantine
from dpkd.report.summary import final_words, write_summary
from dpkd.run.attempt import attempt_at, write_provenance
from dpkd.run.folder import RunFolder
from dpkd.settings import Settings, load_settings
from dpkd.stages.pack import pack
from dpkd.stages.plan import POOL_STAGES, STAGES, dataset_url, plan_run, recorded, refuse_unknown_classes, stages_of
from dpkd.stages.prepare import prepare

EXIT_USER, EXIT_STOPPED = 2, 75


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dpkd.pretrain",
        description=f"Runs the stages {', '.join(STAGES)}. The same command continues a stopped run.",
        epilog="Exit codes: 0 done, 2 settings or data at fault, 75 stopped on request and resumable, 1 other errors.",
    )
    add_settings(parser)
    add_stages(parser)
    options = parser.parse_intermixed_args(arguments)
    install_stop_handlers(interrupt)
    return exit_code(lambda: run(load_settings(options.config, options.overrides), stages=stage_names(options.stages)))


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of every command that takes settings."""
    purpose = "settings that replace those of the file"
    parser.add_argument("--config", required=True, metavar="FILE", help="settings, YAML")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help=purpose)


def add_stages(parser: argparse.ArgumentParser) -> None:
    """Adds the argument of a command that runs several stages; `stage_names` reads it."""
    parser.add_argument("--stages", metavar="A,B", help=f"only these of {','.join(STAGES)}")


def stage_names(text: str | None) -> list[str]:
    """The stages of a comma-separated list, in their order; all if None. Raises `UserError` for an unknown name."""
    named = list(STAGES) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in STAGES:
            raise UserError(
                f"--stages {name!r}: no such stage{did_you_mean(name, STAGES)} (they are {', '.join(STAGES)})"
            )
    return [stage for stage in STAGES if stage in named]


def run(settings: Settings, *, stages: Sequence[str] = STAGES) -> None:
    """Runs the stages that are not done, in order, and prints the summary.

    Raises `UserError`, before any work, for settings that contradict the run folder.
    """
    began = time.monotonic()
    folder = RunFolder(settings.run.dir, checkpoints=settings.run.checkpoints)
    stages = stages_of(settings, stages)
    left = plan_run(settings, folder, stages)
    if left:
        write_provenance(folder, settings.model_dump(mode="json"))
        start_resource_tracker()
        folder = folder.acquire()
        folder.reopen(left)  # a stage whose files are damaged is recorded as done, and workers skip those
        with attempt_at(folder, left) as supervision:
            run_pool_stages(settings, folder, [stage for stage in left if stage in POOL_STAGES])
            if training := [stage for stage in left if stage not in POOL_STAGES]:
                workers = make_worker_group(settings.launcher, sizes=settings.world_sizes, module="dpkd.stages.worker")
                # not at the top: the driver of a cluster run needs no torch
                from dpkd.stages.worker import train_stages  # noqa: PLC0415

                argument = (settings.model_dump(mode="json"), training, folder.attempt)
                workers.run(train_stages, argument, supervision=supervision)
    logger.info(final_words(write_summary(folder.path)))
    logger.info(f"{'done' if left else 'all was done before; nothing to do'}, {duration(time.monotonic() - began)}")


def run_pool_stages(settings: Settings, folder: RunFolder, stages: Sequence[str]) -> None:
    """Runs those of the stages pack and prepare that `stages` names."""
    if not stages:
        return
    data, url, hangs = settings.data, dataset_url(folder, settings.data), folder.hangs
    pool = make_pool(settings.launcher, hangs=hangs)
    quarantine = Quarantine(folder.quarantine, limit=data.bad_limit)
    if "pack" in stages:
        with recorded("pack", folder, settings):
            if data.source is not None:  # else the shards exist already
                with Progress("pack", 0) as progress:
                    pack(data, url, seed=settings.run.seed, pool=pool, quarantine=quarantine, progress=progress.reach)
    if "prepare" in stages:
        with recorded("prepare", folder, settings), Progress("prepare", 0) as progress:
            dataset = Dataset.open(url)
            refuse_unknown_classes(dataset, settings)
            # only if a prior can use an accelerator: otherwise the driver needs no torch to look for GPUs
            accelerate = accelerated(settings.prepare.chosen)
            prepare(
                dataset,
                settings.prepare,
                pool=pool,
                accelerator=make_accelerator(settings.launcher, hangs=hangs) if accelerate else None,
                quarantine=quarantine,
                progress=progress.reach,
            )


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """Ends packing and preparing like Ctrl-C, and keeps finished shards; training workers are asked to stop."""
    raise KeyboardInterrupt


def exit_code(work: Callable[[], None]) -> int:
    """Runs `work`; prints its error as a message, and returns the exit code."""
    try:
        work()
    except (StopRequested, KeyboardInterrupt) as stop:
        with stop_handlers(signal.SIG_IGN):  # it is stopping already
            logger.info(f"{str(stop) or 'interrupted'}; the same command goes on from there")
        return EXIT_STOPPED
    except (UserError, StorageError) as error:
        code, message = EXIT_USER, f"error: {error}"
    except WorkerFailed as error:
        code, message = 1, f"error: a worker failed and no restart was left\n{error}"
    except Exception:  # noqa: BLE001 (a bug: Python would print the traceback with its secrets)
        code, message = 1, traceback.format_exc()
    else:
        return 0
    with suppress(OSError):  # the terminal may be closed
        print(printable(message), file=sys.stderr, flush=True)
    return code


def whole_process(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and ends this process with its exit code; ignores stop signals after `main` has returned."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # some parents ignore it, and then no child can be waited for
    code = main()
    install_stop_handlers(signal.SIG_IGN)
    with safe_output():
        sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    whole_process(main)
