"""Labels of patches, against the authors' rule in numpy, and the teacher's logits of each patch."""

from typing import Any

import numpy as np
import pytest
import torch

from dpkd.models.network import build_network
from dpkd.objectives.base import losses_of
from dpkd.objectives.patch_labels import PatchLabels, patch_labels
from tests.contexts import context_of
from tests.models.test_network import FAMILIES, spec_of

RNG = np.random.default_rng(0)


def labels_of_the_authors(
    logits_NK: np.ndarray, *, smoothing: float, top: int, num_background: int
) -> tuple[np.ndarray, np.ndarray]:
    """`generate_softlabel` of SUN's code for one image, N(K + 1), each row divided by its sum; and the background."""
    num_classes = logits_NK.shape[1]
    off = smoothing / num_classes
    label_NK = np.full((len(logits_NK), num_classes + 1), off)
    background_N = np.isin(np.arange(len(logits_NK)), logits_NK.max(1).argsort()[:num_background])
    for row, logits_K in enumerate(logits_NK):
        label_NK[row, num_classes if background_N[row] else logits_K.argsort()[-top:]] = 1 - smoothing + off
    return label_NK / label_NK.sum(1, keepdims=True), background_N


def test_at_a_high_temperature_labels_are_those_of_the_authors():
    logits, smoothing, top = RNG.normal(size=(1, 8, 5, 5)), 0.1, 5
    expected_NK, background_N = labels_of_the_authors(
        logits[0].reshape(8, 25).T, smoothing=smoothing, top=top, num_background=10
    )
    logits_BKHW = torch.tensor(logits)
    label_BKHW = patch_labels(logits_BKHW, logits_BKHW.amax(1, keepdim=True), background=0.4, top=top, temperature=1e9)
    hot_N = np.where(background_N, 1, top)  # their labels sum to the number of hot classes, and smoothing counts less
    share_N1 = (smoothing * 9 / 8 / (hot_N * (1 - smoothing) + smoothing * 9 / 8))[:, None]
    found_NK = (1 - share_N1) * label_BKHW[0].flatten(1).T.numpy() + share_N1 / 9
    np.testing.assert_allclose(found_NK, expected_NK, atol=1e-6)


def test_the_lowest_patches_of_the_map_are_background_and_the_others_have_the_teachers_largest_classes():
    logits_BKHW = torch.randn(2, 6, 3, 3)
    figure_B1HW = torch.rand(2, 1, 3, 3)
    label_BKHW = patch_labels(logits_BKHW, figure_B1HW, background=1 / 3, top=2, temperature=0.5)
    for image in range(2):
        lowest = set(figure_B1HW[image].flatten().argsort()[:3].tolist())
        for patch in range(9):
            label_K = label_BKHW[image].flatten(1)[:, patch]
            if patch in lowest:
                assert label_K.tolist() == [0] * 6 + [1]
                continue
            logits_K = logits_BKHW[image].flatten(1)[:, patch]
            best = logits_K.topk(2).indices
            odds = np.exp(logits_K[best].double().numpy() / 0.5)
            np.testing.assert_allclose(label_K[best].numpy(), odds / odds.sum(), rtol=1e-5)
            assert float(label_K.sum()) == pytest.approx(1)
            assert float(label_K[6]) == 0


def test_a_flat_map_takes_the_first_patches_and_no_share_takes_none():
    flat = patch_labels(torch.randn(1, 3, 2, 2), torch.zeros(1, 1, 2, 2), background=0.5, top=1, temperature=1)
    assert flat[0, 3].flatten().tolist() == [1, 1, 0, 0]
    none = patch_labels(torch.randn(1, 3, 2, 2), torch.zeros(1, 1, 2, 2), background=0.0, top=9, temperature=1)
    assert none[0, 3].sum() == 0


def cross_entropy(student_KHW: torch.Tensor, label_KHW: torch.Tensor, smoothing: float) -> float:
    """Mean over patches, in float64."""
    odds = np.exp(student_KHW.double().numpy())
    target = (1 - smoothing) * label_KHW.double().numpy() + smoothing / len(odds)
    return float(-(target * np.log(odds / odds.sum(0))).sum(0).mean())


def test_the_loss_is_a_mean_over_patches_and_a_sample_of_unknown_map_adds_nothing():
    student, teacher, saliency = torch.randn(3, 6, 4, 4), torch.randn(3, 5, 4, 4), torch.rand(3, 1, 4, 4)
    saliency[1] = float("nan")
    student.requires_grad_()
    outputs, taught = {"to_teacher/t/patch_labels": student}, {"t": {"patch_logits": teacher}}
    label_BKHW = patch_labels(teacher, saliency, background=0.4, top=3, temperature=1)
    values = [cross_entropy(student[i].detach(), label_BKHW[i], 0.2) for i in range(3)]
    objective = PatchLabels(teacher="t", weight=0.7, top=3, label_smoothing=0.2)
    (loss,) = losses_of([objective], context_of(outputs, taught, maps={"saliency": saliency})).values()
    assert float(loss.detach()) == pytest.approx(0.7 * (values[0] + values[2]) / 3, rel=1e-5)
    loss.backward()
    assert student.grad[1].abs().max() == 0
    assert student.grad[0].abs().min() > 0


def test_the_control_has_the_background_of_another_image_and_sun_has_that_of_the_logits():
    student, teacher, saliency = torch.randn(3, 6, 4, 4), torch.randn(3, 5, 4, 4), torch.rand(3, 1, 4, 4)
    outputs, taught = {"to_teacher/patch_labels": student}, {"t": {"patch_logits": teacher}}
    context = context_of(outputs, taught, maps={"saliency": saliency})
    for objective, figure_B1HW in (
        (PatchLabels(), saliency),
        (PatchLabels(control="shuffle"), saliency.roll(1, 0)),
        (PatchLabels(prior=None), teacher.amax(1, keepdim=True)),
    ):
        label_BKHW = patch_labels(teacher, figure_B1HW, background=0.4, top=5, temperature=1)
        values = [cross_entropy(student[i], label_BKHW[i], 0.1) for i in range(3)]
        (loss,) = losses_of([objective], context).values()
        assert float(loss) == pytest.approx(0.5 * np.mean(values), rel=1e-5)


def test_logits_of_a_finer_grid_are_averaged_to_the_students():
    student, teacher, saliency = torch.randn(2, 4, 2, 2), torch.randn(2, 3, 6, 6), torch.rand(2, 1, 8, 8)
    outputs, taught = {"to_teacher/patch_labels": student}, {"t": {"patch_logits": teacher}}
    (loss,) = losses_of([PatchLabels()], context_of(outputs, taught, maps={"saliency": saliency})).values()
    assert loss.isfinite()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_patches_are_logits_of_images_that_are_one_patch(name):
    network = build_network(spec_of(name), seed=0).eval()
    image_BCHW = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = network(image_BCHW)
        network.extra = frozenset({"patch_logits"})
        outputs: dict[str, Any] = network(image_BCHW)
        backbone = network.backbone
        patch_BD = outputs["patch"][:, :, 1 % backbone.grid[0], 0]
        expected_BK = backbone.classify(backbone.embed_pooled(patch_BD))
    assert outputs["patch_logits"].shape == (2, 3, *backbone.grid)
    torch.testing.assert_close(outputs["patch_logits"][:, :, 1 % backbone.grid[0], 0], expected_BK)
    assert all(torch.equal(outputs[key], plain[key]) for key in plain)
    if name in ("resnet10t", "test_efficientnet", "resnetv2_50"):  # pooled by the mean, then linear
        torch.testing.assert_close(outputs["patch_logits"].mean((2, 3)), plain["logits"], atol=1e-5, rtol=1e-4)
