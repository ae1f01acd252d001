"""Training with DeepSpeed, ZeRO 0 to 3.

Parameters stay fp32 and lower precision is autocast, so that the parameters are the master weights at every ZeRO stage:
replicated at stages 0 to 2, in shards (`ds_tensor`) at stage 3. State is written tensor by tensor in the format of
dpkd/engine/state.py, because a checkpoint of DeepSpeed fits only one stage and one world size. ZeRO keeps a second copy
of the weights, which writing must keep equal.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dpkd.engine.batch_norm import StepStatistics
from dpkd.engine.network import InPrecision, prepare
from dpkd.engine.optimizer import ParameterGroup, build_optimizer, by_name, set_learning_rates, set_num_updates
from dpkd.engine.settings import EngineSettings, OptimizerSettings
from dpkd.engine.slots import Placement, Replicated, Slot, TrainingState
from dpkd.engine.world import World
from dpkd.errors import UserError


class DeepSpeedEngine:
    """The `Engine` of DeepSpeed."""

    def __init__(
        self,
        module: nn.Module,
        *,
        parameter_groups: Sequence[ParameterGroup],
        optimizer: OptimizerSettings,
        settings: EngineSettings,
        world: World,
        accumulation: int,
        micro_batch_size: int,
        precision: str,
    ) -> None:
        deepspeed = import_deepspeed(world)
        prepare(module, settings=settings, world=world)
        self.module = module
        self._world, self._accumulation = world, accumulation
        self._statistics = StepStatistics(module)
        self._clip = optimizer.clip or float("inf")
        self._clips_itself = settings.zero_stage == 0  # at stage 0 DeepSpeed computes no norm
        self._num_micros = 0
        trained = by_name(parameter_groups)
        self._parameters = list(trained.values())
        on_gpu = world.device.type == "cuda"
        self._optimizer = build_optimizer(parameter_groups, optimizer)
        config = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0 if self._clips_itself else optimizer.clip or 0.0,
            "zero_optimization": {"stage": settings.zero_stage, "overlap_comm": on_gpu and settings.zero_stage > 1},
            "zero_allow_untested_optimizer": True,  # DeepSpeed lists only Adam as tested; dpkd tests SGD
            "timers": {"throughput": {"enabled": False}},  # otherwise every step waits for the GPU
        }
        self._engine, *_ = deepspeed.initialize(
            model=InPrecision(module, device=world.device, precision=precision),
            optimizer=self._optimizer,
            config=config,
        )
        if settings.compile:
            self._engine.compile()
        self.state = TrainingState(
            module,
            trained=trained,
            placement=placement(self._engine.optimizer, stage=settings.zero_stage, world=world),
            optimizer=optimizer,
            decay=settings.ema,
            world=world,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._engine.train()
        self._mark_boundary()
        with self._statistics.micro_batch():
            return self._engine(*args, **kwargs)

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self._engine.eval()
        with self.state.average_in_place():
            return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        self._mark_boundary()
        self._engine.backward(loss)
        self._num_micros += 1

    def _mark_boundary(self) -> None:
        self._engine.set_gradient_accumulation_boundary(self._num_micros + 1 == self._accumulation)

    def step(self, *, learning_rate: float) -> torch.Tensor:
        assert self._num_micros == self._accumulation, (
            f"step after {self._num_micros} of {self._accumulation} backwards"
        )
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip) if self._clips_itself else None
        set_learning_rates(self._optimizer, learning_rate)
        self._engine.step()
        self._num_micros = 0
        self._statistics.commit(self._world.mean_)
        self.state.after_update()
        return torch.as_tensor(self._engine.get_global_grad_norm() if norm is None else norm, dtype=torch.float64)


def shard_frozen(network: nn.Module, *, world: World) -> nn.Module:
    """Shards the weights of a frozen network over the ranks; returns a module that runs it on all ranks together.

    ZeRO-3 without an optimizer gathers the weights of each layer while it runs. Tensors of up to 100,000 numbers stay
    whole on every rank (DeepSpeed's default). At most an eighth of the weights is gathered at a time, with prefetching.
    """
    live = sum(parameter.numel() for parameter in network.parameters()) // 8
    zero = {"stage": 3, "stage3_max_live_parameters": live, "stage3_prefetch_bucket_size": min(live, 50_000_000)}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    runner: nn.Module = import_deepspeed(world).initialize(model=network.to(world.device), config=config)[0]
    return runner


def import_deepspeed(world: World) -> Any:
    """The deepspeed package, without its log messages, on this world's device.

    Not imported at the top, because the import takes seconds and selects the accelerator.
    """
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    try:
        import deepspeed  # noqa: PLC0415
        import deepspeed.ops  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            f"engine.kind=deepspeed: {error}; install it (pip install deepspeed --no-build-isolation), "
            "or set engine.kind=torch"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed would compile its shared-memory all-reduce (tens of seconds, a C++ compiler and ninja), which only
    # inference uses; it does not compile ops that are not listed as compatible.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


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
