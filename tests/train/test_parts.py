"""What a checkpoint holds beside the engines."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.train.checkpoint import Checkpoints
from dpkd.train.parts import Inputs, RandomState

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def save(folder: Path, **parts: Any) -> None:
    checkpoints = Checkpoints(folder, world=ALONE, keep=1)
    checkpoints.load_newest({})
    checkpoints.save(2, parts)
    checkpoints.finish()


def load(folder: Path, **parts: Any) -> int:
    return Checkpoints(folder, world=ALONE, keep=1).load_newest(parts)


def test_dropout_goes_on_as_if_not_interrupted(tmp_path: Path) -> None:
    save(tmp_path, random=RandomState(ALONE))
    expected = torch.rand(4)
    torch.rand(99)
    assert load(tmp_path, random=RandomState(ALONE)) == 2
    assert torch.equal(torch.rand(4), expected)


def inputs(digests: dict[str, str]) -> Inputs:
    return Inputs(digests, ALONE)


def test_a_stage_goes_on_only_with_the_images_and_maps_that_it_began_with(tmp_path: Path) -> None:
    save(tmp_path, inputs=inputs({"packed images": "a", "map 'edge'": "b"}))
    assert load(tmp_path, inputs=inputs({"packed images": "a", "map 'edge'": "b", "map 'hog'": "c"})) == 2
    with pytest.raises(UserError, match=r"^map 'edge' changed after this stage started: .*delete"):
        load(tmp_path, inputs=inputs({"packed images": "a", "map 'edge'": "c"}))
    with pytest.raises(UserError, match=r"^packed images and map 'edge' changed after"):
        load(tmp_path, inputs=inputs({}))
