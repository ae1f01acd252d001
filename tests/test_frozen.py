"""A frozen network is sharded over the ranks at ZeRO-3, and gives bit for bit what the whole one gives.

Bytes of weights on a rank, counted like here on CPU: between two passes, and the most within one.

    ViT-B/16     1 worker 342,638,636 and 342,638,636     each of 2 workers 171,860,036 and 221,405,252
    ResNet-50    1 worker  94,122,284 and  94,122,284     each of 2 workers  50,219,460 and  66,210,244
"""

from typing import Any

import pytest
import torch

from tests.frozen_cases import MODELS
from tests.processes import run_ranks

ALWAYS_WHOLE = 100_000
"""Numbers in the largest tensor that DeepSpeed keeps whole on every rank, beside its shard."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("frozen")
    for size in (1, 2):
        run_ranks("tests.frozen_cases", str(folder), size=size)
    return {
        size: [torch.load(folder / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)] for size in (1, 2)
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_sharded_network_gives_the_outputs_of_the_whole_bit_for_bit(found: Any, model: str) -> None:
    for rank in found[2]:
        expected = rank[model]["torch"]["outputs"][0]
        for outputs in rank[model]["deepspeed"]["outputs"]:
            assert all(torch.equal(outputs[name], expected[name]) for name in expected)
            assert outputs.keys() == expected.keys()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_each_of_two_ranks_holds_half_of_the_large_weights_and_one_rank_all(found: Any, model: str) -> None:
    sizes = [shape.numel() for shape in found[1][0][model]["torch"]["shapes"]]
    whole = 4 * sum(sizes)
    for case in (found[1][0][model]["torch"], found[1][0][model]["deepspeed"], found[2][1][model]["torch"]):
        assert case["held"] == case["peak"] == whole
    small = sum(size for size in sizes if size <= ALWAYS_WHOLE)
    for rank in found[2]:
        held, peak = rank[model]["deepspeed"]["held"], rank[model]["deepspeed"]["peak"]
        assert 4 * sum(-(-size // 2) for size in sizes) <= held <= 4 * (sum(-(-size // 2) for size in sizes) + small)
        assert peak <= held + whole // 8 + 4 * max(sizes)
        assert held < 0.6 * whole
