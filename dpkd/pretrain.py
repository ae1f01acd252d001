"""The entry point of a run: settings, then the stages in order, then the summary.

    python -m dpkd.pretrain photos [--students A,B] [--teacher MODEL] [key.path=value ...]     settings are chosen
    python -m dpkd.pretrain --config configs/quickstart.yaml [key.path=value ...] [--stages pack,prepare]

Exit codes: 0 done, 2 settings, data or storage at fault, 75 stopped on request and resumable, 1 any other error.
"""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from dpkd.errors import (
    EXIT_STOPPED,
    EXIT_USER,
    StopRequested,
    StorageError,
    UserError,
    WorkerFailed,
    did_you_mean,
    printable,
)
from dpkd.launch.signals import install_stop_handlers, stop_handlers
from dpkd.log import logger, safe_output
from dpkd.stages import STAGES

if TYPE_CHECKING:
    from dpkd.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dpkd.pretrain",
        description=f"Runs the stages {', '.join(STAGES)}. The same command continues a stopped run.",
        epilog="Exit codes: 0 done, 2 settings or data at fault, 75 stopped on request and resumable, 1 other errors.",
    )
    add_settings(parser.add_argument)
    add_stages(parser.add_argument)
    options = parser.parse_intermixed_args(arguments)
    install_stop_handlers(interrupt)
    return exit_code(lambda: run_settings(options, stages=stage_names(options.stages)))


def run_settings(options: argparse.Namespace, *, stages: Sequence[str]) -> None:
    """Runs the stages with the settings of the options; raises the errors of `settings_of` and `run`."""
    # not at the top: `--help` does not need it, and worker processes load this module as their main module
    from dpkd.stages.driver import run  # noqa: PLC0415

    settings, chosen = settings_of(options)
    run(settings, stages=stages, chosen=chosen)


def add_settings(add: Callable[..., Any]) -> None:
    """Adds the arguments of every command that takes settings."""
    add("given", nargs="*", metavar="SOURCE | key.path=value", help="images; settings to replace")
    add("--config", metavar="FILE", help="settings, YAML; without it they are chosen for SOURCE")
    add("--students", metavar="A,B", help="timm models to train, without --config")
    add("--teacher", metavar="MODEL", help="timm model or file of its weights, without --config")


def settings_of(options: argparse.Namespace) -> "tuple[Settings, str | None]":
    """The settings of the arguments of `add_settings`, and the text of those that were chosen, which it prints."""
    sources = [text for text in options.given if "=" not in text or os.path.lexists(text)]
    overrides = [text for text in options.given if text not in sources]
    if options.config is not None:
        extra = [*sources, *(f"--{name}" for name in ("students", "teacher") if getattr(options, name) is not None)]
        if extra:
            raise UserError(f"{' '.join(extra)}: with --config, give settings as key.path=value")
        from dpkd.settings import load_settings  # noqa: PLC0415

        return load_settings(options.config, overrides), None
    if len(sources) > 1:
        raise UserError(f"{' '.join(sources)}: give one folder or table of images, and settings as key.path=value")
    from dpkd.defaults import chosen_settings  # noqa: PLC0415  loads readers of images and tables

    source = sources[0] if sources else None
    settings, chosen = chosen_settings(source, overrides, students=options.students, teacher=options.teacher)
    logger.info(chosen)
    return settings, chosen


def add_stages(add: Callable[..., Any]) -> None:
    """Adds the argument of a command that runs several stages; `stage_names` reads it."""
    add("--stages", metavar="A,B", help=f"only these of {','.join(STAGES)}")


def stage_names(text: str | None) -> list[str]:
    """The stages of a comma-separated list, in their order; all if None. Raises `UserError` for an unknown name."""
    named = list(STAGES) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in STAGES:
            raise UserError(
                f"--stages {name!r}: no such stage{did_you_mean(name, STAGES)} (they are {', '.join(STAGES)})"
            )
    return [stage for stage in STAGES if stage in named]


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """Ends packing and preparing like Ctrl-C, and keeps finished shards; training workers are asked to stop."""
    raise KeyboardInterrupt


def exit_code(work: Callable[[], None], *, continues: bool = True) -> int:
    """Runs `work`; prints its error as a message, and returns the exit code.

    `continues` says that the same command goes on with work that was interrupted.
    """
    try:
        work()
    except (StopRequested, KeyboardInterrupt) as stop:
        with stop_handlers(signal.SIG_IGN):  # it is stopping already
            logger.info(f"{str(stop) or 'interrupted'}{'; the same command goes on from there' if continues else ''}")
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
