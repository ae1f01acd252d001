"""Distillation of logits. Axes: B sample, K class."""

import torch.nn.functional as F
from torch import Tensor


def distil_logits(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float) -> Tensor:
    """`temperature² · KL(teacher ‖ student)` of the softened class distributions, mean over samples; a scalar.

    Hinton et al. 2015, section 2: the square keeps the gradient's size as the temperature changes.
    """
    student_BK = F.log_softmax(student_BK.float() / temperature, dim=1)
    teacher_BK = F.log_softmax(teacher_BK.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student_BK, teacher_BK, reduction="batchmean", log_target=True)
