"""Cross-entropy on visible labels, against numbers computed by hand in float64."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpkd.data.batch import Batch, View
from dpkd.objectives.base import Context, Supervision
from dpkd.objectives.supervised import Supervised, log_class_prior, supervised

RNG = np.random.default_rng(0)


def softmax(logits_BK: np.ndarray) -> np.ndarray:
    odds_BK = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
    return odds_BK / odds_BK.sum(1, keepdims=True)


def test_it_is_minus_the_log_of_the_labels_probability():
    logits_BK, label_B = RNG.normal(size=(6, 4)), np.array([0, 3, 2, 1, 1, 0])
    expected = -np.log(softmax(logits_BK)[np.arange(6), label_B]).mean()
    assert float(supervised(torch.tensor(logits_BK), torch.tensor(label_B))) == pytest.approx(expected, rel=1e-5)


def test_smoothing_mixes_the_label_with_all_classes():
    logits_BK, label_B = RNG.normal(size=(6, 4)), np.array([0, 3, 2, 1, 1, 0])
    target_BK = 0.8 * np.eye(4)[label_B] + 0.2 / 4
    expected = -(target_BK * np.log(softmax(logits_BK))).sum(1).mean()
    loss = supervised(torch.tensor(logits_BK), torch.tensor(label_B), label_smoothing=0.2)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_balanced_softmax_weighs_odds_by_class_counts():
    logits_BK, label_B = RNG.normal(size=(5, 3)), np.array([0, 0, 1, 2, 0])
    count_K = np.array([70, 20, 10])
    odds_BK = count_K * np.exp(logits_BK)
    expected = -np.log(odds_BK[np.arange(5), label_B] / odds_BK.sum(1)).mean()
    log_prior_K = log_class_prior(torch.tensor([70, 20, 10]))
    loss = supervised(torch.tensor(logits_BK), torch.tensor(label_B), log_prior_K=log_prior_K)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_tau_zero_adjusts_nothing():
    logits_BK, label_B = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    log_prior_K = log_class_prior(torch.tensor([3, 1, 1]))
    assert torch.equal(supervised(logits_BK, label_B, log_prior_K=log_prior_K, tau=0), supervised(logits_BK, label_B))


def test_the_loss_does_not_depend_on_how_a_batch_is_cut():
    logits_BK, label_B = torch.randn(12, 5), torch.tensor([0, -1, -1, -1, 4, 2, -1, 3, 1, 1, -1, -1])
    whole = supervised(logits_BK, label_B, labelled_share=0.5)
    for size in (2, 3, 4, 6):
        parts = zip(logits_BK.split(size), label_B.split(size), strict=True)
        cut = torch.stack([supervised(logits, label, labelled_share=0.5) for logits, label in parts]).mean()
        torch.testing.assert_close(cut, whole)


def test_a_batch_without_labels_gives_zero_and_zero_gradients():
    logits_BK = torch.randn(4, 3, requires_grad=True)
    loss = supervised(logits_BK, torch.full((4,), -1), labelled_share=0.1, label_smoothing=0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(logits_BK.grad, torch.zeros(4, 3))


def test_a_class_without_a_label_has_a_finite_prior():
    log_prior_K = log_class_prior(torch.tensor([3, 0]))
    np.testing.assert_allclose(log_prior_K.exp().numpy(), [3 / 3.5, 0.5 / 3.5], rtol=1e-6)


def in_training(recipe: str, *, step: int, label_B: torch.Tensor, logits_BK: torch.Tensor) -> Context:
    """A micro-batch of a training with this recipe, whose weights count from step 80 on."""
    index_B = torch.arange(len(label_B))
    batch = Batch({"global": View(torch.zeros(len(label_B), 3, 4, 4))}, {"class": label_B}, index_B, index_B)
    count_K = torch.tensor([70, 20, 10])
    labels = Supervision(("a", "b", "c"), 0.5, log_class_prior(count_K), None, recipe, 100 / (3 * count_K), 80)
    return Context(batch, {"global": {"logits": logits_BK}}, {}, labels, step=step, seed=0)


def test_deferred_weights_are_those_of_torch_from_their_step_on_and_any_cut_gives_them():
    label_B, logits_BK = torch.tensor([0, 2, -1, 1, -1, 0, -1, -1]), torch.randn(8, 3)
    sums = [
        F.cross_entropy(logits_BK, label_B, ignore_index=-1, reduction="sum", weight=weight_K)
        for weight_K in (None, 100 / (3 * torch.tensor([70, 20, 10])))
    ]
    for step, total in ((79, sums[0]), (80, sums[1]), (99, sums[1])):
        loss = Supervised().loss(in_training("deferred", step=step, label_B=label_B, logits_BK=logits_BK))
        torch.testing.assert_close(loss, total / (8 * 0.5))
        parts = zip(label_B.split(2), logits_BK.split(2), strict=True)
        cut = [Supervised().loss(in_training("deferred", step=step, label_B=a, logits_BK=b)) for a, b in parts]
        torch.testing.assert_close(torch.stack(cut).mean(), loss)


def test_what_an_objective_says_wins_over_the_recipe_of_its_training():
    label_B, logits_BK = torch.tensor([0, 2, 1, 1]), torch.randn(4, 3)

    def loss(recipe: str, **settings: Any) -> torch.Tensor:
        given = in_training(recipe, step=90, label_B=label_B, logits_BK=logits_BK)
        return Supervised.model_validate(settings).loss(given)

    plain, adjusted = loss("none"), loss("logit_adjusted")
    assert not torch.equal(plain, adjusted)
    assert torch.equal(loss("logit_adjusted", balance="none"), plain)
    assert torch.equal(loss("deferred", balance="logit_adjusted"), adjusted)
    assert torch.equal(loss("class_aware"), plain)
