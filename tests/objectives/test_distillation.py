"""Distillation of logits, embeddings and patches, against numbers computed in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpkd.models.network import build_head
from dpkd.models.settings import HeadSpec
from dpkd.objectives.base import losses_of
from dpkd.objectives.decoupled_logits import decoupled_logits
from dpkd.objectives.features import FeatureDistillation, feature_distance, standardise
from dpkd.objectives.logits import LogitDistillation, distil_logits
from dpkd.objectives.patches import PatchDistillation, distil_patches, resample_features
from dpkd.objectives.relations import RelationDistillation, similarity_divergence
from dpkd.objectives.standardised_logits import StandardisedLogits, standardise_logits
from tests.contexts import context_of

RNG = np.random.default_rng(0)


def softmax(logits_BK: np.ndarray) -> np.ndarray:
    odds_BK = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
    return odds_BK / odds_BK.sum(1, keepdims=True)


def standard(vector: np.ndarray) -> np.ndarray:
    return (vector - vector.mean()) / vector.std()


def distance(student: np.ndarray, teacher: np.ndarray) -> float:
    """The distance of one pair of vectors, term by term."""
    student, teacher = standard(student), standard(teacher)
    cosine = student @ teacher / np.linalg.norm(student) / np.linalg.norm(teacher)
    gaps = np.abs(student - teacher)
    smooth = np.where(gaps < 1, 0.5 * gaps**2, gaps - 0.5).mean()
    return float(0.5 * (1 - cosine) + 0.5 * smooth)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logits_are_compared_by_the_divergence_of_softened_classes(temperature):
    student_BK, teacher_BK = RNG.normal(size=(6, 5)) * 3, RNG.normal(size=(6, 5)) * 3
    p, q = softmax(teacher_BK / temperature), softmax(student_BK / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    loss = distil_logits(torch.tensor(student_BK), torch.tensor(teacher_BK), temperature=temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_logits_pull_the_student_towards_the_teacher():
    student_BK = RNG.normal(size=(3, 4))
    teacher_BK = RNG.normal(size=(3, 4))
    variable_BK = torch.tensor(student_BK, requires_grad=True)
    distil_logits(variable_BK, torch.tensor(teacher_BK), temperature=2.0).backward()
    expected = 2.0 * (softmax(student_BK / 2) - softmax(teacher_BK / 2)) / 3
    np.testing.assert_allclose(variable_BK.grad.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_embeddings_are_compared_standardised():
    student_BD, teacher_BD = RNG.normal(size=(5, 7)), 10 * RNG.normal(size=(5, 7)) + 3
    expected = np.mean([distance(student, teacher) for student, teacher in zip(student_BD, teacher_BD, strict=True)])
    loss = feature_distance(torch.tensor(student_BD), torch.tensor(teacher_BD), dim=1).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_embeddings_as_they_are_are_compared_with_the_weights_of_radio():
    student_BD, teacher_BD = RNG.normal(size=(5, 7)), 2 * RNG.normal(size=(5, 7)) + 1
    cosine_B = (
        (student_BD * teacher_BD).sum(1) / np.linalg.norm(student_BD, axis=1) / np.linalg.norm(teacher_BD, axis=1)
    )
    gap_BD = np.abs(student_BD - teacher_BD)
    smooth_B = np.where(gap_BD < 1, 0.5 * gap_BD**2, gap_BD - 0.5).mean(1)
    expected = (0.9 * (1 - cosine_B) + 0.1 * smooth_B).mean()
    outputs = {"to_teacher/embedding-12": torch.tensor(student_BD)}
    context = context_of(outputs, {"t": {"embedding": torch.tensor(teacher_BD)}})
    (loss,) = losses_of([FeatureDistillation(distance="radio", hidden=12)], context).values()
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reads", ["embedding", "patch"])
def test_a_hidden_width_makes_the_head_an_mlp(reads):
    head = build_head(HeadSpec(reads=reads, width=3, hidden=6), 4)
    feature_BD = torch.randn(5, 4)
    norm, first, _, last = head
    torch.nn.init.normal_(norm.weight)
    hidden_BD = F.layer_norm(feature_BD, (4,), norm.weight, norm.bias, eps=norm.eps) @ first.weight.view(6, 4).T
    expected_BD = F.gelu(hidden_BD + first.bias) @ last.weight.view(3, 6).T + last.bias
    found_BD = head(feature_BD) if reads == "embedding" else head(feature_BD[:, :, None, None].expand(5, 4, 2, 3))
    torch.testing.assert_close(found_BD if reads == "embedding" else found_BD[:, :, 1, 2], expected_BD)


def test_a_target_of_several_views_is_half_of_the_own_view_and_half_of_their_mean():
    student_VBK, teacher_VBK = RNG.normal(size=(3, 4, 5)), RNG.normal(size=(3, 4, 5))
    target_VBK = 0.5 * teacher_VBK + 0.5 * teacher_VBK.mean(0)
    flat = [torch.tensor(x.reshape(12, 5)) for x in (student_VBK, teacher_VBK, target_VBK)]
    names = ("logits", "embedding", "to_teacher/embedding")
    context = context_of(dict.fromkeys(names, flat[0]), {"t": dict.fromkeys(names, flat[1])}, num_views=3)
    p, q = softmax(target_VBK.reshape(12, 5) / 2), softmax(student_VBK.reshape(12, 5) / 2)
    expected = {
        LogitDistillation: 4 * (p * np.log(p / q)).sum(1).mean(),
        FeatureDistillation: feature_distance(flat[0], flat[2], dim=1).mean(),
        RelationDistillation: similarity_divergence(flat[0], flat[2], temperature=0.1),
        StandardisedLogits: 9
        * distil_logits(standardise_logits(flat[0]), standardise_logits(flat[2]), temperature=2.0),
    }
    for kind, value in expected.items():
        (loss,) = losses_of([kind(average_views=True)], context).values()
        assert float(loss) == pytest.approx(float(value), rel=1e-4), kind
        (first,) = losses_of([kind()], context).values()
        alone = context_of(dict.fromkeys(names, flat[0][:4]), {"t": dict.fromkeys(names, flat[1][:4])})
        assert float(first) == float(next(iter(losses_of([kind()], alone).values()))), kind


def test_scale_and_offset_of_an_embedding_do_not_count():
    embedding_BD = torch.randn(4, 32)
    assert feature_distance(embedding_BD, 5 * embedding_BD + 2, dim=1).numpy() == pytest.approx(0, abs=1e-5)


def test_a_constant_embedding_gives_finite_gradients():
    student_BD = torch.ones(2, 8, requires_grad=True)
    feature_distance(student_BD, torch.randn(2, 8), dim=1).mean().backward()
    assert student_BD.grad.isfinite().all()
    assert torch.equal(standardise(torch.ones(2, 8), dim=1), torch.zeros(2, 8))


def test_patches_are_weighted_within_each_sample():
    student, teacher = RNG.normal(size=(2, 6, 3, 3)), RNG.normal(size=(2, 6, 3, 3))
    weight = RNG.uniform(size=(2, 1, 3, 3))
    losses = []
    for sample in range(2):
        cells = [(row, column) for row in range(3) for column in range(3)]
        d = np.array(
            [distance(student[sample, :, row, column], teacher[sample, :, row, column]) for row, column in cells]
        )
        losses.append(np.average(d, weights=weight[sample, 0].reshape(-1)))
    loss = distil_patches(torch.tensor(student), torch.tensor(teacher), torch.tensor(weight))
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-4)


def test_an_even_weight_is_no_weight():
    student, teacher = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)
    even = distil_patches(student, teacher, torch.full((2, 1, 21, 21), 3.0))
    torch.testing.assert_close(even, distil_patches(student, teacher))


def test_the_losses_do_not_depend_on_how_a_batch_is_cut():
    student, teacher, weight = torch.randn(6, 5, 4, 4), torch.randn(6, 5, 4, 4), torch.rand(6, 1, 8, 8)
    parts = zip(student.split(2), teacher.split(2), weight.split(2), strict=True)
    cut = torch.stack([distil_patches(*part) for part in parts]).mean()
    torch.testing.assert_close(cut, distil_patches(student, teacher, weight))


def test_weights_add_saliency_and_edges_and_an_unknown_map_adds_nothing():
    maps = {"saliency": torch.rand(2, 1, 4, 4), "edge": torch.rand(2, 1, 4, 4)}
    student_BDHW, teacher_BDHW = torch.randn(2, 2, 6, 4, 4)
    unknown = {**maps, "edge": torch.full((2, 1, 4, 4), torch.nan)}
    outputs, taught = {"to_teacher/patch": student_BDHW}, {"t": {"patch": teacher_BDHW}}
    (loss,) = losses_of([PatchDistillation()], context_of(outputs, taught, maps=unknown)).values()
    torch.testing.assert_close(loss, distil_patches(student_BDHW, teacher_BDHW, 1 + maps["saliency"]))
    context = context_of(outputs, taught, maps=maps)
    for saliency, edge in ((0.5, 3.0), (0, 2.0), (1.0, 0), (0, 0)):
        (loss,) = losses_of([PatchDistillation(saliency=saliency, edge=edge)], context).values()
        weight_B1HW = 1 + saliency * maps["saliency"] + edge * maps["edge"]
        torch.testing.assert_close(loss, distil_patches(student_BDHW, teacher_BDHW, weight_B1HW))


@pytest.mark.parametrize(("size", "grid"), [((10, 10), (5, 5)), ((4, 6), (8, 12))])
def test_a_plane_keeps_its_slope_on_another_grid(size, grid):
    rows = (torch.arange(size[0]) + 0.5) / size[0]
    columns = (torch.arange(size[1]) + 0.5) / size[1]
    plane = (2 * rows[:, None] + columns[None, :])[None, None]
    rows, columns = (torch.arange(grid[0]) + 0.5) / grid[0], (torch.arange(grid[1]) + 0.5) / grid[1]
    expected = 2 * rows[:, None] + columns[None, :]
    inner = (slice(1, -1), slice(1, -1))  # cells at the frame lack neighbours
    torch.testing.assert_close(resample_features(plane, grid)[0, 0][inner], expected[inner], atol=1e-4, rtol=1e-4)


def test_the_same_grid_is_left_alone():
    patch_BDHW = torch.randn(1, 2, 3, 3)
    assert resample_features(patch_BDHW, (3, 3)) is patch_BDHW


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_logits_are_the_two_divergences_of_the_paper(temperature):
    student_BK, teacher_BK = RNG.normal(size=(6, 5)) * 3, RNG.normal(size=(6, 5)) * 3
    target_B = RNG.integers(5, size=6)
    tckd, nckd = decoupled_logits(
        torch.tensor(student_BK), torch.tensor(teacher_BK), target_B=torch.tensor(target_B), temperature=temperature
    )
    expected_target, expected_others = [], []
    for student_K, teacher_K, target in zip(student_BK, teacher_BK, target_B, strict=True):
        p, q = softmax(teacher_K[None] / temperature)[0], softmax(student_K[None] / temperature)[0]
        pairs = [(p[target], q[target]), (1 - p[target], 1 - q[target])]
        expected_target.append(sum(one * np.log(one / other) for one, other in pairs))
        others = np.delete(p, target) / (1 - p[target]), np.delete(q, target) / (1 - q[target])
        expected_others.append((others[0] * np.log(others[0] / others[1])).sum())
    assert float(tckd) == pytest.approx(temperature**2 * np.mean(expected_target), rel=1e-4)
    assert float(nckd) == pytest.approx(temperature**2 * np.mean(expected_others), rel=1e-4)


def test_the_divergence_of_logits_is_that_of_its_decoupled_parts():
    # Zhao et al. 2022, eq. 6: KD = TCKD + (1 - p_target) NCKD, sample by sample
    student_K, teacher_K = torch.tensor(RNG.normal(size=(1, 7))), torch.tensor(RNG.normal(size=(1, 7)))
    tckd, nckd = decoupled_logits(student_K, teacher_K, target_B=torch.tensor([2]), temperature=1.0)
    whole = distil_logits(student_K, teacher_K, temperature=1.0)
    assert float(whole) == pytest.approx(float(tckd + (1 - teacher_K.softmax(1)[0, 2]) * nckd), rel=1e-5)


def test_standardised_logits_have_no_mean_and_no_size():
    logits_BK = RNG.normal(size=(4, 9)) * 5 + 2
    found = standardise_logits(torch.tensor(logits_BK)).numpy()
    expected = (logits_BK - logits_BK.mean(1, keepdims=True)) / logits_BK.std(1, ddof=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(standardise_logits(torch.tensor(3 * logits_BK - 7)).numpy(), found, rtol=1e-4, atol=1e-5)
