"""The `dpkd` command: the whole run, single stages, and what is done with data sets, runs and students.

`dpkd --help` lists the verbs. Each is the function of the same name in `dpkd.verbs`, and its options are the function's
arguments; the stages run as in `dpkd.pretrain`.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from dpkd import __version__, pretrain
from dpkd.launch.signals import install_stop_handlers
from dpkd.log import safe_output

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
    """Parses the command line, runs the verb, and returns the exit code (see `dpkd.pretrain`)."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options, left = parser.parse_known_args(words)
    if "given" in options and not any(word.startswith("-") for word in left):
        options.given += left  # argparse takes only the first of several groups of words between options
    elif left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if options.verb == "ledger":
        options.command = shlex.join(["dpkd", *words])
    install_stop_handlers(pretrain.interrupt)
    return pretrain.exit_code(lambda: _act(options), continues="given" in options)


def _act(options: argparse.Namespace) -> None:
    verb = options.verb
    if verb in STAGE_VERBS:
        stages = pretrain.stage_names(options.stages) if verb == "pretrain" else [verb]
        pretrain.run_settings(options, stages=stages)
        return
    values: dict[str, Any] = {name: value for name, value in vars(options).items() if name != "verb"}
    if verb in SETTINGS_VERBS:
        values["settings"] = pretrain.settings_of(options)[0]
        for name in ("given", "config", "students", "teacher"):
            del values[name]
    # a verb loads what it needs: `--help` loads no settings, and few verbs load torch
    if verb in ("predict", "embed", "neighbours"):
        _use(verb, values)
    else:
        getattr(import_module(f"dpkd.verbs.{verb}"), verb)(**values)


def _use(verb: str, values: dict[str, Any]) -> None:
    """What a student makes of images; ends in an error where some are broken, after the results are written."""
    from dpkd.verbs.predict import embed, neighbours, predict, refuse_broken, write_table

    if verb == "neighbours":
        neighbours(**values)
    elif verb == "embed":
        refuse_broken(embed(**values))
    elif values["out"] is not None:
        refuse_broken(predict(**values))
    else:
        with redirect_stdout(sys.stderr):
            table = predict(**{**values, "top": 1 if values["top"] is None else values["top"]})
        with safe_output():
            write_table(table, sys.stdout.buffer, suffix=".csv")
        refuse_broken(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dpkd", description="Distributed prior-knowledge distillation.")
    parser.add_argument("--version", action="version", version=f"dpkd {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, purpose in (STAGE_VERBS | SETTINGS_VERBS | OTHER_VERBS).items():
        add = verbs.add_parser(verb, help=purpose).add_argument
        if verb in STAGE_VERBS | SETTINGS_VERBS:
            pretrain.add_settings(add)
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
            pretrain.add_stages(add)
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
            add("--out", metavar="FILE", help=".csv, .jsonl or .parquet; the screen without it, as CSV")
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


def entry() -> NoReturn:
    """The command `dpkd`."""
    pretrain.whole_process(main)


if __name__ == "__main__":
    entry()
