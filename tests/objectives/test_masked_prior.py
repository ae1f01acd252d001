"""Masked prior prediction: masks that no cut of the batch changes, targets and errors against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkd.data.batch import Batch, View
from dpkd.objectives.base import Context, Supervision
from dpkd.objectives.draws import hide_patches, random_patch_mask
from dpkd.objectives.masked_prior import HiddenPatches, MaskedPrior, masked_prior, prior_target

MASK_64 = (1 << 64) - 1


def splitmix64(value: int) -> int:
    """The generator's step as its authors give it, on Python's unbounded integers."""
    value = (value + 0x9E3779B97F4A7C15) & MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


@given(st.integers(0, 2**62), st.integers(0, 10**7), st.integers(0, 2**31), st.floats(0, 0.95))
@settings(max_examples=30, deadline=None)
def test_the_mask_hides_the_patches_with_the_smallest_hashes(index, step, seed, ratio):
    key = splitmix64(splitmix64(index + seed * 0x9E3779B97F4A7C15) + step)
    hashes = [splitmix64(key + position) for position in range(15)]
    signed = [value - (1 << 64) if value >> 63 else value for value in hashes]
    expected = set(np.argsort(signed, kind="stable")[: round(ratio * 15)].tolist())
    mask_B1HW = random_patch_mask(torch.tensor([index]), step=step, grid=(3, 5), ratio=ratio, seed=seed)
    assert set(mask_B1HW.flatten().nonzero().flatten().tolist()) == expected


def test_a_sample_is_masked_alike_wherever_it_stands():
    index_B = torch.arange(40, 60)
    whole = random_patch_mask(index_B, step=7, grid=(6, 6), ratio=0.4, seed=1)
    order = torch.randperm(20)
    parts = [random_patch_mask(part, step=7, grid=(6, 6), ratio=0.4, seed=1) for part in index_B[order].split(3)]
    assert torch.equal(torch.cat(parts), whole[order])


def test_masks_differ_between_samples_steps_and_seeds():
    def of(index, step, seed):
        return random_patch_mask(torch.tensor([index]), step=step, grid=(8, 8), ratio=0.5, seed=seed)

    first = of(3, 5, 0)
    assert not any(torch.equal(first, other) for other in (of(4, 5, 0), of(3, 6, 0), of(3, 5, 1), of(5, 3, 0)))


def test_every_patch_is_hidden_as_often_as_the_ratio_says():
    mask_B1HW = random_patch_mask(torch.arange(4000), step=0, grid=(5, 5), ratio=0.4, seed=0)
    assert (mask_B1HW.sum((1, 2, 3)) == 10).all()
    share_HW = mask_B1HW.double().mean((0, 1))
    assert (share_HW - 0.4).abs().max() < 4 * (0.4 * 0.6 / 4000) ** 0.5


def test_hidden_patches_are_zero_and_the_others_untouched():
    image_BCHW = torch.randn(2, 3, 12, 12)
    mask_B1HW = random_patch_mask(torch.arange(2), step=0, grid=(3, 3), ratio=0.5, seed=0)
    hidden_BCHW = hide_patches(image_BCHW, mask_B1HW)
    blocks = mask_B1HW.repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(image_BCHW)
    assert (hidden_BCHW[blocks] == 0).all()
    assert torch.equal(hidden_BCHW[~blocks], image_BCHW[~blocks])


@pytest.mark.parametrize("size", [40, 84])
def test_a_grid_that_does_not_divide_the_image_hides_the_pixels_under_its_patches(size):
    mask_B1HW = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask_B1HW[..., 2, 3] = True
    hidden = hide_patches(torch.ones(1, 1, size, size), mask_B1HW)[0, 0] == 0
    centre = (torch.arange(size) + 0.5) / size * 6
    expected = ((centre.floor() == 2)[:, None]) & ((centre.floor() == 3)[None, :])
    assert torch.equal(hidden, expected)


def test_a_target_is_standardised_by_sample_and_channel():
    map_BCHW = np.random.default_rng(0).uniform(size=(2, 3, 8, 8))
    cell_BCHW = map_BCHW.reshape(2, 3, 4, 2, 4, 2).mean((3, 5))
    expected = cell_BCHW - cell_BCHW.mean((2, 3), keepdims=True)
    expected /= cell_BCHW.std((2, 3), keepdims=True) + 0.05
    np.testing.assert_allclose(prior_target(torch.tensor(map_BCHW), (4, 4)).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_flat_map_is_a_flat_target():
    assert prior_target(torch.full((1, 2, 8, 8), 0.7), (4, 4)).abs().max() < 1e-4


def test_the_error_counts_hidden_patches_alone():
    rng = np.random.default_rng(1)
    prediction, target = rng.normal(size=(2, 3, 4, 4)), rng.normal(size=(2, 3, 4, 4))
    mask = np.zeros((2, 1, 4, 4), dtype=bool)
    mask[0, 0, 1, 2] = mask[1, 0, 3, 3] = True
    errors = [
        ((prediction[0, :, 1, 2] - target[0, :, 1, 2]) ** 2).mean(),
        ((prediction[1, :, 3, 3] - target[1, :, 3, 3]) ** 2).mean(),
    ]
    loss = masked_prior(torch.tensor(prediction), torch.tensor(target), torch.tensor(mask))
    assert float(loss) == pytest.approx(np.mean(errors), rel=1e-5)
    whole = masked_prior(torch.tensor(prediction), torch.tensor(target))
    assert float(whole) == pytest.approx(((prediction - target) ** 2).mean(), rel=1e-5)


def test_the_loss_does_not_depend_on_how_a_batch_is_cut():
    prediction, target = torch.randn(8, 2, 5, 5), torch.randn(8, 2, 5, 5)
    mask = random_patch_mask(torch.arange(8), step=0, grid=(5, 5), ratio=0.4, seed=0)
    parts = zip(prediction.split(2), target.split(2), mask.split(2), strict=True)
    cut = torch.stack([masked_prior(*part) for part in parts]).mean()
    torch.testing.assert_close(cut, masked_prior(prediction, target, mask))


def test_a_mask_that_hides_nothing_gives_zero():
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    assert float(masked_prior(torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4), nothing)) == 0


def test_a_target_that_is_not_known_moves_nothing_and_leaves_the_others_as_they_are():
    prediction_BCHW = torch.randn(3, 1, 4, 4, requires_grad=True)
    target_BCHW = torch.randn(3, 1, 4, 4)
    expected = (prediction_BCHW - target_BCHW).detach()[[0, 2]].square().sum() / prediction_BCHW.numel()
    target_BCHW[1] = float("nan")
    loss = masked_prior(prediction_BCHW, target_BCHW)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert prediction_BCHW.grad[1].abs().max() == 0
    assert prediction_BCHW.grad[0].abs().min() > 0


def test_the_objective_weighs_the_error_of_each_map_that_it_predicts():
    view, index_B = HiddenPatches(0.4).name, torch.arange(3)
    maps = {"edge": torch.rand(3, 1, 8, 8), "lbp": torch.rand(3, 2, 8, 8)}
    batch = Batch({"global": View(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), maps)}, {}, index_B, index_B)
    outputs = {f"prior/{name}": torch.randn(3, map_BCHW.shape[1], 4, 4) for name, map_BCHW in maps.items()}
    mask_B1HW = random_patch_mask(index_B, step=0, grid=(4, 4), ratio=0.4, seed=0)
    supervision = Supervision(("a",), 1.0, torch.zeros(1))
    context = Context(batch, {view: outputs}, {}, supervision, step=0, seed=0, facts={view: {"mask": mask_B1HW}})
    losses = MaskedPrior(weight=2.0, targets={"edge": 1.0, "lbp": 0.5}).loss(context)
    assert losses.keys() == maps.keys()
    for name, weight in (("edge", 2.0), ("lbp", 1.0)):
        expected = weight * masked_prior(outputs[f"prior/{name}"], prior_target(maps[name], (4, 4)), mask_B1HW)
        torch.testing.assert_close(losses[name], expected)
