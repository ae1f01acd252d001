"""SIGReg against an integral of SciPy, and its two parts by hand."""

import numpy as np
import pytest
import torch
from scipy import integrate

from dpkd.data.batch import Batch, View
from dpkd.objectives.base import Context, Supervision
from dpkd.objectives.sigreg import SigReg, distance_from_normal


def context(outputs: dict, *, size: int, step: int = 0) -> Context:
    index_B = torch.arange(size)
    batch = Batch({"global": View(torch.zeros(size, 3, 8, 8, dtype=torch.uint8))}, {}, index_B, index_B)
    return Context(batch, outputs, {}, Supervision((), 1.0, torch.zeros(0)), step=step, seed=0)


@pytest.mark.parametrize(("shift", "scale"), [(0, 1), (1, 1), (0, 0.2)])
def test_the_distance_from_a_normal_distribution_is_its_integral(shift, scale):
    value_N = shift + scale * np.random.default_rng(0).standard_normal(50)

    def integrand(t: float) -> float:
        return abs(np.exp(1j * t * value_N).mean() - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)

    expected = 50 * integrate.quad(integrand, -3, 3)[0]
    assert distance_from_normal(torch.from_numpy(value_N)[:, None].float()) == pytest.approx(expected, rel=0.02)


def test_normal_samples_are_nearer_than_collapsed_or_narrow_ones():
    normal = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    near = distance_from_normal(normal)
    for other in (torch.zeros(256, 8), 0.3 * normal, normal + 1, normal.sign()):
        assert distance_from_normal(other) > 5 * near


def test_agreement_is_the_mean_square_from_the_mean_of_the_global_views():
    view_VBD, local_VBD = torch.randn(2, 5, 64), torch.randn(3, 5, 64)
    outputs = {"global": {"sigreg": view_VBD.flatten(0, 1)}, "local": {"sigreg": local_VBD.flatten(0, 1)}}
    loss = SigReg(weight=2.0, views=("global", "local"), balance=0.25).loss(context(outputs, size=5))
    centre_BD = view_VBD.mean(0)
    terms = [(z_BD - centre_BD).square() for z_BD in (*view_VBD, *local_VBD)]
    torch.testing.assert_close(loss["agreement"], 2 * 0.75 * torch.stack(terms).mean())


def test_equal_views_of_normal_projections_have_a_small_loss_and_collapsed_ones_a_large_one():
    z_BD = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    sound, collapsed = (
        SigReg(balance=0.5).loss(context({"global": {"sigreg": torch.cat([each, each])}}, size=256))
        for each in (z_BD, torch.zeros(256, 64))
    )
    assert sound["agreement"] == collapsed["agreement"] == 0
    assert collapsed["normality"] > 20 * sound["normality"]


def test_directions_change_with_the_step_and_repeat_with_it():
    outputs = {"global": {"sigreg": torch.randn(20, 64)}}
    first, again, other = (SigReg().loss(context(outputs, size=10, step=step))["normality"] for step in (3, 3, 4))
    assert first == again
    assert first != other
