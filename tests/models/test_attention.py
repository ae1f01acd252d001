"""Attention maps and counts."""

from typing import Any

import pytest
import timm
import torch
import torchvision

from dpkd.models.attention import with_attention
from dpkd.models.counts import count_flops, count_parameters
from dpkd.models.network import build_network
from dpkd.models.settings import FigureGroundPooling, ModelSettings, NetworkSpec
from tests.heads import heads

VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def network_of(name: str, arguments: dict[str, Any], **changes):
    model = ModelSettings(name=name, arguments=arguments)
    given = {"classes": ("a", "b"), "image_size": 32, "mean": (0.5,) * 3, "std": (0.2,) * 3, **changes}
    return build_network(NetworkSpec(model=model, **given), seed=0).eval()


def test_class_attention_is_what_the_last_block_computes():
    network = network_of("vit_tiny_patch16_224", VIT)
    attention = network.backbone.timm.blocks[-1].attn
    attention.fused_attn = False
    seen = []
    attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    image_BCHW = torch.randn(2, 3, 32, 32)
    map_B1HW = with_attention(network.backbone, lambda: network(image_BCHW))["attention"]
    expected = seen[0][:, :, 0, 1:].mean(1).view(2, 1, 4, 4)
    torch.testing.assert_close(map_B1HW, expected / expected.amax((2, 3), keepdim=True))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}), ("test_resnet", {})],
)
def test_any_model_gives_a_map_on_its_grid(name, arguments):
    network = network_of(name, arguments)
    image_BCHW = torch.randn(2, 3, 32, 32)
    outputs = with_attention(network.backbone, lambda: network(image_BCHW))
    torch.testing.assert_close(outputs["embedding"], network(image_BCHW)["embedding"])
    map_B1HW = outputs["attention"]
    assert map_B1HW.shape == (2, 1, *network.backbone.grid)
    assert map_B1HW.min() >= 0
    assert torch.allclose(map_B1HW.amax((1, 2, 3)), torch.ones(2))


def test_flops_of_a_vit_are_those_counted_by_hand():
    network = network_of("vit_tiny_patch16_224", VIT, classes=(), heads=heads({"edge": 1}))
    tokens, width, patches = 17, 48, 16
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    assert count_flops(network.spec) == 2 * (patches * 192 * width + 2 * block + patches * width)


def test_flops_of_a_head_that_attends_are_those_counted_by_hand():
    """Its query is a parameter, which the counter of torch takes with gradients alone."""
    arguments = VIT | {"global_pool": "map", "class_token": False}
    network = network_of("vit_tiny_patch16_224", arguments, classes=(), heads=heads({"edge": 1}))
    tokens, width = 16, 48
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    head = (1 + 2 * tokens + 1 + 8) * width**2 + 2 * tokens * width
    assert count_flops(network.spec) == 2 * (tokens * 192 * width + 2 * block + head + tokens * width)


def test_parameters_are_those_of_the_plain_timm_model():
    network = network_of("test_resnet", {}, heads=heads({"hog": 9}, teacher_dim=30))
    plain = timm.create_model("test_resnet", num_classes=2)
    assert count_parameters(network) == sum(parameter.numel() for parameter in plain.parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet50", torchvision.models.ResNet50_Weights.DEFAULT),
        ("densenet201", torchvision.models.DenseNet201_Weights.DEFAULT),
        ("vit_large_patch16_224", torchvision.models.ViT_L_16_Weights.IMAGENET1K_SWAG_LINEAR_V1),
        ("swin_tiny_patch4_window7_224", torchvision.models.Swin_T_Weights.DEFAULT),
        ("convnext_tiny", torchvision.models.ConvNeXt_Tiny_Weights.DEFAULT),
    ],
)
def test_flops_are_twice_the_multiply_adds_that_torchvision_publishes(name, published):
    spec = network_of("test_resnet", {}, classes=tuple(map(str, range(1000)))).spec
    spec = spec.model_copy(update={"model": ModelSettings(name=name), "image_size": 224})
    assert count_flops(spec) == pytest.approx(2e9 * published.meta["_ops"], rel=0.005)


def test_flops_of_a_convolution_grow_with_the_image():
    spec = network_of("test_resnet", {}, classes=(), heads={}).spec
    assert count_flops(spec, image_size=64) == pytest.approx(4 * count_flops(spec, image_size=32), rel=0.01)


def test_flops_are_those_of_the_backbone_whatever_the_pooling():
    spec = network_of("test_resnet", {}).spec
    figure_ground = spec.model.model_copy(update={"pooling": FigureGroundPooling()})
    pooled = count_flops(spec.model_copy(update={"model": figure_ground}))
    assert pooled == pytest.approx(count_flops(spec), rel=0.01)
