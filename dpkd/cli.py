"""The `dpkd` command: the whole run, single stages, and what is done with data sets, runs and students.

    dpkd pretrain photos [--students A,B] [--teacher MODEL] [key.path=value ...]      settings are chosen
    dpkd pretrain --config configs/quickstart.yaml [key.path=value ...] [--stages pack,prepare]

`dpkd --help` lists the verbs. Each but the stages is the function of the same name in `dpkd.verbs`, and its options are
the function's arguments.

Exit codes: 0 done, 2 settings, data or storage at fault, 75 stopped on request and resumable, 1 any other error.
"""

import argparse
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from dpkd import __version__, errors
from dpkd.errors import EXIT_STOPPED, EXIT_USER, UserError, did_you_mean, printable
from dpkd.launch.signals import install_stop_handlers, stop_handlers
from dpkd.log import logger, safe_output
from dpkd.stages import STAGES

if TYPE_CHECKING:
    from dpkd.settings import Settings

STAGE_VERBS = {
    "pretrain": "the whole run; settings are chosen for the images, or come from a file",
    "pack": "turn images into shards",
    "prepare": "compute prior maps beside the shards",
    "evaluate": "measure teacher, students and baselines again",
    "export": "write the students as timm folders and ONNX",
}
SETTINGS_VERBS = {
    "profile": "run some steps of a training stage, and show where their time goes",
    "ledger": "measure what teacher, tricks and priors bring on your images",
    "plan": "show the stages that would run, and check settings, files and networks",
}
SETTINGS_OPTIONS = ("given", "config", "students", "teacher")
"""The options of both, from which `settings_of` makes the settings."""
OTHER_VERBS = {
    "adapt": "turn a few labelled images of new classes into a classifier",
    "predict": "the classes of images, by an exported or adapted student",
    "embed": "the embeddings of images, for faiss or scikit-learn",
    "neighbours": "the images nearest to a picture, as a contact sheet",
    "settings": "show every setting with its values, its default, and what it is",
    "inspect": "show and check a data set and its priors; or draw samples",
    "audit": "check that a run used each sample in the planned order",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the verb, and returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options, left = parser.parse_known_args(words)
    if "given" in options and not any(word.startswith("-") for word in left):
        options.given += left  # argparse takes only the first of several groups of words between options
    elif left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if options.verb == "ledger":
        options.command = shlex.join(["dpkd", *words])
    install_stop_handlers(interrupt)
    return exit_code(lambda: _act(options.verb, vars(options)), continues="given" in options)


def _act(verb: str, options: dict[str, Any]) -> None:
    # a verb loads what it needs: `--help` loads no settings, and few verbs load torch
    values = {name: value for name, value in options.items() if name not in ("verb", *SETTINGS_OPTIONS)}
    if verb in STAGE_VERBS:
        from dpkd.stages.driver import run

        stages = _stage_names(options["stages"]) if verb == "pretrain" else [verb]
        settings, chosen = settings_of(**{name: options[name] for name in SETTINGS_OPTIONS})
        run(settings, stages=stages, chosen=chosen)
        return
    if verb in SETTINGS_VERBS:
        values["settings"], _ = settings_of(**{name: options[name] for name in SETTINGS_OPTIONS})
    if verb in ("predict", "embed", "neighbours"):
        _use(verb, values)
    else:
        getattr(import_module(f"dpkd.verbs.{verb}"), verb)(**values)


def settings_of(
    given: Sequence[str], config: str | None, students: str | None, teacher: str | None
) -> "tuple[Settings, str | None]":
    """The settings of these options, and the text of those that were chosen, which it prints."""
    sources = [text for text in given if "=" not in text or os.path.lexists(text)]
    overrides = [text for text in given if text not in sources]
    if config is not None:
        options = {"--students": students, "--teacher": teacher}
        if extra := [*sources, *(name for name, value in options.items() if value is not None)]:
            raise UserError(f"{' '.join(extra)}: with --config, give settings as key.path=value")
        from dpkd.settings import load_settings

        return load_settings(config, overrides), None
    if len(sources) > 1:
        raise UserError(f"{' '.join(sources)}: give one folder or table of images, and settings as key.path=value")
    from dpkd.defaults import chosen_settings  # loads readers of images and tables

    source = sources[0] if sources else None
    settings, chosen = chosen_settings(source, overrides, students=students, teacher=teacher)
    logger.info(chosen)
    return settings, chosen


def _stage_names(text: str | None) -> list[str]:
    """The stages of a comma-separated list, in their order; all if None. Raises `UserError` for an unknown name."""
    named = list(STAGES) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in STAGES:
            raise UserError(
                f"--stages {name!r}: no such stage{did_you_mean(name, STAGES)} (they are {', '.join(STAGES)})"
            )
    return [stage for stage in STAGES if stage in named]


def _use(verb: str, values: dict[str, Any]) -> None:
    """What a student makes of images; ends in an error where some are broken, after the results are written."""
    module = import_module("dpkd.verbs.predict")
    if verb == "predict" and values["out"] is None:
        with redirect_stdout(sys.stderr):
            table = module.predict(**values)
            table = table.select([name for name in table.column_names if not name.startswith("p_")])
        with safe_output():
            module.write_table(table, sys.stdout.buffer, suffix=".csv")
    elif verb == "predict" and not Path(values["out"]).suffix:
        if values["top"] is not None:
            raise UserError(f"--top {values['top']}: masks in the folder {values['out']} have no best classes")
        table = module.segment(values["export"], values["photos"], out=values["out"])
    else:
        table = getattr(module, verb)(**values)
    if verb != "neighbours":
        module.refuse_broken(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpkd",
        description="Distributed prior-knowledge distillation. The same command continues a stopped run.",
        epilog="Exit codes: 0 done, 2 settings or data at fault, 75 stopped on request and resumable, 1 other errors.",
    )
    parser.add_argument("--version", action="version", version=f"dpkd {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, purpose in (STAGE_VERBS | SETTINGS_VERBS | OTHER_VERBS).items():
        add = verbs.add_parser(verb, help=purpose).add_argument
        if verb in STAGE_VERBS | SETTINGS_VERBS:
            add("given", nargs="*", metavar="SOURCE | key.path=value", help="images; settings to replace")
            add("--config", metavar="FILE", help="settings, YAML; without it they are chosen for SOURCE")
            add("--students", metavar="A,B", help="timm models to train, without --config")
            add("--teacher", metavar="MODEL", help="timm model or file of its weights, without --config")
        elif verb in ("adapt", "predict", "embed", "neighbours"):
            add("export", metavar="EXPORT", help="folder of an exported student, or an adapted one")
        if verb in ("predict", "embed", "neighbours"):
            add("photos", nargs="+", metavar="PHOTOS", help="images, or folders of images at any depth")
        _add_options(verb, add)
    return parser


def _add_options(verb: str, add: Callable[..., Any]) -> None:
    """Adds the options of one verb alone."""
    match verb:
        case "pretrain":
            add("--stages", metavar="A,B", help=f"only these of {','.join(STAGES)}")
        case "profile":
            add("--stage", metavar="STAGE", help="teach, teach-NAME or distill; the first without it")
            add("--steps", type=int, default=10, help="steps that count")
        case "ledger":
            add("--pairs", type=int, default=3, help="seeds; each draws labels, weights and batches")
            add("--budget", metavar="2h", help="time that may be used, as 90m or 1h30m")
            add("--out", metavar="FOLDER", help="folder of all runs; <run.dir>-ledger without it")
            add("--rows", default="", metavar="A,B", help="only these rows, as ledger.md names them")
            add("--shares", default="", metavar="0.05,0.1", help="shares of the labels to train with, besides")
            add("--jobs", type=int, default=1, help="runs side by side")
        case "plan":
            add("--fast", action="store_true", help="build no network, which loads torch")
        case "adapt":
            methods = "auto, prototypes, logistic or fine_tune"
            add("--shots", required=True, metavar="FOLDER", help="images of the new classes, <class>/*")
            add("--out", metavar="FOLDER", help="folder to write; beside EXPORT without it")
            add("--method", default="auto", metavar="METHOD", help=methods)
        case "predict":
            best = "the K best classes of each image; without it every class's probability, on the screen the best"
            forms = ".csv, .jsonl or .parquet; a folder for masks; the screen without it, as CSV"
            add("--out", metavar="FILE", help=forms)
            add("--top", type=int, metavar="K", help=best)
        case "embed":
            add("--out", required=True, metavar="FILE.parquet", help="keys and embeddings")
        case "neighbours":
            add("--of", required=True, nargs="+", metavar="QUERY", help="pictures, one row each")
            add("--out", required=True, metavar="FILE.png", help="contact sheet")
            add("--top", type=int, default=8, metavar="K", help="images in a row")
        case "settings":
            forms = "text, a Markdown table, or a JSON schema with which editors check and complete settings files"
            add("key", nargs="?", metavar="KEY", help="only this key and those below it, as data.loader")
            add("--form", choices=("text", "markdown", "schema"), default="text", help=forms)
        case "inspect":
            add("dataset", metavar="DATASET", help="folder or URL of the shards")
            add("keys", nargs="*", metavar="KEY", help="samples to draw; without keys, a few of all splits")
            add("--picture", type=Path, metavar="FILE.png", help="draw samples with all their maps instead")
            add("--set", dest="set_name", default="default", metavar="NAME", help="prior set to draw from")
        case "audit":
            add("folder", metavar="RUN", help="folder of the run")


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """Ends packing and preparing like Ctrl-C, and keeps finished shards; training workers are asked to stop."""
    raise KeyboardInterrupt


def exit_code(work: Callable[[], None], *, continues: bool = True) -> int:
    """Runs `work`; prints its error as a message, and returns the exit code.

    `continues` says that the same command goes on with work that was interrupted.
    """
    try:
        work()
    except (errors.StopRequested, KeyboardInterrupt) as stop:
        with stop_handlers(signal.SIG_IGN):  # it is stopping already
            logger.info(f"{str(stop) or 'interrupted'}{'; the same command goes on from there' if continues else ''}")
        return EXIT_STOPPED
    except (UserError, errors.StorageError) as error:
        code, message = EXIT_USER, f"error: {error}"
    except errors.WorkerFailed as error:
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


def entry() -> NoReturn:
    """The command `dpkd`."""
    whole_process(main)


if __name__ == "__main__":
    entry()
