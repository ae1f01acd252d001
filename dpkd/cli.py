"""The `dpkd` command: the whole run, single stages, and checks of data sets, runs and the machine.

dpkd pretrain PHOTOS             the whole run, like `python -m dpkd.pretrain`; settings are chosen for the images
dpkd pretrain --config FILE      the whole run with these settings; the other verbs take either too
dpkd pack|prepare|evaluate|export --config FILE     one stage of it
dpkd profile --config FILE [--stage distill]    some steps of a training stage: a trace, and where a step goes
dpkd plan --config FILE [--fast] shows the stages that would run; checks settings, files and (not with --fast) networks
dpkd ledger --config FILE [--pairs 3] [--budget 2h]    what teacher, tricks and each prior bring on your images
dpkd adapt EXPORT --shots FOLDER turns a few labelled images of new classes into a classifier, as timm folder and ONNX
dpkd settings [KEY]              shows every setting with its values, its default, and what it is
dpkd predict EXPORT PHOTOS ...   classes of images by a student or an adapted one, with confidence; --out FILE.csv
dpkd embed EXPORT PHOTOS ... --out FILE.parquet  embeddings of images, for faiss or scikit-learn
dpkd neighbours EXPORT PHOTOS ... --of QUERY --out FILE.png     the images nearest to a picture, as a contact sheet
dpkd inspect DATASET             shows a packed data set and its prior sets; checks every file and map
dpkd inspect DATASET --picture FILE.png [KEY ...]   draws samples with all their maps as one picture
dpkd audit RUN                   checks that each sample was used in the planned order, over all attempts
dpkd doctor                      checks that this machine has the packages and devices for training
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import NoReturn

from dpkd import __version__, pretrain
from dpkd.launch.signals import install_stop_handlers
from dpkd.log import safe_output

OF_SETTINGS = {
    "pretrain": "the whole run",
    "pack": "turn images into shards",
    "prepare": "compute prior maps beside the shards",
    "evaluate": "measure teacher, students and baselines again",
    "export": "write the students as timm folders and ONNX",
    "profile": "run some steps of a training stage, and show where their time goes",
    "ledger": "measure what teacher, tricks and priors bring on your images",
    "plan": "show the stages that would run, and check settings, files and networks",
}
"""The verbs that take settings, with their help."""
USES = {
    "predict": "the classes of images, by an exported or adapted student",
    "embed": "the embeddings of images, for faiss or scikit-learn",
    "neighbours": "the images nearest to a picture, as a contact sheet",
}
"""The verbs that use a student, with their help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the verb, and returns the exit code (see `dpkd.pretrain`)."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options, left = parser.parse_known_args(words, argparse.Namespace(command=shlex.join(["dpkd", *words])))
    if "given" in options and not any(word.startswith("-") for word in left):
        options.given += left  # argparse takes only the first of several groups of words between options
    elif left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    install_stop_handlers(pretrain.interrupt)
    return pretrain.exit_code(lambda: _act(options), continues="given" in options)


def _act(options: argparse.Namespace) -> None:
    # a verb loads what it needs: `--help` loads no settings, and few verbs load torch
    if options.verb == "doctor":
        from dpkd.verbs.doctor import doctor

        doctor()
    elif options.verb == "audit":
        from dpkd.verbs.audit import audit

        audit(options.run)
    elif options.verb == "inspect":
        from dpkd.verbs.inspect import draw_samples, inspect_dataset

        if options.picture is None:
            inspect_dataset(options.dataset)
        else:
            draw_samples(options.dataset, options.picture, set_name=options.set, keys=options.keys)
    elif options.verb == "adapt":
        from dpkd.verbs.adapt import adapt

        adapt(options.export, options.shots, out=options.out, method=options.method)
    elif options.verb in USES:
        _use(options)
    elif options.verb == "plan":
        from dpkd.verbs.plan import plan

        plan(pretrain.settings_of(options)[0], fast=options.fast)
    elif options.verb == "settings":
        from dpkd.verbs.settings import show_settings

        show_settings(options.key, form=options.form)
    elif options.verb == "profile":
        from dpkd.verbs.profile import profile_stage

        profile_stage(pretrain.settings_of(options)[0], options.stage, steps=options.steps)
    elif options.verb == "ledger":
        from dpkd.verbs.ledger import Ledger

        settings, _ = pretrain.settings_of(options)
        out = Path(options.out or f"{settings.run.dir}-ledger")
        asked = {name: getattr(options, name) for name in ("pairs", "rows", "shares", "command")}
        Ledger(settings, out, **asked).run(budget=options.budget, jobs=options.jobs)
    else:
        stages = pretrain.stage_names(options.stages) if options.verb == "pretrain" else [options.verb]
        pretrain.run_settings(options, stages=stages)


def _use(options: argparse.Namespace) -> None:
    """What a student makes of images; ends in an error where some are broken, after the results are written."""
    from dpkd.verbs.predict import embed, neighbours, predict, refuse_broken, write_table

    if options.verb == "neighbours":
        neighbours(options.export, options.photos, of=options.of, out=options.out, top=options.top)
        return
    if options.verb == "embed":
        table = embed(options.export, options.photos, out=options.out)
    elif options.out is not None:
        table = predict(options.export, options.photos, out=options.out, top=options.top)
    else:
        with redirect_stdout(sys.stderr):
            table = predict(options.export, options.photos, top=1 if options.top is None else options.top)
        with safe_output():
            write_table(table, sys.stdout.buffer, suffix=".csv")
    refuse_broken(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dpkd", description="Distributed prior-knowledge distillation.")
    parser.add_argument("--version", action="version", version=f"dpkd {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, purpose in OF_SETTINGS.items():
        verb = verbs.add_parser(name, help=purpose)
        pretrain.add_settings(verb)
        if name == "pretrain":
            pretrain.add_stages(verb)
        elif name == "plan":
            verb.add_argument("--fast", action="store_true", help="build no network, which loads torch")
        elif name == "profile":
            verb.add_argument("--stage", metavar="STAGE", help="teach, teach-NAME or distill; the first without it")
            verb.add_argument("--steps", type=int, default=10, help="steps that count")
        elif name == "ledger":
            verb.add_argument("--pairs", type=int, default=3, help="seeds; each draws labels, weights and batches")
            verb.add_argument("--budget", metavar="2h", help="time that may be used, as 90m or 1h30m")
            verb.add_argument("--out", metavar="FOLDER", help="folder of all runs; <run.dir>-ledger without it")
            verb.add_argument("--rows", default="", metavar="A,B", help="only these rows, as ledger.md names them")
            verb.add_argument(
                "--shares", default="", metavar="0.05,0.1", help="shares of the labels to train with, besides"
            )
            verb.add_argument("--jobs", type=int, default=1, help="runs side by side")
    adapted = verbs.add_parser("adapt", help="turn a few labelled images of new classes into a classifier")
    adapted.add_argument("export", metavar="EXPORT", help="folder of an exported student, or an adapted one")
    adapted.add_argument("--shots", required=True, metavar="FOLDER", help="images of the new classes, <class>/*")
    adapted.add_argument("--out", metavar="FOLDER", help="folder to write; beside EXPORT without it")
    methods = "auto, prototypes, logistic or fine_tune"
    adapted.add_argument("--method", default="auto", metavar="METHOD", help=methods)
    _add_uses(verbs)
    shown = verbs.add_parser("settings", help="show every setting with its values, its default, and what it is")
    shown.add_argument("key", nargs="?", metavar="KEY", help="only this key and those below it, as data.loader")
    forms = "text, a Markdown table, or a JSON schema with which editors check and complete settings files"
    shown.add_argument("--form", choices=("text", "markdown", "schema"), default="text", help=forms)
    purpose = "show and check a data set and its priors; or draw samples"
    inspect = verbs.add_parser("inspect", help=purpose)
    inspect.add_argument("dataset", metavar="DATASET", help="folder or URL of the shards")
    inspect.add_argument("keys", nargs="*", metavar="KEY", help="samples to draw; without keys, a few of all splits")
    inspect.add_argument("--picture", type=Path, metavar="FILE.png", help="draw samples with all their maps instead")
    inspect.add_argument("--set", default="default", metavar="NAME", help="prior set to draw from")
    audited = verbs.add_parser("audit", help="check that a run used each sample in the planned order")
    audited.add_argument("run", metavar="RUN", help="folder of the run")
    verbs.add_parser("doctor", help="check that this machine has the packages and devices for training")
    return parser


def _add_uses(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    for name, purpose in USES.items():
        verb = verbs.add_parser(name, help=purpose)
        verb.add_argument("export", metavar="EXPORT", help="folder of an exported student, or an adapted one")
        verb.add_argument("photos", nargs="+", metavar="PHOTOS", help="images, or folders of images at any depth")
        if name == "predict":
            verb.add_argument("--out", metavar="FILE", help=".csv, .jsonl or .parquet; the screen without it, as CSV")
            best = "the K best classes of each image; without it every class's probability, on the screen the best"
            verb.add_argument("--top", type=int, metavar="K", help=best)
        elif name == "embed":
            verb.add_argument("--out", required=True, metavar="FILE.parquet", help="keys and embeddings")
        else:
            verb.add_argument("--of", required=True, nargs="+", metavar="QUERY", help="pictures, one row each")
            verb.add_argument("--out", required=True, metavar="FILE.png", help="contact sheet")
            verb.add_argument("--top", type=int, default=8, metavar="K", help="images in a row")


def entry() -> NoReturn:
    """The command `dpkd`."""
    pretrain.whole_process(main)


if __name__ == "__main__":
    entry()
