"""Parameter groups: every parameter once, no decay on vectors, smaller rates towards the input."""

from typing import Any

import pytest
import timm
import torch
from timm.optim._param_groups import param_groups_layer_decay

from dpkd.errors import UserError
from dpkd.models.network import build_network
from dpkd.models.parameters import parameter_groups
from dpkd.models.settings import ModelSettings, NetworkSpec
from tests.heads import heads

VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


def network_of(name: str, arguments: dict[str, Any]):
    model = ModelSettings(name=name, arguments=arguments)
    spec = NetworkSpec(
        model=model,
        classes=("a", "b"),
        image_size=32,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        heads=heads({"hog": 9}, teacher_dim=7),
    )
    return build_network(spec, seed=0)


@pytest.mark.parametrize(("name", "arguments"), [("vit_tiny_patch16_224", VIT), ("test_resnet", {})])
@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_every_trainable_parameter_stands_in_one_group(name, arguments, layer_decay):
    network = network_of(name, arguments)
    network.heads["prior/hog"].bias.requires_grad_(False)
    groups = parameter_groups(network, weight_decay=0.1, layer_decay=layer_decay)
    names = [name for group in groups for name in group["names"]]
    by_name = dict(network.named_parameters())
    assert sorted(names) == sorted(name for name, parameter in by_name.items() if parameter.requires_grad)
    assert all(
        by_name[name] is parameter
        for group in groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    )


def test_a_network_without_a_trainable_parameter_is_refused():
    network = network_of("test_resnet", {}).requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        parameter_groups(network, weight_decay=0.1)


def test_vectors_positions_and_tokens_carry_no_decay():
    network = network_of("vit_tiny_patch16_224", VIT)
    groups = parameter_groups(network, weight_decay=0.1)
    plain = {name for group in groups if group["weight_decay"] == 0 for name in group["names"]}
    decayed = {name for group in groups if group["weight_decay"] == 0.1 for name in group["names"]}
    assert {"backbone.timm.pos_embed", "backbone.timm.cls_token", "backbone.timm.blocks.0.norm1.weight"} <= plain
    assert {"backbone.timm.head.weight", "heads.prior/hog.weight", "heads.to_teacher/embedding.weight"} <= decayed
    assert all(group["lr_scale"] == 1 for group in groups)


@pytest.mark.parametrize(("name", "arguments"), [("vit_tiny_patch16_224", VIT), ("test_resnet", {})])
def test_layer_scales_are_those_of_timm_and_heads_learn_at_full_rate(name, arguments):
    network = network_of(name, arguments)
    reference = timm.create_model(name, num_classes=2, **({"img_size": 32} if "vit" in name else {}), **arguments)
    by_identity = {id(parameter): key for key, parameter in reference.named_parameters()}
    expected = {
        f"backbone.timm.{by_identity[id(parameter)]}": group["lr_scale"]
        for group in param_groups_layer_decay(reference, 0.1, layer_decay=0.5)
        for parameter in group["params"]
    }
    groups = parameter_groups(network, weight_decay=0.1, layer_decay=0.5)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    heads = {name: scale for name, scale in scales.items() if not name.startswith("backbone")}
    assert set(heads.values()) == {1.0}
    assert {name: scale for name, scale in scales.items() if name not in heads} == pytest.approx(expected)
    assert min(scales.values()) < 0.2


def test_a_module_that_holds_networks_is_grouped_too():
    pair = torch.nn.ModuleDict({"one": network_of("test_resnet", {}), "two": network_of("test_resnet", {})})
    groups = parameter_groups(pair, weight_decay=0.1, layer_decay=0.5)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["one.backbone.timm.conv1.0.weight"] == scales["two.backbone.timm.conv1.0.weight"] < 1
