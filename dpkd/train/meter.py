"""Measurement of training: losses, rates, norms and images/s of each log line, and the time of the loop by purpose."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch.profiler import record_function

from dpkd.data.batch import Batch
from dpkd.engine.world import World
from dpkd.errors import StopRequested
from dpkd.report.goodput import INTERRUPTIONS, Interruption
from dpkd.train.divergence import Norm


class Meter:
    """Sums losses on the device, reads them only when they are due, and averages over ranks; times the loop.

    `report` takes `kind, *, step, **numbers`: kind `train` with the numbers of a log line
    (`loss/<network>/<objective>`, …), and the events of the loop (report/goodput.py). Only rank 0 has a `report`.
    `speed/tflops` is the speed of one device; `speed/mfu` is its share of the peak (model FLOPs utilisation,
    Chowdhery et al. 2022: recomputed activations do not count).
    """

    def __init__(
        self,
        *,
        world: World,
        images_per_step: int,
        report: Callable[..., None] | None = None,
        flops_per_image: Callable[[], int | None] = lambda: None,
        peak_tflops: float | None = None,
    ) -> None:
        self.seconds: dict[Interruption, float] = dict.fromkeys(INTERRUPTIONS, 0.0)
        """Total time of each kind of interruption until now."""
        self._world, self._images_per_step, self._report = world, images_per_step, report
        self._flops_per_image, self._peak_tflops = cache(flops_per_image), peak_tflops  # counted for the first line
        self._done, self._any_event = 0, False
        self._event_seconds = dict(self.seconds)  # as of the last event
        self._pending: list[tuple[str, int, float, torch.Tensor]] = []
        self._begin_line()

    def _begin_line(self) -> None:
        self._line_began_s, self._line_seconds = time.perf_counter(), dict(self.seconds)
        self._losses: dict[str, torch.Tensor | float] = {}
        self._num_micros = 0
        self._settled: list[Norm] = []

    @contextmanager
    def loop(self, start_step: int) -> Iterator[None]:
        """Times the body, which is the training loop from `start_step` on, and reports its start and end."""
        self._done = start_step
        if self._report is not None:
            self._report("loop_began", step=start_step)
        finished, step_begun = False, 1  # an error interrupts a step
        try:
            yield
            finished, step_begun = True, 0
        except StopRequested:
            step_begun = 0
            raise
        finally:
            self._write_spent("loop_ended", self._done + step_begun, finished=finished)

    @contextmanager
    def interrupted(self, by: Interruption) -> Iterator[None]:
        """Counts the time of the body as an interruption."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[by] += time.perf_counter() - began_s

    def end_step(self, done: int, *, due: bool) -> None:
        """Ends step number `done`; reports the time spent if `due`, and after the first step."""
        self._done = done
        if due or not self._any_event:
            self._any_event = True
            self._write_spent("spent", done)

    def _write_spent(self, kind: str, step: int, **facts: bool) -> None:
        spent = {f"{name}_s": round(total - self._event_seconds[name], 4) for name, total in self.seconds.items()}
        self._event_seconds = dict(self.seconds)
        if self._report is not None:
            self._report(kind, step=step, **facts, **spent)

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next micro-batch of all networks, on this rank's device; the wait is timed."""
        self._num_micros += 1
        with self.interrupted("data_wait"):
            with record_function("dpkd: wait for data"):
                batch = next(batches)
            with record_function("dpkd: copy to the device"):
                return batch.to(self._world.device)

    def add_losses(self, name: str, losses: Mapping[str, torch.Tensor]) -> None:
        """Adds the losses of one network on one micro-batch."""
        for objective, loss in losses.items():
            key = f"loss/{name}/{objective}"
            self._losses[key] = self._losses.get(key, 0.0) + loss.detach().float()

    def add_norm(self, name: str, gradient_norm: torch.Tensor, *, step: int, learning_rate: float) -> None:
        """Adds the gradient norm of one network's step; it stays on the device."""
        self._pending.append((name, step, learning_rate, gradient_norm.detach().double()))

    def settle(self, step: int, *, log: bool) -> list[Norm]:
        """The norms since the last call, read from the device; `log` also reports the means since the last line.

        One transfer reads losses and norms. Every rank calls it. Reports nothing if no step was trained.
        """
        keys = sorted(self._losses) if log else []
        device = self._world.device
        tensors = [torch.as_tensor(self._losses[key], device=device) for key in keys]
        if tensors:
            tensors = [self._world.mean_(torch.stack(tensors) / self._num_micros).double()]
        tensors += [torch.stack([norm.to(device) for *_, norm in self._pending])] if self._pending else []
        values = torch.cat(tensors).tolist() if tensors else []
        norms = [
            Norm(name, step_of, rate, value)
            for (name, step_of, rate, _), value in zip(self._pending, values[len(keys) :], strict=True)
        ]
        self._pending = []
        self._settled += norms
        if log and self._settled:
            if self._report is not None:
                self._report("train", step=step, **self._line(dict(zip(keys, values, strict=False))))
            self._begin_line()
        return norms

    def _line(self, losses: dict[str, float]) -> dict[str, float]:
        """The numbers of a log line: mean losses, norms, rates and speed since the previous line."""
        numbers = dict(losses)
        for name in dict.fromkeys(norm.name for norm in self._settled):
            norms = [norm for norm in self._settled if norm.name == name]
            numbers[f"gradient_norm/{name}"] = sum(norm.value for norm in norms) / len(norms)
            numbers[f"learning_rate/{name}"] = norms[-1].learning_rate
        spent = {name: total_s - self._line_seconds[name] for name, total_s in self.seconds.items()}
        elapsed_s = time.perf_counter() - self._line_began_s - spent["checkpoint"] - spent["evaluation"]
        num_steps = len({norm.step for norm in self._settled})
        numbers["speed/images_per_s"] = num_steps * self._images_per_step / elapsed_s
        numbers["speed/data_wait"] = spent["data_wait"] / elapsed_s
        if flops := self._flops_per_image():
            numbers["speed/tflops"] = numbers["speed/images_per_s"] * flops / self._world.size / 1e12
            if self._peak_tflops is not None:
                numbers["speed/mfu"] = numbers["speed/tflops"] / self._peak_tflops
        if self._world.device.type == "cuda":
            numbers["speed/gpu_memory_gb"] = torch.cuda.max_memory_allocated(self._world.device) / 1e9
        return numbers
