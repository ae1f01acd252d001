"""Gradients of the plain engine: averaged in place, or while the backward goes on; the numbers are the same."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_ranks


def traces(folder: Path, environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
    run_ranks("tests.overlap_cases", str(folder), size=2, environment=environment)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.nightly
def test_buckets_give_the_same_numbers_as_one_flat_gradient_which_holds_every_gradient_once(tmp_path: Path) -> None:
    for found in traces(tmp_path):
        flat, buckets = found["flat"], found["buckets"]
        assert (flat.losses, flat.norms) == (buckets.losses, buckets.norms)
        assert all(map(torch.equal, flat.predictions, buckets.predictions))
        assert all(torch.equal(flat.weights[name], buckets.weights[name]) for name in flat.weights)
        assert found["flat storages"] == found["by default storages"] == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_nccl_buckets_give_the_numbers_of_one_flat_gradient(tmp_path: Path) -> None:
    """Convolutions on a GPU are not deterministic to the last bit. On a machine with two GPUs:

    CUDA_VISIBLE_DEVICES=0,1 python -m pytest tests/test_overlap.py -k nccl
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
    for found in traces(tmp_path, {"CUDA_VISIBLE_DEVICES": visible}):
        assert found["backend"] == "nccl"
        assert found["by default storages"] == 0  # the optimizer lets go of the buckets' views
        for name in ("buckets", "by default"):
            assert found[name].losses == pytest.approx(found["flat"].losses, rel=1e-4)
            assert found[name].norms == pytest.approx(found["flat"].norms, rel=1e-3)
