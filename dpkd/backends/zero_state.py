"""Where DeepSpeed keeps weights and optimizer state at each ZeRO stage, and how to read and write them whole.

A slot is one tensor of the engine's state. Reading a sharded one gathers it, so all ranks read the same slots in the
same order; writing takes this rank's share out of the whole. All weights are fp32, so a parameter is
bit for bit its master weight, of which ZeRO keeps a second copy that writing must keep equal.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from dpkd.engine.ema import WeightAverage
from dpkd.engine.optimizer import set_num_updates
from dpkd.engine.settings import OptimizerSettings
from dpkd.engine.world import World


class Slot(Protocol):
    """One tensor of an engine's state."""

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""

    def read(self) -> torch.Tensor:
        """The whole tensor, on every rank."""

    def read_on(self, rank: int) -> torch.Tensor | None:
        """The whole tensor on this rank; what the others get is of no use. All call it."""

    def write(self, whole: torch.Tensor) -> None:
        """Takes over `whole`, or this rank's share of it."""


@dataclass(frozen=True)
class Whole:
    """A tensor that every rank holds whole."""

    tensor: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """See `Slot`."""
        return self.tensor.shape

    def read(self) -> torch.Tensor:
        """See `Slot`."""
        return self.tensor.detach()

    def read_on(self, rank: int) -> torch.Tensor:  # noqa: ARG002 (every rank holds it)
        """See `Slot`."""
        return self.read()

    def write(self, whole: torch.Tensor) -> None:
        """See `Slot`."""
        self.tensor.detach().copy_(whole)


@dataclass(frozen=True)
class Master:
    """A weight at stage 1 or 2: whole on every rank, with a second fp32 copy of this rank's part in the optimizer."""

    parameter: Any

    @property
    def shape(self) -> torch.Size:
        """See `Slot`."""
        return torch.Size(self.parameter.shape)

    def read(self) -> torch.Tensor:
        """See `Slot`."""
        whole: torch.Tensor = self.parameter.detach()
        return whole

    def read_on(self, rank: int) -> torch.Tensor:  # noqa: ARG002 (every rank holds it)
        """See `Slot`."""
        return self.read()

    def write(self, whole: torch.Tensor) -> None:
        """See `Slot`."""
        self.parameter.detach().copy_(whole)
        self.parameter.set_full_hp_param(self.parameter.detach())


@dataclass(frozen=True)
class OptimizerPart:
    """A quantity of the optimizer at stage 1 or 2: each rank holds the part that it updates."""

    parameter: Any
    quantity: str

    @property
    def shape(self) -> torch.Size:
        """See `Slot`."""
        return torch.Size(self.parameter.shape)

    def read(self) -> torch.Tensor:
        """See `Slot`."""
        whole: torch.Tensor = self.parameter.get_full_hp_param(self.quantity)
        return whole

    def read_on(self, rank: int) -> torch.Tensor:  # noqa: ARG002 (DeepSpeed gathers on all ranks)
        """See `Slot`."""
        return self.read()

    @property
    def is_whole_here(self) -> bool:
        """Whether this rank updates all of the parameter, as one does but for those at the edges of its part."""
        mapping = self.parameter._hp_mapping  # noqa: SLF001
        return mapping is not None and mapping.lp_fragment_address.numel == self.parameter.numel()

    def read_here(self) -> torch.Tensor:
        """The tensor where it is whole on this rank, which asks no other."""
        fragment: torch.Tensor = self.parameter._hp_mapping.get_optim_state_fragment(self.quantity)  # noqa: SLF001
        return fragment.detach().view(self.shape)

    def write(self, whole: torch.Tensor) -> None:
        """See `Slot`."""
        self.parameter.set_full_hp_param(whole, self.quantity)


@dataclass(frozen=True)
class Shard:
    """A tensor at stage 3: flat, padded to a multiple of the ranks, an equal shard on each."""

    parameter: Any
    tensor: torch.Tensor
    world: World
    master: torch.Tensor | None = None
    """The optimizer's own copy of a weight's shard, which writing keeps equal."""

    @property
    def shape(self) -> torch.Size:
        """See `Slot`."""
        return torch.Size(self.parameter.ds_shape)

    def read(self) -> torch.Tensor:
        """See `Slot`."""
        whole = self.world.concatenate(self.tensor.detach().flatten())
        return whole[: self.parameter.ds_numel].view(self.shape)

    def read_on(self, rank: int) -> torch.Tensor | None:
        """See `Slot`."""
        whole = self.world.concatenate_on(self.tensor.detach().flatten(), rank=rank)
        return None if whole is None else whole[: self.parameter.ds_numel].view(self.shape)

    def write(self, whole: torch.Tensor) -> None:
        """See `Slot`."""
        size = self.tensor.numel()
        mine = whole.flatten()[self.world.rank * size : (self.world.rank + 1) * size]
        for held in (self.tensor, self.master):
            if held is not None:
                held.detach().flatten()[: mine.numel()].copy_(mine)


class ZeroState(Protocol):
    """Where a ZeRO stage keeps the state."""

    def followed(self, parameter: nn.Parameter) -> torch.Tensor:
        """The tensor that this rank holds of a parameter, which an average follows."""

    def weight(self, parameter: nn.Parameter) -> Slot:
        """The slot of a parameter."""

    def quantity(self, parameter: nn.Parameter, name: str) -> Slot:
        """The slot of what the optimizer keeps for a parameter."""

    def average(self, parameter: nn.Parameter, tensor: torch.Tensor) -> Slot:
        """The slot of a parameter's average, of which this rank holds `tensor`."""

    def set_num_updates(self, settings: OptimizerSettings, number: int) -> None:
        """Sets the optimizer's count of updates, and makes its state where there is none."""

    def refresh(self) -> None:
        """Makes the network see the weights that this rank holds now."""


class Replicated:
    """Stage 0: everything whole on every rank."""

    def __init__(self, zero: torch.optim.Optimizer) -> None:
        self._optimizer = zero

    def followed(self, parameter: nn.Parameter) -> torch.Tensor:
        """See `ZeroState`."""
        return parameter

    def weight(self, parameter: nn.Parameter) -> Slot:
        """See `ZeroState`."""
        return Whole(parameter)

    def quantity(self, parameter: nn.Parameter, name: str) -> Slot:
        """See `ZeroState`."""
        return Whole(self._optimizer.state[parameter][name])

    def average(self, parameter: nn.Parameter, tensor: torch.Tensor) -> Slot:  # noqa: ARG002
        """See `ZeroState`."""
        return Whole(tensor)

    def set_num_updates(self, settings: OptimizerSettings, number: int) -> None:
        """See `ZeroState`."""
        tensors = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        set_num_updates(self._optimizer, settings, tensors=tensors, num_updates=number)

    def refresh(self) -> None:
        """See `ZeroState`."""


class PartedOptimizer:
    """Stages 1 and 2: weights whole, the optimizer's state in parts."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def followed(self, parameter: nn.Parameter) -> torch.Tensor:
        """See `ZeroState`."""
        return parameter

    def weight(self, parameter: nn.Parameter) -> Slot:
        """See `ZeroState`."""
        return Master(parameter) if parameter.requires_grad else Whole(parameter)

    def quantity(self, parameter: nn.Parameter, name: str) -> Slot:
        """See `ZeroState`."""
        return OptimizerPart(parameter, name)

    def average(self, parameter: nn.Parameter, tensor: torch.Tensor) -> Slot:  # noqa: ARG002
        """See `ZeroState`."""
        return Whole(tensor)

    def set_num_updates(self, settings: OptimizerSettings, number: int) -> None:
        """See `ZeroState`."""
        base, flats = self._zero.optimizer, self._zero.single_partition_of_fp32_groups
        set_num_updates(base, settings, tensors=flats, num_updates=number)
        self._zero._lazy_init_hp_params_optimizer_state()  # noqa: SLF001 (it does so after its first step only)

    def refresh(self) -> None:
        """See `ZeroState`."""


class Sharded:
    """Stage 3: weights, frozen ones too, and the optimizer's state in shards."""

    def __init__(self, zero: Any, *, world: World) -> None:
        self._zero = zero
        self._world = world

    def followed(self, parameter: nn.Parameter) -> torch.Tensor:
        """See `ZeroState`."""
        sharded: Any = parameter
        shard: torch.Tensor = sharded.ds_tensor
        return shard

    def weight(self, parameter: nn.Parameter) -> Slot:
        """See `ZeroState`."""
        master = self._zero.get_local_fp32_param(parameter) if parameter.requires_grad else None
        return Shard(parameter, self.followed(parameter), self._world, master=master)

    def quantity(self, parameter: nn.Parameter, name: str) -> Slot:
        """See `ZeroState`."""
        return Shard(parameter, self._zero.get_local_fp32_param(parameter, name), self._world)

    def average(self, parameter: nn.Parameter, tensor: torch.Tensor) -> Slot:
        """See `ZeroState`."""
        return Shard(parameter, tensor, self._world)

    def set_num_updates(self, settings: OptimizerSettings, number: int) -> None:
        """See `ZeroState`."""
        flats = self._zero.fp32_partitioned_groups_flat
        set_num_updates(self._zero.optimizer, settings, tensors=flats, num_updates=number)

    def refresh(self) -> None:
        """See `ZeroState`."""
        self._zero.parameter_offload.partition_all_parameters()  # drops whole weights without writing them back
        always_whole = self._zero.persistent_parameters
        if always_whole:
            always_whole[0].all_gather(always_whole)


def zero_state(zero: Any, *, stage: int, world: World) -> ZeroState:
    """The state that DeepSpeed's optimizer `zero` keeps at a ZeRO stage."""
    if stage == 0:
        return Replicated(zero)
    return PartedOptimizer(zero) if stage < 3 else Sharded(zero, world=world)


def whole_on(slots: Mapping[str, Slot], *, world: World) -> dict[str, int]:
    """The rank of each slot that lies whole on one rank alone, which so can copy it without the others."""
    here = {name for name, slot in slots.items() if isinstance(slot, OptimizerPart) and slot.is_whole_here}
    return {name: rank for rank, names in enumerate(world.gather(here)) for name in names}


def share(slots: Mapping[str, Slot], *, owners: Mapping[str, int], world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """What this rank writes, whole: its own of `owners`, and its turns of the rest. All ranks iterate to the end."""
    for place, (name, slot) in enumerate(sorted(slots.items())):
        if name in owners:
            if owners[name] == world.rank:
                assert isinstance(slot, OptimizerPart)
                yield name, slot.read_here()
            continue
        writer = place % world.size
        whole = slot.read_on(writer)
        if writer == world.rank:
            assert whole is not None
            yield name, whole


class NetworkState:
    """Every slot of a network in training, by the names of engine_state.py."""

    def __init__(
        self,
        module: nn.Module,
        *,
        trained: Mapping[str, nn.Parameter],
        zero: ZeroState,
        decay: float | None,
    ) -> None:
        self.module = module
        self.trained = trained
        self.zero = zero
        followed = {name: zero.followed(parameter) for name, parameter in trained.items()} | dict(
            module.named_buffers()
        )
        self.averaged = None if decay is None else WeightAverage(followed, decay=decay)

    @contextmanager
    def average_in_place(self) -> Iterator[None]:
        """Puts the average, where there is one, into the network."""
        if self.averaged is None:
            yield
            return
        with self.averaged.in_place():
            self.zero.refresh()
            yield
        self.zero.refresh()

    def slots(self, quantities: tuple[str, ...]) -> dict[str, Slot]:
        """Every slot by name."""
        slots: dict[str, Slot] = {f"weight/{name}": self.zero.weight(p) for name, p in self.module.named_parameters()}
        slots |= {f"buffer/{name}": Whole(buffer) for name, buffer in self.module.named_buffers()}
        for name, parameter in self.trained.items():
            slots |= {f"{quantity}/{name}": self.zero.quantity(parameter, quantity) for quantity in quantities}
        if self.averaged is not None:
            for name, tensor in self.averaged.average.items():
                trained = name in self.trained
                slots[f"average/{name}"] = self.zero.average(self.trained[name], tensor) if trained else Whole(tensor)
        return slots

    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict as the network computes with it now, whole."""
        with torch.no_grad():
            return {
                name: (self.zero.weight(tensor).read() if isinstance(tensor, nn.Parameter) else tensor)
                for name, tensor in self.module.state_dict(keep_vars=True).items()
            }
