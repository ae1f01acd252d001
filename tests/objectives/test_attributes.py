"""Learning attributes: the losses against scikit-learn and float64, and the same however a batch is cut."""

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from dpkd.data.attributes import score_weights
from dpkd.objectives.attributes import predict_attributes
from dpkd.objectives.supervised import supervised

RNG = np.random.default_rng(0)
NAN = float("nan")
VALUE_KA = np.array([[0.0, 0.3, NAN], [1.0, NAN, 0.5], [0.5, 1.0, 0.0], [NAN, NAN, NAN]])
LABEL_B = np.array([0, 2, -1, 1, 3, 2, 0, -1])


def cross_entropy(share: float, target: float) -> float:
    """Of a graded target, as the mean over draws of it."""
    chances = [1 - share, share]
    return sum(
        weight * log_loss([hit], [chances], labels=[0, 1]) for hit, weight in ((1, target), (0, 1 - target)) if weight
    )


def test_it_is_the_cross_entropy_of_every_known_statement():
    logit_BA = RNG.normal(size=(8, 3)) * 2
    share_BA = 1 / (1 + np.exp(-logit_BA))
    total = sum(
        cross_entropy(share_BA[b, a], VALUE_KA[label, a])
        for b, label in enumerate(LABEL_B)
        for a in range(3)
        if label >= 0 and not np.isnan(VALUE_KA[label, a])
    )
    loss = predict_attributes(
        torch.tensor(logit_BA), torch.tensor(LABEL_B), torch.tensor(VALUE_KA), labelled_share=0.75
    )
    assert float(loss) == pytest.approx(total / (8 * 0.75 * 3), rel=1e-5)


def test_what_is_not_known_or_not_labelled_moves_nothing():
    logit_BA = torch.zeros(8, 3, dtype=torch.float64, requires_grad=True)
    predict_attributes(logit_BA, torch.tensor(LABEL_B), torch.tensor(VALUE_KA)).backward()
    known_BA = (LABEL_B >= 0)[:, None] & ~np.isnan(VALUE_KA[LABEL_B])
    assert (logit_BA.grad[~torch.tensor(known_BA)] == 0).all()
    # at even odds the gradient is zero just where the target is one half
    pulled_BA = known_BA & (VALUE_KA[LABEL_B] != 0.5)
    assert (logit_BA.grad[torch.tensor(pulled_BA)] != 0).all()


def test_the_losses_do_not_depend_on_how_a_batch_is_cut():
    label_B, value_KA = torch.tensor(LABEL_B), torch.tensor(VALUE_KA, dtype=torch.float32)
    weight_KA, bias_K = (torch.from_numpy(array) for array in score_weights(VALUE_KA))
    logit_BA = torch.randn(8, 3)

    def both(logits, labels):
        return torch.stack(
            [
                predict_attributes(logits, labels, value_KA, labelled_share=0.75),
                supervised(logits @ weight_KA.T + bias_K, labels, labelled_share=0.75),
            ]
        )

    whole = both(logit_BA, label_B)
    assert (whole > 0).all()
    for size in (1, 2, 4):
        parts = zip(logit_BA.split(size), label_B.split(size), strict=True)
        torch.testing.assert_close(torch.stack([both(*part) for part in parts]).mean(0), whole)


def test_a_batch_without_labels_gives_zero_and_zero_gradients():
    logit_BA = torch.randn(4, 3, requires_grad=True)
    weight_KA, bias_K = (torch.from_numpy(array) for array in score_weights(VALUE_KA))
    label_B = torch.full((4,), -1)
    loss = predict_attributes(logit_BA, label_B, torch.tensor(VALUE_KA))
    loss = loss + supervised(logit_BA @ weight_KA.T + bias_K, label_B)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(logit_BA.grad, torch.zeros(4, 3))


def test_classes_are_as_likely_as_their_rows():
    value_KA = RNG.uniform(0.05, 0.95, size=(5, 4))
    weight_KA, bias_K = (torch.from_numpy(array).double() for array in score_weights(value_KA))
    logit_BA, label_B = RNG.normal(size=(6, 4)), np.array([0, 4, 2, 2, -1, 1])
    share_BA = 1 / (1 + np.exp(-logit_BA))
    one, other = value_KA[None], share_BA[:, None]
    divergence_BK = (one * np.log(one / other) + (1 - one) * np.log((1 - one) / (1 - other))).sum(2)
    chance_BK = np.exp(-divergence_BK) / np.exp(-divergence_BK).sum(1, keepdims=True)
    expected = -np.log(chance_BK[np.arange(6), label_B])[label_B >= 0].sum() / 6
    loss = supervised(torch.tensor(logit_BA) @ weight_KA.T + bias_K, torch.tensor(label_B))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_gradients_are_those_of_finite_differences():
    label_B, value_KA = torch.tensor(LABEL_B), torch.tensor(VALUE_KA)
    logit_BA = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)

    # the loss is computed in float32, so the step is wide and the tolerance too
    def loss(logits):
        return predict_attributes(logits, label_B, value_KA, labelled_share=0.75).double()

    assert torch.autograd.gradcheck(loss, (logit_BA,), eps=1e-2, atol=1e-4)
