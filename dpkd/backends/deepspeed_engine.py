"""Training under DeepSpeed, ZeRO 0 to 3.

Parameters stay fp32 and lower precision is autocast, so that the parameters are the master weights at every ZeRO stage:
replicated at stages 0 to 2, in shards (`ds_tensor`) at stage 3. State goes to disk tensor by tensor in the format of
dpkd/engine/state.py, and not by DeepSpeed's own checkpoints, which fit one stage and one world size.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpkd.backends.zero_state import NetworkState, share, whole_on, zero_state
from dpkd.engine.optimizer import build_optimizer, by_name, quantities, set_learning_rates, trainable
from dpkd.engine.protocol import Statistics
from dpkd.engine.settings import EngineSettings, OptimizerSettings
from dpkd.engine.state import Counts, Staging, StateReader, Writer, write_part
from dpkd.engine.torch_engine import in_fp32, use_activation_checkpointing
from dpkd.engine.world import World
from dpkd.errors import UserError


class InPrecision(nn.Module):
    """Runs a network under autocast, with fp32 outputs."""

    def __init__(self, network: nn.Module, *, device_type: str, precision: str) -> None:
        super().__init__()
        self.network = network
        self.device_type = device_type
        self.lower = precision == "bf16"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's outputs."""
        with torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.lower):
            outputs = self.network(*args, **kwargs)
        return in_fp32(outputs)


class DeepSpeedEngine:
    """DeepSpeed's engine behind the verbs of `Engine`."""

    def __init__(
        self,
        module: nn.Module,
        *,
        parameter_groups: Sequence[Any],
        optimizer: OptimizerSettings,
        settings: EngineSettings,
        world: World,
        accumulation: int,
        micro_batch_size: int,
        precision: str,
        statistics: Statistics | None = None,
    ) -> None:
        deepspeed = import_deepspeed(world)
        self.module = module.to(world.device)
        if settings.activation_checkpointing:
            use_activation_checkpointing(module)
        for tensor in module.state_dict().values():
            world.broadcast_(tensor)
        groups = trainable(parameter_groups)
        self._world = world
        self._accumulation = accumulation
        self._statistics = statistics
        self._settings = optimizer
        self._clips_itself = settings.zero_stage == 0  # DeepSpeed computes no norm there
        self._num_micros = 0
        self._optimizer = build_optimizer(groups, optimizer, fused=world.device.type == "cuda")
        sizes = {"train_micro_batch_size_per_gpu": micro_batch_size, "gradient_accumulation_steps": accumulation}
        self._engine, *_ = deepspeed.initialize(
            model=InPrecision(module, device_type=world.device.type, precision=precision),
            optimizer=self._optimizer,
            config=configuration(optimizer, stage=settings.zero_stage, on_gpu=world.device.type == "cuda") | sizes,
        )
        if settings.compile:
            self._engine.compile()
        zero = zero_state(self._engine.optimizer, stage=settings.zero_stage, world=world)
        self._state = NetworkState(module, trained=by_name(groups), zero=zero, decay=settings.ema)
        self._staging = Staging()
        self._set_num_updates(0)
        self._owners = whole_on(self._state.slots(quantities(optimizer)), world=world)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._engine.train()
        self._mark_boundary()
        if self._statistics is not None:
            self._statistics.before_micro()
        outputs = self._engine(*args, **kwargs)
        if self._statistics is not None:
            self._statistics.after_micro()
        return outputs

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self._engine.eval()
        with self._state.average_in_place():
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
        norm = self._clip() if self._clips_itself else None
        set_learning_rates(self._optimizer, learning_rate)
        self._engine.step()
        self._num_micros = 0
        self._num_updates += 1
        if self._statistics is not None:
            self._statistics.commit(self._world.mean_)
        if self._state.averaged is not None:
            self._state.averaged.update()
        return torch.as_tensor(self._engine.get_global_grad_norm() if norm is None else norm)

    def _clip(self) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(list(self._state.trained.values()), self._settings.clip or float("inf"))

    def _set_num_updates(self, number: int) -> None:
        self._num_updates = number
        self._state.zero.set_num_updates(self._settings, number)

    def snapshot(self) -> Writer:
        rank, size = self._world.rank, self._world.size
        slots = self._state.slots(quantities(self._settings))
        held = self._staging.hold(share(slots, owners=self._owners, world=self._world))
        averaged = self._state.averaged
        counts = Counts(self._num_updates, 0 if averaged is None else averaged.num_updates)
        return lambda folder: write_part(folder, held, counts=counts, rank=rank, size=size)

    def load(self, folder: Path) -> None:
        reader = StateReader(folder)
        slots = self._state.slots(quantities(self._settings))
        reader.check({name: slot.shape for name, slot in slots.items()})
        for name, slot in slots.items():
            slot.write(reader.read(name))
        self._state.zero.refresh()
        self._set_num_updates(reader.counts.num_updates)
        if self._state.averaged is not None:
            self._state.averaged.num_updates = reader.counts.num_average_updates

    def weights(self) -> dict[str, torch.Tensor]:
        with self._state.average_in_place():
            return {name: in_fp32(tensor).detach().cpu().clone() for name, tensor in self._state.weights().items()}


def configuration(optimizer: OptimizerSettings, *, stage: int, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration, but for the batch sizes."""
    return {
        "gradient_clipping": 0.0 if stage == 0 or optimizer.clip is None else optimizer.clip,
        "zero_optimization": {"stage": stage, "overlap_comm": on_gpu and stage > 1},
        "zero_allow_untested_optimizer": True,  # its list has Adam only; SGD is tested here
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU at every step
    }


def import_deepspeed(world: World) -> Any:
    """The deepspeed package, quiet and on this world's device.

    Imported here and not above because it takes seconds and decides at import which accelerator it runs on.
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
    # It would compile its shared-memory all-reduce here (tens of seconds, a C++ compiler and ninja), which only
    # inference uses; an op that is not listed as compatible is left alone.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed
