"""Cross-entropy on visible labels, against numbers computed by hand in float64."""

import numpy as np
import pytest
import torch

from dpkd.objectives.supervised import log_class_prior, supervised

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
    log_prior_K = log_class_prior(torch.tensor([0] * 70 + [1] * 20 + [2] * 10 + [-1] * 50), 3)
    loss = supervised(torch.tensor(logits_BK), torch.tensor(label_B), log_prior_K=log_prior_K)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_tau_zero_adjusts_nothing():
    logits_BK, label_B = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    log_prior_K = log_class_prior(torch.tensor([0, 0, 0, 1, 2]), 3)
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
    log_prior_K = log_class_prior(torch.tensor([0, 0, 0, -1]), 2)
    np.testing.assert_allclose(log_prior_K.exp().numpy(), [3 / 3.5, 0.5 / 3.5], rtol=1e-6)
