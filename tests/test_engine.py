"""What the engines share, on one process: averages, parameter groups, precision, activation checkpointing."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from dpkd.engine.network import in_fp32
from dpkd.engine.optimizer import set_learning_rates
from dpkd.engine.settings import EngineSettings, OptimizerSettings
from dpkd.engine.slots import WeightAverage
from dpkd.engine.torch_engine import TorchEngine
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.models.parameters import parameter_groups

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


def engine(
    module: nn.Module, *, precision: str = "fp32", optimizer: OptimizerSettings | None = None, **settings: Any
) -> TorchEngine:
    return TorchEngine(
        module,
        parameter_groups=parameter_groups(module, weight_decay=0.05),
        optimizer=optimizer or OptimizerSettings(),
        settings=EngineSettings(kind="torch", **settings),
        world=ALONE,
        accumulation=2,
        micro_batch_size=4,
        precision=precision,
    )


def one_step(trained: TorchEngine) -> tuple[float, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        image_BCHW = torch.randn(4, 3, 32, 32, generator=generator)
        trained.backward(trained.forward(image_BCHW).square().mean())
    return float(trained.step(learning_rate=1e-3)), trained.state.weights()


def make(name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **arguments)


def test_an_average_follows_the_ramped_decay() -> None:
    weight = nn.Parameter(torch.zeros(3))
    average = WeightAverage({"weight": weight}, decay=0.5)
    expected = 0.0
    for value, decay in ((1.0, 2 / 11), (2.0, 3 / 12), (3.0, 4 / 13)):
        weight.data.fill_(value)
        average.update()
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.average["weight"], torch.full((3,), expected))
    average.num_updates = 1000
    average.update()
    torch.testing.assert_close(average.average["weight"], torch.full((3,), (expected + 3.0) / 2))


def test_an_average_in_place_leaves_the_weights_as_they_were_even_after_an_error() -> None:
    weight = nn.Parameter(torch.ones(3))
    average = WeightAverage({"weight": weight}, decay=0.9)
    weight.data.fill_(5.0)
    seen = []

    def fail_in_place() -> None:
        with average.in_place():
            seen.append(weight.tolist())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_in_place()
    assert seen == [[1.0] * 3]
    assert weight.tolist() == [5.0] * 3
    assert average.average["weight"].tolist() == [1.0] * 3


def test_learning_rates_are_scaled_by_group() -> None:
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(1)], "lr_scale": 0.5}, {"params": [torch.zeros(1)], "lr_scale": 1.0}]
    )
    set_learning_rates(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_outputs_come_as_fp32_at_any_depth() -> None:
    half, whole = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    outputs = in_fp32({"a": half, "b": {"c": half, "d": whole}})
    assert outputs["a"].dtype == outputs["b"]["c"].dtype == torch.float32
    assert outputs["b"]["d"].dtype == torch.int64


def test_bf16_keeps_fp32_weights_and_comes_near_fp32() -> None:
    norm, weights = one_step(engine(make("vit_tiny_patch16_224", **VIT)))
    norm_bf16, weights_bf16 = one_step(engine(make("vit_tiny_patch16_224", **VIT), precision="bf16"))
    assert norm_bf16 == pytest.approx(norm, rel=0.05)
    assert norm_bf16 != norm
    assert {weight.dtype for weight in weights_bf16.values()} == {torch.float32}
    assert weights.keys() == weights_bf16.keys()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_bf16_goes_on_from_its_state_bit_for_bit_with_statistics_in_fp32(name: str, tmp_path: Path) -> None:
    arguments = VIT if name.startswith("vit") else {"num_classes": 3}
    first, resumed = (engine(make(name, **arguments), precision="bf16", ema=0.9) for _ in range(2))
    one_step(first)
    first.state.snapshot()(tmp_path)
    norm, weights = one_step(first)
    resumed.state.load(tmp_path)
    resumed_norm, resumed_weights = one_step(resumed)
    assert resumed_norm == norm
    assert all(torch.equal(resumed_weights[key], weight) for key, weight in weights.items())
    buffers = dict(resumed.module.named_buffers())
    assert all(torch.equal(buffers[key], buffer) for key, buffer in first.module.named_buffers())
    assert {buffer.dtype for buffer in buffers.values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_activation_checkpointing_changes_no_number(name: str) -> None:
    arguments = VIT if name.startswith("vit") else {"num_classes": 3}
    norm, weights = one_step(engine(make(name, **arguments)))
    norm_again, weights_again = one_step(engine(make(name, **arguments), activation_checkpointing=True))
    assert norm_again == pytest.approx(norm, rel=1e-5)
    for key in (key for key in weights if "num_batches" not in key):
        torch.testing.assert_close(weights_again[key], weights[key], rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_checkpoint_activations_is_refused() -> None:
    with pytest.raises(UserError, match="activation_checkpointing"):
        engine(nn.Sequential(nn.Linear(2, 2)), activation_checkpointing=True)
