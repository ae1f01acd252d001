"""The effective rank against its definition by hand, and where it is known."""

import numpy as np
import pytest

from dpkd.evaluation.rank import effective_rank


def test_orthogonal_directions_of_one_length_have_their_number_as_rank():
    assert effective_rank(np.eye(40, 7)) == pytest.approx(7)


def test_embeddings_on_a_line_have_rank_one_and_zeros_have_none():
    assert effective_rank(np.outer(np.arange(1, 9), [1.0, 2.0, 3.0])) == pytest.approx(1, abs=1e-6)
    assert effective_rank(np.zeros((5, 3), np.float32)) == 0


def test_two_directions_count_by_the_entropy_of_their_lengths():
    share = np.array([0.8, 0.2])
    expected = np.prod(share**-share)
    assert effective_rank(np.diag([8.0, 2.0])) == pytest.approx(expected)
