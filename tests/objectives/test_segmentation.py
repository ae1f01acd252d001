"""Losses of masks against NumPy, by hand, and in any cut of a batch."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax

from dpkd.data.batch import Batch, View
from dpkd.objectives.base import Context, Draw, Objective, Supervision
from dpkd.objectives.mask_consistency import MaskConsistency, mask_consistency
from dpkd.objectives.mask_priors import MaskSaliency, MaskSmoothness, mask_saliency, mask_smoothness
from dpkd.objectives.pseudo_labels import Strong
from dpkd.objectives.segmentation import MaskDistillation, Segmentation, distil_masks, segmentation

DRAWN = torch.Generator().manual_seed(0)
LOGITS = torch.randn(8, 2, 6, 6, generator=DRAWN)
STRONG = torch.randn(8, 2, 6, 6, generator=DRAWN)
TAUGHT = torch.randn(8, 2, 6, 6, generator=DRAWN)
SHARES = torch.rand(8, 2, 12, 12, generator=DRAWN).softmax(1)
SHARES[3] = torch.nan  # a visible mask that cannot be used
VISIBLE = torch.tensor([0, -1, 0, 0, -1, -1, 0, -1])
MAPS = {name: torch.rand(8, 1, 12, 12, generator=DRAWN) for name in ("edge", "saliency")}
STRONGLY = Strong(0.5, 1.0)


def losses(objective: Objective, rows: slice, *, shares: torch.Tensor = SHARES) -> list[float]:
    index_B = torch.arange(8)[rows]
    view = View(torch.zeros(len(index_B), 3, 12, 12, dtype=torch.uint8), {"mask": shares[rows]} | cut(MAPS, rows))
    batch = Batch({"global": view}, {"mask": VISIBLE[rows]}, index_B, torch.zeros_like(index_B))
    derived = STRONGLY.derive([torch.randn(len(index_B), 3, 12, 12)], Draw(index_B, step=1, seed=0, grid=(6, 6)))
    outputs = {"global": {"segmentation": LOGITS[rows]}, STRONGLY.name: {"segmentation": STRONG[rows]}}
    supervision = Supervision((), 1.0, torch.zeros(0), masked_share=0.5)
    teachers = {"t": {"global": {"segmentation": TAUGHT[rows]}}}
    facts = {STRONGLY.name: derived.facts}
    loss = objective.loss(Context(batch, outputs, teachers, supervision, 1, 0, facts=facts, teacher_name="t"))
    return [float(part) for part in (loss.values() if isinstance(loss, Mapping) else [loss])]


def cut(maps: Mapping[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: map_BCHW[rows] for name, map_BCHW in maps.items()}


@pytest.mark.parametrize(
    "objective",
    [
        Segmentation(),
        MaskDistillation(temperature=2.0),
        MaskConsistency(threshold=0.6),
        MaskConsistency(threshold=0.6, source="teacher"),
        MaskSmoothness(),
        MaskSaliency(low=0.45, high=0.55),
    ],
)
def test_the_mean_over_micro_batches_is_the_loss_of_the_batch(objective: Objective) -> None:
    whole = losses(objective, slice(0, 8))
    assert all(value > 0 for value in whole)
    for size in (1, 2, 4):
        parts = [losses(objective, slice(start, start + size)) for start in range(0, 8, size)]
        np.testing.assert_allclose(np.mean(parts, 0), whole, rtol=1e-5)


def test_hidden_masks_teach_nothing() -> None:
    other = SHARES.clone()
    other[VISIBLE < 0] = 0.123
    assert losses(Segmentation(), slice(0, 8), shares=other) == losses(Segmentation(), slice(0, 8))


def test_cross_entropy_and_dice_are_those_of_numpy() -> None:
    logits_BKHW, share_BKHW = LOGITS[:2], SHARES[:2].clone()
    share_BKHW[0, :, :6] = 0  # pixels without a class
    visible_B = torch.tensor([True, True])
    cross_entropy, dice = segmentation(logits_BKHW, share_BKHW, visible_B=visible_B)
    enlarged = F.interpolate(logits_BKHW, size=(12, 12), mode="bilinear").numpy().astype(np.float64)
    log_p, share = log_softmax(enlarged, axis=1), share_BKHW.numpy().astype(np.float64)
    expected_cross, expected_dice = [], []
    for i in range(2):
        known = share[i].sum(0)
        expected_cross.append(-(share[i] * log_p[i]).sum() / known.sum())
        p = np.exp(log_p[i]) * known
        expected_dice.append(
            np.mean([1 - (2 * (p[k] * share[i, k]).sum() + 1) / (p[k].sum() + share[i, k].sum() + 1) for k in range(2)])
        )
    np.testing.assert_allclose([float(cross_entropy), float(dice)], [np.mean(expected_cross), np.mean(expected_dice)])
    perfect = 50 * (share_BKHW.round() - 0.5)
    cross_entropy, dice = segmentation(perfect, share_BKHW.round(), visible_B=visible_B)
    assert float(cross_entropy) < 1e-6
    assert float(dice) < 1e-6


def test_distillation_is_the_divergence_of_each_cell() -> None:
    loss = distil_masks(LOGITS, TAUGHT, temperature=2.0)
    flat = [each.permute(0, 2, 3, 1).reshape(-1, 2) / 2.0 for each in (LOGITS, TAUGHT)]
    expected = 4 * F.kl_div(flat[0].log_softmax(1), flat[1].softmax(1), reduction="batchmean")
    torch.testing.assert_close(loss, expected)
    assert abs(float(distil_masks(TAUGHT, TAUGHT, temperature=2.0))) < 1e-6


def test_classes_move_with_the_image() -> None:
    weak = torch.full((1, 2, 4, 4), 9.0)
    weak[:, 1] = -9.0
    weak[0, :, 1, 2] = torch.tensor([-9.0, 9.0])  # one cell of class 1
    place = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]])  # shows what is a cell to the right of it
    seen = torch.ones(1, 1, 8, 8)
    strong = torch.zeros(1, 2, 4, 4)
    strong[0, :, 1, 1] = torch.tensor([0.0, 5.0])
    loss = mask_consistency(weak, strong, place_R23=place, seen_R1HW=seen, threshold=0.9)
    right, plain = -torch.tensor([0.0, 5.0]).log_softmax(0)[1], float(np.log(2))
    torch.testing.assert_close(float(loss), (float(right) + 11 * plain) / 16)  # a column shows nothing
    seen[:, :, :, :4] = 0  # the left half is hidden
    loss = mask_consistency(weak, strong, place_R23=place, seen_R1HW=seen, threshold=0.9)
    torch.testing.assert_close(float(loss), 4 * plain / 16)
    assert float(mask_consistency(weak / 20, strong, place_R23=place, seen_R1HW=seen, threshold=0.9)) == 0


def test_the_facts_of_a_strong_view_are_those_of_its_image() -> None:
    image_B3HW = torch.rand(4, 3, 16, 16, generator=DRAWN)
    draw = Draw(torch.arange(4), step=2, seed=0, grid=(4, 4))
    derived = Strong(0.5, 1.0).derive([image_B3HW, image_B3HW[:, :1]], draw)
    grid = F.affine_grid(derived.facts["place"].float(), [4, 1, 16, 16], align_corners=False)
    torch.testing.assert_close(F.grid_sample(image_B3HW[:, :1], grid, align_corners=False), derived.inputs[1])
    assert ((derived.inputs[0].abs().sum(1, keepdim=True) == 0) >= (derived.facts["seen"] == 0)).all()


def test_smoothness_is_the_sum_over_pairs() -> None:
    p, edge = LOGITS[:2].softmax(1), MAPS["edge"][:2].clone()
    edge[1] = torch.nan
    coarse = edge[0, 0].reshape(6, 2, 6, 2).amax((1, 3)).numpy().astype(np.float64)
    q, expected = p[0].numpy().astype(np.float64), []
    for axis in (0, 1):
        for d in (1, 3):
            line = coarse if axis else coarse.T
            values = q if axis else q.transpose(0, 2, 1)
            pairs = [
                np.exp(-line[y, x : x + d + 1].max() / 0.2) * ((values[:, y, x] - values[:, y, x + d]) ** 2).sum()
                for y in range(6)
                for x in range(6 - d)
            ]
            expected.append(np.mean(pairs) / 2)  # the image without the map counts 0
    loss = mask_smoothness(p, edge, scale=0.2, distances=(1, 3))
    np.testing.assert_allclose(float(loss), np.mean(expected), rtol=1e-5)


def test_saliency_teaches_where_it_is_clear_and_no_mask_is_seen() -> None:
    logits = torch.zeros(3, 2, 2, 2)
    logits[:, 1] = 2.0
    saliency = torch.tensor([[[0.9, 0.5], [0.1, 0.5]]]).repeat(3, 1, 1, 1)
    saliency[2] = torch.nan
    loss = mask_saliency(logits, saliency, torch.tensor([True, False, True]), low=0.2, high=0.8)
    figure, ground = -torch.tensor([0.0, 2.0]).log_softmax(0)[1], -torch.tensor([0.0, 2.0]).log_softmax(0)[0]
    torch.testing.assert_close(loss, (figure + ground) / 12)
