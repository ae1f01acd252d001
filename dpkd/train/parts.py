"""Parts of a checkpoint that are no engines: the random state, and the digests of the stage's inputs."""

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
    """The PyTorch generators of this rank; dropout continues as if it had not been interrupted."""

    world: World

    def snapshot(self) -> Writer:
        """Copies the states; the writer writes `random-<rank>.safetensors`."""
        states = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.world.device)
        return lambda folder: write_tensors(folder / f"random-{self.world.rank}.safetensors", states)

    def load(self, folder: Path) -> None:
        """Restores this rank's generators, or keeps them as they are if the rank did not exist at the save."""
        path = folder / f"random-{self.world.rank}.safetensors"
        if not path.exists():
            return
        states = load_file(path)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.world.device)


@dataclass(frozen=True)
class Inputs:
    """Digests of a stage's inputs: its steps must all use the same images and maps, in the same order."""

    digests: Mapping[str, str]
    """Digest of each training input, by name."""
    world: World

    def snapshot(self) -> Writer:
        """The writer of rank 0 writes `inputs.json`."""
        content = json.dumps({"digests": dict(self.digests)})

        def write(folder: Path) -> None:
            if self.world.rank == 0:
                (folder / "inputs.json").write_text(content)

        return write

    def load(self, folder: Path) -> None:
        """Compares the digests with the saved ones; raises `UserError`, on every rank, if an input has changed."""
        before = json.loads((folder / "inputs.json").read_text())["digests"]
        changed = [name for name, digest in before.items() if self.digests.get(name) != digest]
        if changed:
            raise UserError(
                f"{' and '.join(changed)} changed after this stage started: restore them, or "
                "delete the checkpoints of the stage to start it again"
            )
