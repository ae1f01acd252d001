"""Parts of a checkpoint beside the engines: the random state, and what the stage began with."""

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
class Inputs:
    """What a stage began with: a step on other images or maps, or in another order, is no part of the same run."""

    digests: Mapping[str, str]
    """Of what it is trained from, by name."""
    world: World

    def snapshot(self) -> Writer:
        """The writer of rank 0 writes `inputs.json`."""
        content = json.dumps({"digests": dict(self.digests)})

        def write(folder: Path) -> None:
            if self.world.rank == 0:
                (folder / "inputs.json").write_text(content)

        return write

    def load(self, folder: Path) -> None:
        """Compares; raises `UserError`, on every rank, where the stage began with others."""
        before = json.loads((folder / "inputs.json").read_text())["digests"]
        changed = [name for name, digest in before.items() if self.digests.get(name) != digest]
        if changed:
            raise UserError(
                f"the stage began with other {' and '.join(changed)} than stand now: bring them back, or "
                "start the stage anew by deleting its checkpoints"
            )
