"""The state of an engine on disk, the same for every engine, ZeRO stage and number of ranks.

    <folder>/part-00000-of-00002.safetensors     written by rank 0 of 2, part-00001-of-00002 by rank 1
        weight/<parameter>                       fp32
        buffer/<buffer>                          in its dtype
        exp_avg/<parameter>, exp_avg_sq/…        AdamW; momentum_buffer/<parameter> for SGD; trainable parameters only
        average/<parameter or buffer>            if weights are averaged
      metadata of every part: format, num_updates, num_average_updates

Each tensor is whole in exactly one part, so any engine at any world size reads it. The manifest of the checkpoint
detects missing and damaged parts.
"""

import errno
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dpkd.errors import UserError

FORMAT = "1"
COUNTS = ("num_updates", "num_average_updates")

Writer = Callable[[Path], None]
"""Writes a copy of a rank's share of some state to a folder, at any time and in any thread."""


def write_part(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, counts: Mapping[str, int], rank: int, size: int
) -> None:
    """Writes this rank's tensors, which are on the CPU; raises `OSError` if the disk is full or fails."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, **{name: str(number) for name, number in counts.items()}}
    write_tensors(folder / f"part-{rank:05d}-of-{size:05d}.safetensors", tensors, metadata=metadata)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors on the CPU as one safetensors file; raises `OSError` if the disk is full or fails."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:  # safetensors raises it for every fault of the disk
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, f"{error}", str(path)) from error


class StateReader:
    """Reads tensors by name from the parts in a folder; raises `UserError` if the format or tensors do not fit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        parts = [safe_open(path, framework="pt") for path in sorted(folder.glob("part-*-of-*.safetensors"))]
        formats = {part.metadata()["format"] for part in parts}
        if formats != {FORMAT}:
            raise UserError(f"{folder}: its format is {formats}; this version of dpkd reads only {FORMAT}")
        self.counts = {name: int(parts[0].metadata()[name]) for name in COUNTS}
        self._part_with = {name: part for part in parts for name in part.keys()}  # noqa: SIM118 (not a mapping)

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raises `UserError` unless the parts hold exactly these tensors, in these shapes."""
        way_out = "train with the settings of the checkpoint, or into another run.dir"
        names = sorted(set(shapes).symmetric_difference(self._part_with))
        if names:
            where = "only on disk" if names[0] in self._part_with else "not on disk"
            differ = f"{len(names)} tensors differ from this network, optimizer or average, first {names[0]} ({where})"
            raise UserError(f"{self._folder}: {differ}; {way_out}")
        for name, shape in shapes.items():
            stored = tuple(self._part_with[name].get_slice(name).get_shape())
            if stored != tuple(shape):
                differ = f"{name} has shape {stored}, this network has {tuple(shape)}"
                raise UserError(f"{self._folder}: {differ}; {way_out}")

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU."""
        tensor: torch.Tensor = self._part_with[name].get_tensor(name)
        return tensor
