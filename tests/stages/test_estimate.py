"""What a run takes: its parameters, steps, memory and disk by arithmetic, and whether they grow as they must."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from dpkd.engine.settings import EngineSettings
from dpkd.models.network import build_network
from dpkd.models.settings import ModelSettings, NetworkSpec
from dpkd.stages.check_networks import check_networks
from dpkd.stages.estimate import Need, bytes_of_parameter, measure_network, training_needs
from dpkd.stages.plan import stages_of
from tests.runs import settings_of, tiny


def needs(folder: Path, *, num_samples: int = 320, **training: Any) -> dict[str, Need]:
    tree = deepcopy(tiny(folder / "run", source=folder))
    tree["distill"]["training"] |= training
    settings = settings_of(tree)
    return training_needs(settings, check_networks(settings, stages_of(settings)), num_samples=num_samples)


def test_every_training_stage_has_its_parameters_and_steps(tmp_path: Path) -> None:
    found = needs(tmp_path, steps=None, epochs=3)
    assert list(found) == ["teach", "distill", "baseline-conv"]
    assert [need.steps for need in found.values()] == [6, 60, 60]
    assert found["distill"].parameters > found["baseline-conv"].parameters > 0
    assert all(need.seconds and need.seconds > 0 for need in found.values())
    # teach keeps an average: 16 bytes a parameter in each of two checkpoints, and 4 in the saved network
    assert found["teach"].disk_bytes == found["teach"].parameters * (2 * 16 + 4)


def test_memory_grows_with_the_micro_batch_by_what_the_backward_pass_keeps(tmp_path: Path) -> None:
    small, large = (needs(tmp_path, batch_size=size, micro_batch_size=size)["distill"] for size in (16, 48))
    assert small.memory_bytes < large.memory_bytes < 3 * small.memory_bytes


@pytest.mark.parametrize(("stage", "expected"), [(0, 16), (1, 4 + 4 + 2), (2, 4 + 1 + 2), (3, 1 + 1 + 2)])
def test_zero_divides_moments_then_gradients_then_weights(stage: int, expected: float) -> None:
    engine = EngineSettings(kind="deepspeed", zero_stage=stage)
    assert bytes_of_parameter(engine, ranks=4, gpus=0) == expected


def test_a_network_without_memory_is_sized_but_not_timed() -> None:
    model = ModelSettings(name="vit_large_patch14_dinov2")
    spec = NetworkSpec(model=model, classes=("a", "b"), image_size=28, mean=(0.5,) * 3, std=(0.2,) * 3)
    with torch.device("meta"):
        cost = measure_network(build_network(spec))
    assert math.isnan(cost.train_s)
    assert math.isnan(cost.predict_s)
    with torch.device("meta"):
        plain = timm.create_model("vit_large_patch14_dinov2", num_classes=2, img_size=28)
    assert cost.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert cost.saved_bytes > 24 * 5 * 1024 * 4  # at least one float of each feature, token and block
