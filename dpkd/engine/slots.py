"""The state of a network in training, tensor by tensor, for every engine, and the average of its weights.

A slot is one tensor of the state: whole on every rank, or in parts. All ranks read the same slots in the same order,
because reading gathers the parts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from dpkd.engine.network import in_fp32
from dpkd.engine.optimizer import quantities, set_num_updates
from dpkd.engine.settings import OptimizerSettings
from dpkd.engine.state import StateReader, Writer, write_part
from dpkd.engine.world import World


@dataclass(frozen=True)
class Slot:
    """One tensor of an engine's state: its whole shape, and this rank's part."""

    shape: torch.Size
    copies: tuple[tuple[torch.Tensor, int], ...]
    """Tensors with the number of their first element in the flattened whole; flat tensors may be padded at the end.

    Reading uses the first; writing keeps all of them equal.
    """
    gather: "Callable[[Slot, int], torch.Tensor | None] | None" = None
    """Builds the whole tensor on one rank from the parts of all; None if every rank holds it whole."""

    @property
    def is_whole_here(self) -> bool:
        """Whether this rank holds the whole of a tensor that is kept in parts."""
        parts = self.copies[:1] if self.gather is not None else ()
        return any(start == 0 and tensor.numel() >= self.shape.numel() for tensor, start in parts)

    def read_here(self) -> torch.Tensor:
        """The whole tensor, without the other ranks."""
        tensor, _ = self.copies[0]
        return tensor.detach().flatten()[: self.shape.numel()].view(self.shape)

    def read_on(self, rank: int) -> torch.Tensor | None:
        """The whole tensor on `rank`; ignore the result on other ranks. All ranks call it."""
        return self.read_here() if self.gather is None else self.gather(self, rank)

    def write(self, whole: torch.Tensor) -> None:
        """Copies `whole`, or this rank's part of it, into the tensors."""
        for tensor, start in self.copies:
            if tensor.shape == self.shape:  # any memory layout
                tensor.detach().copy_(whole)
            else:
                part = whole.flatten()[start : start + tensor.numel()]
                tensor.detach().view(-1)[: part.numel()].copy_(part)

    def like(self, tensor: torch.Tensor) -> "Slot":
        """The slot of a tensor that is distributed over the ranks like the first copy, such as a weight's average."""
        return replace(self, copies=((tensor, self.copies[0][1]),))


def whole(tensor: torch.Tensor) -> Slot:
    """The slot of a tensor that every rank holds whole."""
    return Slot(tensor.shape, ((tensor, 0),))


class Placement(Protocol):
    """The slots in which an engine keeps the state of each parameter."""

    def weight(self, parameter: nn.Parameter) -> Slot:
        """The slot of a parameter; an average follows its first copy."""

    def quantity(self, parameter: nn.Parameter, name: str) -> Slot:
        """The slot of the optimizer's tensor `name` for a parameter."""

    def set_num_updates(self, settings: OptimizerSettings, number: int) -> None:
        """Sets the optimizer's count of updates, and creates missing state."""

    def refresh(self) -> None:
        """Copies the weights that this rank holds into the network, if they are apart."""


class Replicated:
    """Keeps all state whole on every rank."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def weight(self, parameter: nn.Parameter) -> Slot:
        return whole(parameter)

    def quantity(self, parameter: nn.Parameter, name: str) -> Slot:
        return whole(self._optimizer.state[parameter][name])

    def set_num_updates(self, settings: OptimizerSettings, number: int) -> None:
        tensors = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        set_num_updates(self._optimizer, settings, tensors=tensors, num_updates=number)

    def refresh(self) -> None:
        pass


class WeightAverage:
    """Averages tensors that change in place: `average = d * average + (1 - d) * tensor`.

    `d` after `t` updates is `min(decay, (1 + t) / (10 + t))`, which limits the influence of the random first weights
    on a short run (the `num_updates` rule of TensorFlow's ExponentialMovingAverage). Integer tensors are not averaged.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.followed = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        self.average = {name: tensor.detach().clone().float() for name, tensor in self.followed.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average with the current tensors, if it has any."""
        if not self.average:
            return
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        followed = [self.followed[name].float() for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), followed, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchanges the followed tensors for their average in the body, and restores them afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, tensor in self.followed.items():
            tensor.data, self.average[name] = self.average[name], tensor.data


class TrainingState:
    """Weights, buffers, optimizer state and averages of a network in training, by the names of state.py.

    It is a part of checkpoints. All ranks call every method together.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        trained: Mapping[str, nn.Parameter],
        placement: Placement,
        optimizer: OptimizerSettings,
        decay: float | None,
        world: World,
    ) -> None:
        self._module, self._trained, self._placement = module, trained, placement
        self._optimizer, self._world = optimizer, world
        self._set_num_updates(0)
        followed = dict(module.named_buffers()) if decay is not None else {}
        for name, parameter in trained.items() if decay is not None else ():
            followed[name] = placement.weight(parameter).copies[0][0]
        self._average = WeightAverage(followed, decay=decay or 0.0)
        self._copies: dict[str, torch.Tensor] = {}  # the last snapshot; allocation costs more than copying
        whole_names = {name for name, slot in self._slots().items() if slot.is_whole_here}
        self._owners = {name: rank for rank, names in enumerate(world.gather(whole_names)) for name in names}

    def after_update(self) -> None:
        """Counts an update of the weights, and adds them to the average."""
        self._num_updates += 1
        self._average.update()

    @contextmanager
    def average_in_place(self) -> Iterator[None]:
        """Puts the averaged weights, if there are any, into the network."""
        if not self._average.average:
            yield
            return
        with self._average.in_place():
            self._placement.refresh()
            yield
        self._placement.refresh()

    def snapshot(self) -> Writer:
        """Copies this rank's share of the state; returns the writer of the copy.

        The share is the tensors that only this rank holds whole, and every `size`-th of the rest. The next snapshot
        overwrites the copy, so it must wait for the writer. File names differ between ranks.
        """
        rank, size = self._world.rank, self._world.size
        for index, (name, slot) in enumerate(sorted(self._slots().items())):
            writer = self._owners.get(name, index % size)
            tensor = None
            if name not in self._owners:
                tensor = slot.read_on(writer)  # all ranks take part
            elif writer == rank:
                tensor = slot.read_here()
            if writer == rank:
                assert tensor is not None
                if name not in self._copies:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                    self._copies[name] = copy
                self._copies[name].copy_(tensor.detach())
        counts = {"num_updates": self._num_updates, "num_average_updates": self._average.num_updates}
        return lambda folder: write_part(folder, self._copies, counts=counts, rank=rank, size=size)

    def load(self, folder: Path) -> None:
        """Restores the state, bit for bit, from any engine and world size; raises `UserError` if it does not fit."""
        reader = StateReader(folder)
        slots = self._slots()
        reader.check({name: slot.shape for name, slot in slots.items()})
        for name, slot in slots.items():
            slot.write(reader.read(name))
        self._placement.refresh()
        self._set_num_updates(reader.counts["num_updates"])
        self._average.num_updates = reader.counts["num_average_updates"]

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole fp32 state dict, averaged if the engine averages, on the CPU of rank 0; empty on other ranks."""
        slots, weights = self._slots(), {}
        names = {tensor: name for name, tensor in chain(self._module.named_parameters(), self._module.named_buffers())}
        for name, tensor in self._module.state_dict(keep_vars=True).items():
            keys = [f"{kind}/{names[tensor]}" for kind in ("average", "weight", "buffer")]
            whole_tensor = next(slots[key] for key in keys if key in slots).read_on(0)
            if self._world.rank == 0:
                assert whole_tensor is not None
                weights[name] = in_fp32(whole_tensor).to("cpu", copy=True)
        return weights

    def _set_num_updates(self, number: int) -> None:
        self._num_updates = number
        self._placement.set_num_updates(self._optimizer, number)

    def _slots(self) -> dict[str, Slot]:
        weights = {name: self._placement.weight(parameter) for name, parameter in self._module.named_parameters()}
        buffers = {name: whole(buffer) for name, buffer in self._module.named_buffers()}
        slots = {f"weight/{name}": slot for name, slot in weights.items()}
        slots |= {f"buffer/{name}": slot for name, slot in buffers.items()}
        for name, parameter in self._trained.items():
            for quantity in quantities(self._optimizer):
                slots[f"{quantity}/{name}"] = self._placement.quantity(parameter, quantity)
        followed = weights | buffers
        return slots | {f"average/{name}": followed[name].like(t) for name, t in self._average.average.items()}
