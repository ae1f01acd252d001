"""Embedding a split over several ranks."""

from pathlib import Path

import numpy as np

from dpkd.stages.embed import mean_indices
from dpkd.stages.run import Run
from tests.embed_cases import embed
from tests.processes import run_ranks

COUNTS = (9, 1)  # neither divides between two ranks


def test_two_ranks_find_what_one_finds_and_ask_equally_often(untrained_run: Run, tmp_path: Path) -> None:
    folder = untrained_run.folder.path
    run_ranks("tests.embed_cases", str(folder), str(tmp_path), *map(str, COUNTS), size=2)
    label_N = untrained_run.dataset.split("novel").label_N
    for count in COUNTS:
        alone = embed(folder, untrained_run.world, count=count)
        assert alone["embedding"].shape == (count, 24)
        assert (alone["label"] == label_N[:count][::-1]).all()
        first, second = (np.load(tmp_path / f"{count}-{rank}.npz") for rank in (0, 1))
        for rank in (first, second):
            np.testing.assert_allclose(rank["embedding"], alone["embedding"], atol=1e-5)
            assert (rank["label"] == alone["label"]).all()
        assert first["calls"] == second["calls"]


def test_the_samples_for_a_mean_are_spread_over_the_split(untrained_run: Run) -> None:
    split = untrained_run.dataset.split("base")
    indices = mean_indices(split)
    assert indices.tolist() == list(range(split.num_samples))  # a small split is taken whole
