"""The `dpkd` command: the stages one by one, and a look at what stands on disk.

dpkd pretrain --config FILE      the whole run, as `python -m dpkd.pretrain`
dpkd pack|prepare|evaluate|export --config FILE     one stage of it
dpkd plan --config FILE          what would run, checking the settings
dpkd inspect DATASET             what a packed data set and its prior sets hold, every file and map checked
dpkd inspect DATASET --picture FILE.png [KEY ...]   samples with all their maps as one picture
dpkd audit RUN                   whether each sample was used exactly as the order says, over all attempts
dpkd doctor                      whether this machine has what training needs
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dpkd import __version__, pretrain
from dpkd.launch.signals import heed
from dpkd.run.folder import RunFolder
from dpkd.settings import Settings, load_settings
from dpkd.stages.plan import STAGES, left_to_do, say_plan
from dpkd.verbs.doctor import doctor
from dpkd.verbs.inspect import draw_samples, inspect_dataset

ONE_STAGE = {
    "pack": "turn images into shards",
    "prepare": "compute prior maps beside the shards",
    "evaluate": "measure teacher, students and baselines again",
    "export": "write the students as timm folders and ONNX",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, acts, and returns the exit code of `dpkd.pretrain`."""
    options = _parser().parse_args(arguments)
    act: Callable[[argparse.Namespace], None] = options.act
    heed(pretrain.interrupt)
    return pretrain.exit_code(lambda: act(options))


def _settings(options: argparse.Namespace) -> Settings:
    return load_settings(options.config, options.overrides)


def _pretrain(options: argparse.Namespace) -> None:
    pretrain.run(_settings(options), stages=pretrain.stage_names(options.stages))


def _one_stage(options: argparse.Namespace) -> None:
    pretrain.run(_settings(options), stages=[options.verb])


def _plan(options: argparse.Namespace) -> None:
    settings = _settings(options)
    folder = RunFolder(settings.run.dir)
    say_plan(settings, folder, left=left_to_do(folder, settings, STAGES), stages=STAGES)


def _inspect(options: argparse.Namespace) -> None:
    if options.picture is not None:
        draw_samples(options.dataset, options.picture, set_name=options.set, keys=options.keys)
    else:
        inspect_dataset(options.dataset)


def _audit(options: argparse.Namespace) -> None:
    # here, not at the top: no other verb needs torch in this process
    from dpkd.verbs.audit import audit  # noqa: PLC0415

    audit(options.run)


def _doctor(_: argparse.Namespace) -> None:
    doctor()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dpkd", description="Distributed prior-knowledge distillation.")
    parser.add_argument("--version", action="version", version=f"dpkd {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    whole = _configured(verbs.add_parser("pretrain", help="the whole run"), _pretrain)
    whole.add_argument("--stages", metavar="A,B", help=f"only these of {','.join(STAGES)}")
    for name, purpose in ONE_STAGE.items():
        _configured(verbs.add_parser(name, help=purpose), _one_stage)
    _configured(verbs.add_parser("plan", help="what would run; checks the settings"), _plan)
    inspect = verbs.add_parser(
        "inspect", help="what a data set and its priors hold, all checked; or a picture of samples"
    )
    inspect.add_argument("dataset", metavar="DATASET", help="folder or URL of the shards")
    inspect.add_argument("keys", nargs="*", metavar="KEY", help="samples to draw; none takes a few of all splits")
    inspect.add_argument("--picture", type=Path, metavar="FILE.png", help="draw samples with all their maps instead")
    inspect.add_argument("--set", default="default", metavar="NAME", help="prior set to draw from")
    inspect.set_defaults(act=_inspect)
    audited = verbs.add_parser("audit", help="whether a run used each sample exactly as the order says")
    audited.add_argument("run", metavar="RUN", help="folder of the run")
    audited.set_defaults(act=_audit)
    verbs.add_parser("doctor", help="whether this machine has what training needs").set_defaults(act=_doctor)
    return parser


def _configured(parser: argparse.ArgumentParser, act: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    parser.add_argument("--config", required=True, metavar="FILE", help="settings, YAML")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="settings that replace those of the file"
    )
    parser.set_defaults(act=act)
    return parser


def entry() -> NoReturn:
    """The command `dpkd`."""
    pretrain.whole_process(main)


if __name__ == "__main__":
    entry()
