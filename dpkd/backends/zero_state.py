"""Slots of DeepSpeed's weights and optimizer state at ZeRO stages 1 to 3, to read and write them whole.

All weights are fp32, so a parameter is bit for bit its master weight. ZeRO keeps a second copy of it, which writing
must keep equal.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dpkd.engine.optimizer import set_num_updates
from dpkd.engine.settings import OptimizerSettings
from dpkd.engine.slots import Placement, Replicated, Slot
from dpkd.engine.world import World


class PartedOptimizer:
    """Stages 1 and 2: whole weights, the optimizer's state and second copies of the weights in parts.

    A parameter is in the part of one rank, except parameters at the edges of parts.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def weight(self, parameter: nn.Parameter) -> Slot:
        return Slot(parameter.shape, ((parameter, 0), *self._part(parameter)))

    def quantity(self, parameter: Any, name: str) -> Slot:
        # DeepSpeed gathers it on all ranks
        return Slot(parameter.shape, self._part(parameter, name), lambda *_: parameter.get_full_hp_param(name))

    def _part(self, parameter: Any, quantity: str | None = None) -> tuple[tuple[torch.Tensor, int], ...]:
        """This rank's part of the second copy of a weight, or of a quantity; empty if it is on other ranks."""
        mapping = parameter._hp_mapping if parameter.requires_grad else None  # noqa: SLF001
        if mapping is None:
            return ()
        return ((mapping.get_hp_fragment(quantity), mapping.lp_fragment_address.start),)

    def set_num_updates(self, settings: OptimizerSettings, number: int) -> None:
        flats = self._zero.single_partition_of_fp32_groups
        set_num_updates(self._zero.optimizer, settings, tensors=flats, num_updates=number)
        self._zero._lazy_init_hp_params_optimizer_state()  # noqa: SLF001 (DeepSpeed calls it only after its first step)

    def refresh(self) -> None:
        pass


class Sharded:
    """Stage 3: every tensor, frozen ones too, is flat, padded, and in equal shards on all ranks."""

    def __init__(self, zero: Any, *, world: World) -> None:
        self._zero = zero
        self._world = world

    def weight(self, parameter: Any) -> Slot:
        second = (self._zero.get_local_fp32_param(parameter),) if parameter.requires_grad else ()
        return self._slot(parameter, parameter.ds_tensor, *second)

    def quantity(self, parameter: nn.Parameter, name: str) -> Slot:
        return self._slot(parameter, self._zero.get_local_fp32_param(parameter, name))

    def _slot(self, parameter: Any, *shards: torch.Tensor) -> Slot:
        start = self._world.rank * shards[0].numel()
        return Slot(torch.Size(parameter.ds_shape), tuple((shard, start) for shard in shards), self._gather)

    def _gather(self, slot: Slot, rank: int) -> torch.Tensor | None:
        shard = slot.copies[0][0].detach().flatten()
        padded: torch.Tensor | None = None
        if self._world.size == 1:
            padded = shard
        elif self._world.rank == rank:
            padded = shard.new_empty(self._world.size * shard.numel())
            dist.gather(shard, list(padded.split(shard.numel())), dst=rank)
        else:
            dist.gather(shard, dst=rank)
        return None if padded is None else padded[: slot.shape.numel()].view(slot.shape)

    def set_num_updates(self, settings: OptimizerSettings, number: int) -> None:
        flats = self._zero.fp32_partitioned_groups_flat
        set_num_updates(self._zero.optimizer, settings, tensors=flats, num_updates=number)

    def refresh(self) -> None:
        self._zero.parameter_offload.partition_all_parameters()  # drops whole weights without writing them back
        always_whole = self._zero.persistent_parameters
        if always_whole:
            always_whole[0].all_gather(always_whole)


def placement(optimizer: Any, *, stage: int, world: World) -> Placement:
    """The placement of the state of DeepSpeed's optimizer at a ZeRO stage."""
    if stage == 0:
        return Replicated(optimizer)
    return PartedOptimizer(optimizer) if stage < 3 else Sharded(optimizer, world=world)
