"""Cross-entropy on visible labels. Axes: B sample, K class, N all samples of a split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpkd.objectives.base import Context, Needs, Objective

if TYPE_CHECKING:
    from torch import Tensor


class Supervised(Objective):
    """Cross-entropy on the visible labels; samples without one do not count."""

    kind: Literal["supervised"] = "supervised"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    balance: Literal["auto", "none", "logit_adjusted", "deferred"] = "auto"
    """`logit_adjusted` adds `tau * log(class prior)` to the logits (Menon et al. 2021); tau 1 is balanced softmax.

    `deferred` weighs rare classes up in the last fifth of the steps (Cao et al. 2019); `auto` does as
    `training.imbalance` says.
    """
    tau: float = Field(1.0, ge=0)

    def needs(self) -> Needs:
        return Needs(student=("logits",), targets=("class",))

    def loss(self, context: Context) -> Tensor:
        return self.weight * self.of_labels(context, context.student("logits"), context.batch.targets["class"])

    def of_labels(
        self, context: Context, logits_BK: Tensor, label_B: Tensor, *, weight_B: Tensor | None = None
    ) -> Tensor:
        """The balanced loss of these logits, without the objective's weight; `weight_B` is that of each sample."""
        facts = context.supervision
        balance = facts.recipe if self.balance == "auto" else self.balance
        if balance == "deferred" and context.step >= facts.deferred_from:
            assert facts.class_weight_K is not None, "supervision of a training has weights"
            class_weight_B = facts.class_weight_K[label_B.clamp(min=0)]
            weight_B = class_weight_B if weight_B is None else weight_B * class_weight_B
        return supervised(
            logits_BK,
            label_B,
            labelled_share=facts.labelled_share,
            label_smoothing=self.label_smoothing,
            log_prior_K=facts.log_prior_K if balance == "logit_adjusted" else None,
            tau=self.tau,
            weight_B=weight_B,
        )


def supervised(
    logits_BK: Tensor,
    label_B: Tensor,
    *,
    labelled_share: float = 1.0,
    label_smoothing: float = 0.0,
    log_prior_K: Tensor | None = None,
    tau: float = 1.0,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Cross-entropy summed over the labelled samples (label >= 0), divided by `B * labelled_share`; a scalar.

    `labelled_share` is the expected share of labelled samples. The division by it, not by the number in this batch,
    makes the mean over micro-batches independent of the cut of the batch. `log_prior_K` adds `tau * log prior` to the
    logits (Menon et al. 2021, eq. 10; tau 1 is balanced softmax, Ren et al. 2020); `weight_B` multiplies the loss of
    each sample. Zero, with gradients, if no sample is labelled.
    """
    import torch.nn.functional as F

    assert labelled_share > 0, "supervised loss without a labelled sample in the split"
    if log_prior_K is not None:
        logits_BK = logits_BK + tau * log_prior_K
    loss_B = F.cross_entropy(
        logits_BK.float(), label_B, ignore_index=-1, reduction="none", label_smoothing=label_smoothing
    )
    total = (loss_B if weight_B is None else weight_B * loss_B).sum()
    return total / (len(label_B) * labelled_share)


def log_class_prior(count_K: Tensor) -> Tensor:
    """Logarithm of each class's share of the labels; K float32.

    A class without a label counts as half a sample, so the logarithm is finite.
    """
    count_K = count_K.double().clamp(min=0.5)
    return (count_K / count_K.sum()).log().float()
