"""The inputs of losses, from outputs of networks that a test makes up."""

from collections.abc import Mapping

import torch

from dpkd.data.batch import Batch, View
from dpkd.objectives.base import Context, Supervision


def context_of(
    outputs: Mapping[str, torch.Tensor],
    taught: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    maps: Mapping[str, torch.Tensor] | None = None,
    num_views: int = 1,
) -> Context:
    """A micro-batch in which the student has these outputs, and each teacher those, on all views."""
    size = len(next(iter(outputs.values()))) // num_views
    label_B = torch.arange(size) % 3
    view = View(torch.zeros(num_views * size, 3, 4, 4, dtype=torch.uint8), maps or {})
    batch = Batch({"global": view}, {"class": label_B}, label_B, label_B)
    supervision = Supervision(("a", "b", "c"), 1.0, torch.zeros(3))
    teachers = {name: {"global": dict(teacher)} for name, teacher in taught.items()}
    return Context(batch, {"global": dict(outputs)}, teachers, supervision, step=0, seed=0)
