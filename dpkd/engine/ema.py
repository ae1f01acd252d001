"""The exponential moving average of a network's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


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
        """Updates the average with the current tensors."""
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
