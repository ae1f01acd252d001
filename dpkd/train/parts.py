"""Parts of a checkpoint beside the engines: the random state, what the order depends on, and what was trained from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from dpkd.engine.state import Writer, write_tensors
from dpkd.engine.world import World
from dpkd.errors import UserError


@dataclass(frozen=True)
class RandomState:
    """The PyTorch generators of this rank, so that dropout goes on as if it had not been interrupted."""

    world: World

    def snapshot(self) -> Writer:
        """Copies the states; the writer writes `random-<rank>.safetensors`."""
        states = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.world.device)
        return lambda folder: write_tensors(folder / f"random-{self.world.rank}.safetensors", states)

    def load(self, folder: Path) -> None:
        """Restores this rank's generators; a rank that did not exist at the save keeps its own."""
        path = folder / f"random-{self.world.rank}.safetensors"
        if not path.exists():
            return
        states = load_file(path)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.world.device)


@dataclass(frozen=True)
class LeftOut:
    """The samples that a stage never draws; the order of the others depends on them, so they must stay the same."""

    samples: tuple[int, ...]
    world: World

    def snapshot(self) -> Writer:
        """The writer of rank 0 writes `left-out.json`."""
        return self._write if self.world.rank == 0 else lambda _: None

    def load(self, folder: Path) -> None:
        """Compares; raises `UserError`, on every rank, where the stage began with other samples."""
        path = folder / "left-out.json"
        before = set(json.loads(path.read_text())) if path.exists() else set(self.samples)
        changed = sorted(before ^ set(self.samples))
        if changed:
            raise UserError(
                f"{len(before)} samples of the training split could not be read when the stage began, and "
                f"{len(self.samples)} now (sample {changed[0]} is one that changed): to go on would repeat some and "
                "skip others. Bring the shards and their prior maps back to what they were, or start the stage "
                "anew by deleting its checkpoints"
            )

    def _write(self, folder: Path) -> None:
        (folder / "left-out.json").write_text(json.dumps(self.samples))


@dataclass(frozen=True)
class Inputs:
    """What a stage is trained from, as digests by name: a step on other images or maps is no part of the same run."""

    digests: Mapping[str, str]
    world: World

    def snapshot(self) -> Writer:
        """The writer of rank 0 writes `inputs.json`."""
        return self._write if self.world.rank == 0 else lambda _: None

    def load(self, folder: Path) -> None:
        """Compares; raises `UserError`, on every rank, where the stage began with others."""
        path = folder / "inputs.json"
        before = json.loads(path.read_text()) if path.exists() else {}  # an earlier dpkd kept none
        changed = [name for name, digest in before.items() if self.digests.get(name) != digest]
        if changed:
            raise UserError(
                f"the stage began with other {' and '.join(changed)} than stand now: bring back what it began with, or "
                "start the stage anew by deleting its checkpoints"
            )

    def _write(self, folder: Path) -> None:
        (folder / "inputs.json").write_text(json.dumps(dict(self.digests)))
