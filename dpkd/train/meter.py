"""Counts what training costs and yields between two log lines: losses, rates, norms, images/s, waits for data."""

import time
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from dpkd.data.batch import Batch
from dpkd.engine.world import World
from dpkd.report.goodput import StepTimer
from dpkd.train.divergence import Norm


class Sink(Protocol):
    """Where numbers go, on rank 0."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Takes the numbers of one step by name, such as `loss/<network>/<objective>` and `speed/images_per_s`."""


class Meter:
    """Sums on the device, reads it only when a line is due, and averages over ranks."""

    def __init__(
        self, *, sinks: tuple[Sink, ...], world: World, images_per_step: int, timer: StepTimer | None = None
    ) -> None:
        self.timer = timer or StepTimer()
        self._sinks = sinks
        self._world = world
        self._images_per_step = images_per_step
        self._pending: list[tuple[str, int, float, torch.Tensor]] = []
        self._reset()

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch on this rank's device; the wait is counted."""
        with self.timer.interrupted("data_wait"):
            return next(batches).to(self._world.device)

    def add_losses(self, name: str, losses: Mapping[str, torch.Tensor]) -> None:
        """Adds the losses of one network on one micro-batch."""
        for objective, loss in losses.items():
            key = f"loss/{name}/{objective}"
            self._losses[key] = self._losses.get(key, 0.0) + loss.detach().float()

    def end_micro_batch(self) -> None:
        """Counts one micro-batch of all networks."""
        self._micro_batches += 1

    def add_step(self, name: str, gradient_norm: torch.Tensor, *, step: int, learning_rate: float) -> None:
        """Adds one engine's step, whose norm stays on the device."""
        self._pending.append((name, step, learning_rate, gradient_norm.detach().double()))

    def settle(self, step: int, *, log: bool) -> list[Norm]:
        """The norms since the last call, read from the device; with `log` the sinks get the means since the last line.

        Losses and norms are read at once. Every rank calls it; nothing is logged where no step was trained.
        """
        keys = sorted(self._losses) if log else []
        device = self._world.device
        tensors = [torch.as_tensor(self._losses[key], device=device) for key in keys]
        if tensors:
            tensors = [self._world.mean_(torch.stack(tensors) / self._micro_batches).double()]
        tensors += [torch.stack([norm.to(device) for *_, norm in self._pending])] if self._pending else []
        numbers = torch.cat(tensors).tolist() if tensors else []
        norms = [
            Norm(name, step_of, rate, value)
            for (name, step_of, rate, _), value in zip(self._pending, numbers[len(keys) :], strict=True)
        ]
        self._pending = []
        self._settled += norms
        if log and self._settled:
            self._write(step, dict(zip(keys, numbers, strict=False)))
        return norms

    def _write(self, step: int, values: dict[str, float]) -> None:
        spent = {name: total_s - self._spent_before[name] for name, total_s in self.timer.seconds.items()}
        elapsed = time.perf_counter() - self._began - spent["checkpoint"] - spent["evaluation"]
        for name in dict.fromkeys(norm.name for norm in self._settled):
            own = [norm for norm in self._settled if norm.name == name]
            values[f"gradient_norm/{name}"] = sum(norm.value for norm in own) / len(own)
            values[f"learning_rate/{name}"] = own[-1].learning_rate
        steps = len({norm.step for norm in self._settled})
        values["speed/images_per_s"] = steps * self._images_per_step / elapsed
        values["speed/data_wait"] = spent["data_wait"] / elapsed
        if self._world.device.type == "cuda":
            values["speed/gpu_memory_gb"] = torch.cuda.max_memory_allocated(self._world.device) / 1e9
        if self._world.rank == 0:
            for sink in self._sinks:
                sink.write(step, values)
        self._reset()

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._spent_before = dict(self.timer.seconds)
        self._micro_batches = 0
        self._losses: dict[str, torch.Tensor | float] = {}
        self._settled: list[Norm] = []
