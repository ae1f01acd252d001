"""Area resampling against exact references."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkd.models.resample import area_resample


def test_it_is_block_averaging_where_sizes_divide():
    map_BCHW = torch.rand(2, 3, 20, 10)
    torch.testing.assert_close(area_resample(map_BCHW, (5, 5)), F.avg_pool2d(map_BCHW, (4, 2)))


@given(st.integers(1, 13), st.integers(1, 13))
@settings(max_examples=40, deadline=None)
def test_it_is_block_averaging_of_the_finest_common_grid(num_in, num_out):
    values = np.random.default_rng(num_in * 100 + num_out).uniform(size=num_in)
    expected = np.repeat(values, num_out).reshape(num_out, num_in).mean(1)
    result = area_resample(torch.tensor(values).view(1, 1, num_in, 1), (num_out, 1))
    np.testing.assert_allclose(result.view(-1).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(5, 5), (7, 3), (40, 21)])
def test_the_mean_is_kept(size):
    map_BCHW = torch.rand(2, 3, 21, 21)
    torch.testing.assert_close(area_resample(map_BCHW, size).mean((2, 3)), map_BCHW.mean((2, 3)))


def test_autocast_does_not_coarsen_a_map():
    map_BCHW = torch.rand(2, 1, 21, 21)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = area_resample(map_BCHW, (5, 5))
    assert torch.equal(lowered, area_resample(map_BCHW, (5, 5)))
