"""Relations between samples and between patches, against the definitions of the papers in float64."""

import numpy as np
import pytest
import torch

from dpkd.objectives.base import losses_of
from dpkd.objectives.patch_relations import PatchRelations, kernel_misalignment
from dpkd.objectives.patches import resample_features
from dpkd.objectives.relations import RelationDistillation, gaps, similarity_divergence
from tests.contexts import context_of

RNG = np.random.default_rng(0)


def huber(gap: np.ndarray) -> np.ndarray:
    return np.where(np.abs(gap) < 1, 0.5 * gap**2, np.abs(gap) - 0.5)


def turned(embedding_BD: torch.Tensor, width: int) -> torch.Tensor:
    """The same points in a space of more dimensions: padded, turned, scaled and moved."""
    turn = torch.linalg.qr(torch.randn(width, width, dtype=embedding_BD.dtype)).Q
    return 3 * torch.nn.functional.pad(embedding_BD, (0, width - embedding_BD.shape[1])) @ turn


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_similarities_are_compared_row_by_row(temperature):
    student_BD, teacher_BD = RNG.normal(size=(5, 7)), RNG.normal(size=(5, 4))
    rows = []
    for embedding_BD in (student_BD, teacher_BD):
        cosine_BB = np.array(
            [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in embedding_BD] for a in embedding_BD]
        )
        odds_BB = np.exp(cosine_BB / temperature)
        rows.append(odds_BB / odds_BB.sum(1, keepdims=True))
    q, p = rows
    expected = (p * np.log(p / q)).sum(1).mean()
    loss = similarity_divergence(torch.tensor(student_BD), torch.tensor(teacher_BD), temperature=temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_distances_and_angles_are_those_of_the_paper():
    student_BD, teacher_BD = RNG.normal(size=(6, 7)), 3 * RNG.normal(size=(6, 4))
    lengths, angles = [], []
    for x in (student_BD, teacher_BD):
        length = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        lengths.append(length / length[length > 0].mean())
        angle = np.zeros((6, 6, 6))
        for i, j, k in np.ndindex(6, 6, 6):
            if i not in (j, k):
                one, other = (x[j] - x[i]), (x[k] - x[i])
                angle[i, j, k] = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        angles.append(angle)
    objective = RelationDistillation(weight=2.0, similarity=0, distance=25, angle=50)
    outputs, taught = {"embedding": torch.tensor(student_BD)}, {"t": {"embedding": torch.tensor(teacher_BD)}}
    losses = losses_of([objective], context_of(outputs, taught))
    assert float(losses["relations.similarity"]) == 0
    assert float(losses["relations.distance"]) == pytest.approx(50 * huber(lengths[0] - lengths[1]).mean(), rel=1e-4)
    assert float(losses["relations.angle"]) == pytest.approx(100 * huber(angles[0] - angles[1]).mean(), rel=1e-4)


def test_the_same_points_in_another_space_have_the_same_relations():
    teacher_BD = torch.randn(8, 5)
    student_BD = turned(teacher_BD, 9)
    assert float(similarity_divergence(student_BD, teacher_BD, temperature=0.1)) == pytest.approx(0, abs=1e-5)
    for student, teacher in zip(gaps(student_BD + 1), gaps(teacher_BD), strict=True):
        if student.ndim == 2:
            torch.testing.assert_close(student, teacher, atol=1e-4, rtol=1e-4)
        else:
            torch.testing.assert_close(student @ student.mT, teacher @ teacher.mT, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("student_BD", [torch.ones(4, 3), torch.zeros(4, 3), torch.randn(1, 3)])
def test_equal_embeddings_and_one_sample_give_finite_gradients(student_BD):
    student_BD = student_BD.clone().requires_grad_()
    context = context_of({"embedding": student_BD}, {"t": {"embedding": torch.randn(len(student_BD), 5)}})
    losses = losses_of([RelationDistillation(distance=1, angle=1)], context)
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert student_BD.grad.isfinite().all()


def test_a_part_without_weight_is_not_computed_and_the_order_of_samples_does_not_count():
    student_BD, teacher_BD = torch.randn(6, 4), torch.randn(6, 3)
    order = torch.randperm(6)
    for objective, parts in (
        (RelationDistillation(), {"similarity"}),
        (RelationDistillation(distance=1), {"similarity", "distance"}),
        (RelationDistillation(distance=1, angle=2), {"similarity", "distance", "angle"}),
    ):
        losses = losses_of([objective], context_of({"embedding": student_BD}, {"t": {"embedding": teacher_BD}}))
        assert losses.keys() == {f"relations.{part}" for part in parts}
        moved = context_of({"embedding": student_BD[order]}, {"t": {"embedding": teacher_BD[order]}})
        torch.testing.assert_close(losses_of([objective], moved), losses)


def cka(student_ND: np.ndarray, teacher_ND: np.ndarray) -> float:
    """The definition: kernels centred from both sides by H = I - 11ᵀ / N."""
    num_patches = len(student_ND)
    centring = np.eye(num_patches) - 1 / num_patches
    k, t = (centring @ x @ x.T @ centring for x in (student_ND, teacher_ND))
    return float((k * t).sum() / np.linalg.norm(k) / np.linalg.norm(t))


def test_kernels_of_patches_are_aligned_image_by_image():
    student, teacher = RNG.normal(size=(3, 6, 3, 4)), 4 + RNG.normal(size=(3, 9, 3, 4))
    expected = [1 - cka(s.reshape(6, 12).T, t.reshape(9, 12).T) for s, t in zip(student, teacher, strict=True)]
    loss = kernel_misalignment(torch.tensor(student), torch.tensor(teacher))
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-4)
    parts = zip(torch.tensor(student), torch.tensor(teacher), strict=True)
    cut = torch.stack([kernel_misalignment(s[None], t[None]) for s, t in parts]).mean()
    torch.testing.assert_close(cut, loss)


def test_a_patch_of_weight_three_counts_as_three_patches():
    student, teacher = RNG.normal(size=(1, 6, 2, 3)), RNG.normal(size=(1, 5, 2, 3))
    times = np.array([1, 3, 2, 1, 4, 1])
    expected = 1 - cka(*(np.repeat(x[0].reshape(-1, 6).T, times, axis=0) for x in (student, teacher)))
    weight_B1HW = torch.tensor(times, dtype=torch.float32).view(1, 1, 2, 3)
    loss = kernel_misalignment(torch.tensor(student), torch.tensor(teacher), weight_B1HW)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_turned_and_scaled_patches_of_another_width_are_aligned():
    teacher_BND = torch.randn(2, 16, 5)
    student_BND = torch.stack([turned(patch_ND, 8) for patch_ND in teacher_BND]) + 2
    student, teacher = (patch_BND.mT.unflatten(2, (4, 4)) for patch_BND in (student_BND, teacher_BND))
    assert float(kernel_misalignment(student, teacher)) == pytest.approx(0, abs=1e-5)


def test_the_teachers_patches_are_resampled_to_the_students_grid():
    student, teacher = torch.randn(2, 4, 3, 3), torch.randn(2, 6, 7, 7)
    torch.testing.assert_close(
        kernel_misalignment(student, teacher), kernel_misalignment(student, resample_features(teacher, (3, 3)))
    )


def test_equal_patches_give_finite_gradients():
    student_BDHW = torch.ones(2, 4, 3, 3, requires_grad=True)
    kernel_misalignment(student_BDHW, torch.randn(2, 6, 3, 3)).backward()
    assert student_BDHW.grad.isfinite().all()


def test_saliency_weighs_patches_and_an_unknown_map_weighs_all_equally():
    student, teacher, saliency = torch.randn(3, 4, 4, 4), torch.randn(3, 6, 4, 4), torch.rand(3, 1, 8, 8)
    saliency[1] = float("nan")
    context = context_of({"patch": student}, {"t": {"patch": teacher}}, maps={"saliency": saliency})
    weights = [1 + 5 * saliency[:1], None, 1 + 5 * saliency[2:]]
    expected = [kernel_misalignment(student[i : i + 1], teacher[i : i + 1], weights[i]) for i in range(3)]
    (loss,) = losses_of([PatchRelations(saliency=5)], context).values()
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    (plain,) = losses_of([PatchRelations()], context).values()
    torch.testing.assert_close(plain, kernel_misalignment(student, teacher))
    weights = [weights[2], weights[0], None]  # each image has the map of the one before it
    expected = [kernel_misalignment(student[i : i + 1], teacher[i : i + 1], weights[i]) for i in range(3)]
    (shuffled,) = losses_of([PatchRelations(saliency=5, control="shuffle")], context).values()
    torch.testing.assert_close(shuffled, torch.stack(expected).mean())
