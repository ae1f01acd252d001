"""Tiny whole runs for the tests: settings of a few steps, started in a process of its own as a user would."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from dpkd.run.folder import RunFolder
from dpkd.settings import Settings, parse_settings
from dpkd.stages.run import Run

CONV = {"name": "resnet18", "arguments": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 16}}
VIT = {
    "name": "vit_tiny_patch16_224",
    "arguments": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "pos_drop_rate": 0.1},
}
FIGURE_GROUND = {"pooling": {"kind": "figure_ground"}}
LOSSES = [{"kind": "supervised"}, {"kind": "logits"}, {"kind": "features"}, {"kind": "patches"}]


def tiny(run_dir: Path, *, source: Path | None, shards: Path | None = None) -> dict[str, Any]:
    """Settings of a whole run of a few steps: a teacher, a conv and a ViT student, a baseline."""
    training = {"steps": 6, "batch_size": 16, "micro_batch_size": 8, "log_every": 1, "checkpoint_every": 2}
    often = {"evaluate_every": 3, "panels_every": 6, "precision": "fp32"}
    return {
        "run": {"dir": str(run_dir)},
        "launcher": {"kind": "local", "workers": 1, "pool_workers": 2, "threads": 1},
        "data": {
            "source": None if source is None else str(source),
            "shards": None if shards is None else str(shards),
            "train": "base",
            "val": "val",
            "test": "novel",
            "image_size": 32,
            "samples_per_shard": 64,
            "loader": {"workers": 0},
        },
        "prepare": {"priors": [{"kind": kind} for kind in ("edge", "saliency", "superpixel")]},
        "teachers": {
            "teacher": {
                "model": CONV | FIGURE_GROUND,
                "objectives": [
                    {"kind": "supervised"},
                    {"kind": "masked_prior", "targets": {"hog": 1.0, "edge": 0.25}},
                ],
                "engine": {"kind": "torch", "ema": 0.9},
                "training": training | often,
            }
        },
        "distill": {
            "students": {
                "conv": {
                    "model": CONV | {"pooling": {"kind": "figure_ground", "prior": "foreground"}},
                    "objectives": LOSSES,
                    "baseline": True,
                    "engine": {"kind": "torch"},
                },
                "vit": {"model": VIT, "objectives": LOSSES, "baseline": False, "engine": {"kind": "torch"}},
            },
            "training": training | often,
        },
        "evaluate": {"episodes": {"episodes": 20, "queries": 5}, "episodes_while_training": 10},
        "export": {"onnx": False},
    }


def with_data(run: Run, **changes: Any) -> Run:
    """The run with other settings of the images."""
    data = run.data.model_copy(update=changes)
    return replace(run, settings=run.settings.model_copy(update={"data": data}))


def settings_of(tree: dict[str, Any]) -> Settings:
    """The tree checked, as the command would."""
    return parse_settings(tree, origin="test")


class Command:
    """`python -m dpkd.pretrain` in a process group of its own."""

    def __init__(
        self,
        tree: dict[str, Any],
        *extra: str,
        launcher: Sequence[str] = (),
        largest_file: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts it, by another launcher if one is given; `largest_file` bytes is where the disk is full for a file."""
        folder = Path(tree["run"]["dir"])
        folder.parent.mkdir(parents=True, exist_ok=True)
        config = folder.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(tree))
        self._log = folder.with_suffix(".log")
        self.folder = RunFolder(folder)
        root = {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "dpkd.pretrain", "--config", str(config), *extra],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=None if largest_file is None else partial(_limit_files, largest_file),  # noqa: PLW1509
                env=os.environ | root | dict(environment or {}),
            )

    @property
    def output(self) -> str:
        """All that was printed, over all attempts at this run."""
        return self._log.read_text()

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(timeout=280)

    def wait_for_step(self, stage: str, step: int) -> None:
        """Returns once the stage has logged this step."""
        while not any(line["stage"] == stage and line["step"] >= step for line in train_events(self.folder)):
            assert self.process.poll() is None, self.output
            time.sleep(0.02)

    def kill_all(self) -> None:
        """SIGKILL to every process of the run."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _limit_files(size_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


def train_events(folder: RunFolder) -> list[dict[str, Any]]:
    """The training lines of events.jsonl, a line cut short left out."""
    if not folder.events.exists():
        return []
    lines = [json.loads(line) for line in folder.events.read_text().splitlines() if line.endswith("}")]
    return [line for line in lines if line["kind"] == "train"]


def all_weights(folder: RunFolder) -> dict[str, Any]:
    """Every tensor of every trained network, by file and name."""
    files = sorted(folder.path.glob("*/**/model.safetensors"))
    own = [path for path in files if "export" not in path.parts]
    return {
        f"{path.parent.relative_to(folder.path)}:{name}": tensor
        for path in own
        for name, tensor in load_file(path).items()
    }
