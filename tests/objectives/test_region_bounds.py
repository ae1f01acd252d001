"""Bounds on regions: statistics against scikit-image and numpy, penalties that pull a region into its bounds."""

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab
from skimage.draw import disk
from skimage.measure import regionprops

from dpkd.objectives.region_bounds import STATISTICS, Bound, compactness, fit_region, lab, region_statistic

RNG = np.random.default_rng(0)
GREY_BCHW = torch.full((1, 3, 8, 8), 128, dtype=torch.uint8)


def statistic(name: str, region_HW: np.ndarray, image_BCHW: torch.Tensor = GREY_BCHW) -> float:
    region_B1HW = torch.tensor(np.asarray(region_HW, np.float32))[None, None]
    return float(region_statistic(name, region_B1HW, image_BCHW)[0])


def test_area_and_centre_are_those_of_scikit_image():
    region_HW = np.zeros((12, 16))
    region_HW[2:7, 9:15] = 1
    region_HW[7:9, 10:11] = 1
    found = regionprops(region_HW.astype(int))[0]
    assert statistic("area", region_HW) == pytest.approx(found.area / (12 * 16))
    row, column = found.centroid
    assert statistic("row", region_HW) == pytest.approx((row + 0.5) / 12, rel=1e-5)
    assert statistic("column", region_HW) == pytest.approx((column + 0.5) / 16, rel=1e-5)


def test_the_centre_of_a_soft_region_is_weighted_by_it():
    region_HW = RNG.uniform(size=(6, 9))
    row_H, column_W = (np.arange(6) + 0.5) / 6, (np.arange(9) + 0.5) / 9
    total = region_HW.sum()
    assert statistic("row", region_HW) == pytest.approx((region_HW * row_H[:, None]).sum() / total, rel=1e-5)
    assert statistic("column", region_HW) == pytest.approx((region_HW * column_W).sum() / total, rel=1e-5)
    assert statistic("row", region_HW * 0.01) == pytest.approx(statistic("row", region_HW), rel=1e-4)


def test_colours_are_means_over_the_region_of_the_image_on_the_grid():
    image_BCHW = torch.tensor(RNG.integers(0, 256, size=(1, 3, 8, 8)), dtype=torch.uint8)
    cell_CHW = image_BCHW[0].double().numpy().reshape(3, 4, 2, 4, 2).mean((2, 4)) / 255
    region_HW = RNG.uniform(size=(4, 4))
    lab_CHW = rgb2lab(cell_CHW.transpose(1, 2, 0)).transpose(2, 0, 1)
    for name, plane_HW in zip(
        ("red", "green", "blue", "lightness", "a", "b"), np.concatenate([cell_CHW, lab_CHW]), strict=True
    ):
        expected = (region_HW * plane_HW).sum() / region_HW.sum()
        assert statistic(name, region_HW, image_BCHW) == pytest.approx(expected, rel=1e-3, abs=0.01), name


def test_lab_is_that_of_scikit_image():
    rgb_BCHW = torch.rand(2, 3, 20, 20)
    rgb_BCHW[0, :, 0, 0], rgb_BCHW[0, :, 0, 1] = 0, 1
    expected = rgb2lab(rgb_BCHW.double().permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(lab(rgb_BCHW).permute(0, 2, 3, 1).numpy(), expected, atol=0.02)


def drawn_disc(radius: float, size: int) -> np.ndarray:
    fine = np.zeros((size * 8, size * 8))
    fine[disk((size * 4 - 0.5, size * 4 - 0.5), radius * 8)] = 1
    return fine.reshape(size, 8, size, 8).mean((1, 3))


def test_a_disc_is_compact_a_square_less_a_bar_hardly():
    square, bar, corners = np.zeros((3, 32, 32))
    square[8:24, 8:24] = 1
    bar[15:17, 2:30] = 1
    corners[:3, :3] = corners[:3, -3:] = corners[-3:, :3] = corners[-3:, -3:] = 1
    values = [statistic("compactness", each) for each in (drawn_disc(11, 32), square, corners, bar)]
    assert values[0] == pytest.approx(1, abs=0.06)
    assert values[1] == pytest.approx(np.pi / 4, abs=0.03)  # 4πA/P² of a square
    assert values[2] < 0.3
    assert values[3] == pytest.approx(4 * np.pi * 2 * 28 / 60**2, abs=0.03)
    assert values == sorted(values, reverse=True)


def test_compactness_knows_neither_scale_nor_faintness_nor_place():
    whole = statistic("compactness", drawn_disc(6, 32))
    assert statistic("compactness", drawn_disc(12, 32)) == pytest.approx(whole, abs=0.05)
    assert statistic("compactness", 0.2 * drawn_disc(6, 32)) == pytest.approx(whole, abs=0.01)
    assert statistic("compactness", np.roll(drawn_disc(6, 32), (3, -5), (0, 1))) == pytest.approx(whole, rel=1e-4)
    # at the frame a region ends
    assert statistic("compactness", np.ones((16, 16))) == pytest.approx(np.pi / 4, abs=0.03)


def test_few_cells_look_rounder_than_they_are():
    for side, expected in ((1, 1.57), (2, 1.08), (3, 0.96)):
        block = np.zeros((8, 8))
        block[2 : 2 + side, 2 : 2 + side] = 1
        assert statistic("compactness", block) == pytest.approx(expected, abs=0.01)


def test_no_smooth_region_is_more_compact_than_a_disc():
    noise = torch.randn(200, 1, 16, 16)
    smooth = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2) * 4
    value_B = compactness(smooth.sigmoid().squeeze(1))
    assert value_B.max() < 1
    assert value_B.min() > 0


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_gradients_are_those_of_finite_differences(name: str):
    image_BCHW = torch.tensor(RNG.integers(0, 256, size=(2, 3, 10, 10)), dtype=torch.uint8)
    logit_B1HW = torch.randn(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)

    def penalty(logits):
        value_B = region_statistic(name, logits.sigmoid(), image_BCHW)
        low, high = STATISTICS[name]
        return Bound(statistic=name, at_least=high).penalty(value_B) + Bound(statistic=name, at_most=low).penalty(
            value_B
        )

    assert torch.autograd.gradcheck(penalty, (logit_B1HW,))


def test_the_penalty_is_the_square_beyond_each_bound_in_shares_of_the_range():
    value_B = torch.tensor([10.0, 40.0, 95.0, 60.0])
    both_B = Bound(statistic="lightness", at_least=30, at_most=80).penalty(value_B)
    torch.testing.assert_close(both_B, torch.tensor([0.2**2, 0, 0.15**2, 0]))
    low_B = Bound(statistic="lightness", at_least=30).penalty(value_B)
    torch.testing.assert_close(low_B, torch.tensor([0.2**2, 0, 0, 0]))


def test_the_losses_do_not_depend_on_how_a_batch_is_cut():
    logit_B1HW, map_B1HW = torch.randn(8, 1, 4, 4), torch.rand(8, 1, 8, 8)
    map_B1HW[[1, 4, 5]] = float("nan")

    def losses(logits, maps):
        value_B = region_statistic("area", logits.sigmoid(), GREY_BCHW)
        return torch.stack([fit_region(logits, maps), Bound(statistic="area", at_most=0.2).penalty(value_B).mean()])

    whole = losses(logit_B1HW, map_B1HW)
    assert (whole > 0).all()
    for size in (1, 2, 4):
        parts = zip(logit_B1HW.split(size), map_B1HW.split(size), strict=True)
        torch.testing.assert_close(torch.stack([losses(*part) for part in parts]).mean(0), whole)


def test_the_region_is_fitted_by_cross_entropy_where_the_map_is_known():
    logit_B1HW, map_B1HW = torch.randn(3, 1, 4, 4, requires_grad=True), torch.rand(3, 1, 8, 8)
    map_B1HW[1] = float("nan")
    target = map_B1HW.numpy().astype(float).reshape(3, 4, 2, 4, 2).mean((2, 4))
    share = 1 / (1 + np.exp(-logit_B1HW.detach().numpy().astype(float)[:, 0]))
    entropy = -(target * np.log(share) + (1 - target) * np.log(1 - share))
    loss = fit_region(logit_B1HW, map_B1HW)
    assert float(loss.detach()) == pytest.approx(np.nansum(entropy) / (3 * 16), rel=1e-5)
    loss.backward()
    assert logit_B1HW.grad[1].abs().max() == 0
    assert logit_B1HW.grad[[0, 2]].abs().min() > 0


def test_an_empty_region_has_finite_statistics_and_gradients():
    for name in STATISTICS:
        logit_B1HW = torch.full((1, 1, 4, 4), -80.0, requires_grad=True)
        value_B = region_statistic(name, logit_B1HW.sigmoid(), GREY_BCHW)
        Bound(statistic=name, at_least=STATISTICS[name][1]).penalty(value_B).mean().backward()
        assert value_B.isfinite().all(), name
        assert logit_B1HW.grad.isfinite().all(), name


@pytest.mark.parametrize(("statistic_name", "bounds"), [("area", (0.1, 0.2)), ("row", (0.7, 0.8)), ("red", (0.6, 1))])
def test_training_under_a_bound_moves_the_region_of_a_toy_network_into_it(statistic_name: str, bounds: tuple):
    torch.manual_seed(0)
    image_BCHW = torch.randint(0, 256, (16, 3, 8, 8)).to(torch.uint8)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 64, 64)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    before = []
    for _ in range(300):
        region_B1HW = network(image_BCHW.float() / 255).view(-1, 1, 8, 8).sigmoid()
        value_B = region_statistic(statistic_name, region_B1HW, image_BCHW)
        before.append(value_B.detach())
        loss = Bound(statistic=statistic_name, at_least=bounds[0], at_most=bounds[1]).penalty(value_B).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    low, high = bounds[0] - 0.01, bounds[1] + 0.01
    assert not ((before[0] >= low) & (before[0] <= high)).any()
    assert ((value_B >= low) & (value_B <= high)).all()
