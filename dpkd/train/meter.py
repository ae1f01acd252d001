"""Counts what training costs and yields between two log lines: losses, rates, norms, images/s, waits for data."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from dpkd.data.stream import Batch
from dpkd.engine.world import World
from dpkd.report.goodput import StepTimer


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
        self._reset()

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch on this rank's device; the wait is counted."""
        with self.timer.interrupted("data_wait"):
            return next(batches).to(self._world.device)

    def add_losses(self, losses: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Adds the losses of one micro-batch."""
        self._micro_batches += 1
        for name, parts in losses.items():
            for objective, loss in parts.items():
                key = f"loss/{name}/{objective}"
                self._losses[key] = self._losses.get(key, 0.0) + loss.detach().float()

    def add_step(self, name: str, *, learning_rate: float, gradient_norm: float) -> None:
        """Adds one engine's step."""
        self._norms[name].append(gradient_norm)
        self._rates[name] = learning_rate

    def write(self, step: int) -> None:
        """Hands the means since the last call to the sinks; nothing where no step was trained. Every rank calls it."""
        if not self._norms:
            return
        keys = sorted(self._losses)
        means = torch.stack([torch.as_tensor(self._losses[key], device=self._world.device) for key in keys])
        means = self._world.mean_(means / self._micro_batches)
        spent = {name: total_s - self._spent_before[name] for name, total_s in self.timer.seconds.items()}
        elapsed = time.perf_counter() - self._began - spent["checkpoint"] - spent["evaluation"]
        steps = len(next(iter(self._norms.values())))
        values = dict(zip(keys, means.tolist(), strict=True))
        values |= {f"gradient_norm/{name}": sum(norms) / len(norms) for name, norms in self._norms.items()}
        values |= {f"learning_rate/{name}": rate for name, rate in self._rates.items()}
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
        self._norms: dict[str, list[float]] = defaultdict(list)
        self._rates: dict[str, float] = {}
