"""Embedding a split over several ranks."""

from pathlib import Path

import numpy as np

from dpkd.stages.networks import NUM_MEAN_SAMPLES, spread
from dpkd.stages.run import Run
from tests.embed_cases import embed
from tests.processes import run_ranks

COUNTS = (9, 1)  # neither divides between two ranks


def test_two_ranks_find_what_one_finds_and_ask_equally_often(untrained_run: Run, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(untrained_run.settings.model_dump_json())
    run_ranks("tests.embed_cases", str(settings), str(tmp_path), *map(str, COUNTS), size=2)
    label_N = untrained_run.dataset.split("novel").label_N
    for count in COUNTS:
        alone = embed(untrained_run, count=count)
        assert alone["embedding"].shape == (count, 24)
        assert (alone["label"] == label_N[:count][::-1]).all()
        first, second = (np.load(tmp_path / f"{count}-{rank}.npz") for rank in (0, 1))
        for rank in (first, second):
            np.testing.assert_allclose(rank["embedding"], alone["embedding"], atol=1e-5)
            assert (rank["label"] == alone["label"]).all()
        assert first["calls"] == second["calls"]


def test_the_samples_for_a_mean_are_spread_over_those_that_are_given() -> None:
    few = np.delete(np.arange(100), [3, 40])
    assert spread(few).tolist() == few.tolist()  # a small split is taken whole
    many = np.arange(1, 10_000, 2)
    chosen = spread(many)
    assert len(chosen) == NUM_MEAN_SAMPLES
    assert (chosen[0], chosen[-1]) == (many[0], many[-1])
    assert np.isin(chosen, many).all()
    assert set(np.diff(chosen)) <= {4, 6}
