"""Networks: any timm family behind one face, and the pooling and heads around it."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter

from dpkd.engine.batch_norm import StepStatistics
from dpkd.errors import UserError
from dpkd.models.network import Network, build_network, figure_ground
from dpkd.models.settings import FigureGroundPooling, MeanPooling, ModelSettings, NetworkSpec
from tests.heads import heads

VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet10t": {"channels": [16, 16, 24, 24], "stem_width": 8, "output_stride": 8},
    "vit_tiny_patch16_224": VIT,
    "vit_small_patch16_224": {**VIT, "class_token": False, "global_pool": "avg", "reg_tokens": 2},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 5},
    "test_convnext": {},
    "test_efficientnet": {},
    "mobilenetv3_small_050": {},
    "levit_128s": {},
    "resnetv2_50": {"layers": [1, 1], "channels": [32, 64], "stem_chs": 16},
}


def spec_of(name: str = "resnet10t", **changes) -> NetworkSpec:
    arguments = changes.pop("arguments", FAMILIES.get(name, {}))
    pooling = changes.pop("pooling", MeanPooling())
    given = {"classes": ("cat", "dog", "owl"), "image_size": 64, "mean": (0.5,) * 3, "std": (0.25,) * 3, **changes}
    return NetworkSpec(model=ModelSettings(name=name, arguments=arguments, pooling=pooling), **given)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_outputs_that_were_asked_for(name):
    spec = spec_of(name, heads=heads({"edge": 1, "hog": 9}, teacher_dim=20, teacher_patch_dim=12))
    network = build_network(spec, seed=0)
    outputs = network(torch.randn(2, 3, 64, 64))
    height, width = network.backbone.grid
    shapes = {key: tuple(output.shape) for key, output in outputs.items()}
    assert shapes == {
        "embedding": (2, network.backbone.embedding_dim),
        "patch": (2, network.backbone.patch_dim, height, width),
        "logits": (2, 3),
        "prior/edge": (2, 1, height, width),
        "prior/hog": (2, 9, height, width),
        "to_teacher/embedding": (2, 20),
        "to_teacher/patch": (2, 12, height, width),
    }


def test_attributes_and_regions_have_heads_that_leave_all_else_as_it_is():
    plain = spec_of(heads=heads({"edge": 1}, teacher_dim=20))
    more = spec_of(heads=heads({"edge": 1}, teacher_dim=20, attributes=2, regions=["saliency"]))
    networks = [build_network(spec, seed=0).eval() for spec in (plain, more)]
    image_BCHW = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before, after = (network(image_BCHW) for network in networks)
    assert tuple(after["attributes"].shape) == (2, 2)
    assert tuple(after["region/saliency"].shape) == (2, 1, *networks[1].backbone.grid)
    assert after.keys() - before.keys() == {"attributes", "region/saliency"}
    assert all(torch.equal(output, after[key]) for key, output in before.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_face_answers_what_the_timm_model_itself_answers(name):
    network = build_network(spec_of(name), seed=0).eval()
    image_BCHW = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network.backbone.timm(image_BCHW)
        torch.testing.assert_close(network(image_BCHW)["logits"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["resnet10t", "vit_small_patch16_224", "swin_tiny_patch4_window7_224", "test_convnext"]
)
def test_an_even_weight_pools_like_the_mean(name):
    mean = build_network(spec_of(name), seed=0).eval()
    weighted = build_network(spec_of(name, pooling=FigureGroundPooling()), seed=0).eval()
    image_BCHW, even_B1HW = torch.randn(2, 3, 64, 64), torch.full((2, 1, 16, 16), 0.3)
    with torch.no_grad():
        torch.testing.assert_close(
            weighted(image_BCHW, even_B1HW)["embedding"], mean(image_BCHW)["embedding"], atol=1e-5, rtol=1e-4
        )


def test_channels_last_features_are_turned_the_right_way():
    network = build_network(spec_of("swin_tiny_patch4_window7_224"), seed=0).eval()
    image_BCHW = torch.randn(1, 3, 64, 64)
    features_BHWD = network.backbone.timm.forward_features(image_BCHW)
    assert torch.equal(network(image_BCHW)["patch"][0, :, 2, 5], features_BHWD[0, 2, 5])


def test_tokens_lie_on_the_grid_row_by_row_without_the_prefix():
    network = build_network(spec_of("vit_small_patch16_224"), seed=0).eval()
    image_BCHW = torch.randn(1, 3, 64, 64)
    token_BND = network.backbone.timm.forward_features(image_BCHW)
    assert token_BND.shape[1] == 2 + 8 * 8
    assert torch.equal(network(image_BCHW)["patch"][0, :, 3, 1], token_BND[0, 2 + 3 * 8 + 1])


def test_figure_ground_is_the_weighted_mean_computed_in_float64():
    rng = np.random.default_rng(0)
    patch_BDHW, saliency_B1HW = rng.normal(size=(2, 5, 4, 4)), rng.uniform(size=(2, 1, 8, 8))
    cell_B1HW = saliency_B1HW.reshape(2, 1, 4, 2, 4, 2).mean((3, 5))
    weight_B1HW = cell_B1HW / (cell_B1HW.mean((2, 3), keepdims=True) + 0.05) + 1e-3
    expected_BD = (weight_B1HW * patch_BDHW).sum((2, 3)) / weight_B1HW.sum((2, 3))
    pooled_BD = figure_ground(torch.tensor(patch_BDHW), torch.tensor(saliency_B1HW), floor=0.05)
    np.testing.assert_allclose(pooled_BD.numpy(), expected_BD, rtol=1e-5)


def test_a_blank_map_pools_like_the_mean_and_not_to_nan():
    patch_BDHW = torch.randn(2, 5, 4, 4)
    pooled_BD = figure_ground(patch_BDHW, torch.zeros(2, 1, 16, 16), floor=0.05)
    torch.testing.assert_close(pooled_BD, patch_BDHW.mean((2, 3)))


def test_figure_ground_looks_where_the_map_says():
    network = build_network(spec_of("resnet10t", pooling=FigureGroundPooling()), seed=0).eval()
    left_B1HW = torch.zeros(1, 1, 16, 16)
    left_B1HW[..., :8] = 1
    outputs = network(torch.randn(1, 3, 64, 64), left_B1HW)
    left_BD = outputs["patch"][..., :4].mean((2, 3))
    torch.testing.assert_close(outputs["embedding"], left_BD, atol=2e-3, rtol=2e-3)


def test_figure_ground_without_a_map_is_refused():
    network = build_network(spec_of(pooling=FigureGroundPooling()), seed=0)
    with pytest.raises(ValueError, match="saliency map"):
        network(torch.randn(1, 3, 64, 64))


def test_without_classes_there_are_no_logits():
    assert set(build_network(spec_of(classes=()), seed=0)(torch.randn(2, 3, 64, 64))) == {"embedding", "patch"}


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    first = build_network(spec_of(), seed=5).state_dict()
    drawn = torch.rand(1)
    second = build_network(spec_of(), seed=5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1)), "the caller's generator must not move"


def test_building_leaves_batch_statistics_and_mode_untouched():
    network = build_network(spec_of(), seed=0)
    assert network.training
    assert int(network.backbone.timm.bn1.num_batches_tracked) == 0


def test_the_backbone_loads_into_plain_timm():
    network = build_network(spec_of("vit_tiny_patch16_224"), seed=0).eval()
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, **VIT).eval()
    plain.load_state_dict(network.backbone.timm.state_dict())
    image_BCHW = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain(image_BCHW), network(image_BCHW)["logits"])


def test_every_output_carries_gradients_to_the_first_layer():
    network = build_network(spec_of(heads=heads({"edge": 1}, teacher_dim=4)), seed=0)
    for key, output in network(torch.randn(4, 3, 64, 64)).items():
        network.zero_grad()
        output.square().sum().backward(retain_graph=True)
        assert network.backbone.timm.conv1[0].weight.grad.abs().sum() > 0, key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ModelSettings(name="resnet18x"), "nearest: resnet18"),
        (ModelSettings(name="resnet18", arguments={"chanels": [8]}), "chanels"),
        (ModelSettings(name="resnet18", arguments={"num_classes": 4}), "model.arguments.num_classes"),
        (ModelSettings(name="resnet18", arguments={"output_stride": 7}), "output_stride=7"),
        (ModelSettings(name="resnet18", arguments={"global_pool": ""}), "pooling"),
        (ModelSettings(name="vit_tiny_patch16_224", arguments={**VIT, "img_size": 32}), "64 px"),
        (
            ModelSettings(name="deit_tiny_distilled_patch16_224", arguments={"depth": 1}),
            "not a function of its embedding",
        ),
        (ModelSettings(name="efficientformer_l1"), "64 px"),
        (ModelSettings(name="resnet18", arguments={"features_only": True}), "model.arguments.features_only"),
    ],
)
def test_what_timm_cannot_build_or_run_is_the_users_error(settings, message):
    with pytest.raises(UserError, match=message):
        Network(NetworkSpec(model=settings, classes=("a",), image_size=64, mean=(0.5,) * 3, std=(0.2,) * 3))


@pytest.mark.parametrize("name", ["resnet10t", "vit_small_patch16_224"])
def test_the_whole_network_compiles_once_to_one_graph(name):
    network = build_network(spec_of(name, pooling=FigureGroundPooling(), heads=heads({"edge": 1})), seed=0)
    statistics = StepStatistics(network)
    counter = CompileCounter()
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    image_BCHW, weight_B1HW = torch.randn(2, 3, 64, 64), torch.rand(2, 1, 16, 16)
    for _ in range(3):
        with statistics.micro_batch():
            outputs = compiled(image_BCHW, weight_B1HW)
        statistics.commit(lambda vector: vector)
    assert counter.frame_count == 1
    torch.testing.assert_close(outputs, network(image_BCHW, weight_B1HW))


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_the_patch_grid_follows_the_size_of_the_images(name):
    arguments = {
        **FAMILIES[name],
        **({} if name == "resnet10t" else {"dynamic_img_size": True} if "vit" in name else {}),
    }
    if "swin" in name:
        arguments = {**arguments, "strict_img_size": False}
    network = build_network(spec_of(name, arguments=arguments, heads=heads({"edge": 1})), seed=0).eval()
    with torch.no_grad():
        large, small = network(torch.randn(2, 3, 64, 64)), network(torch.randn(2, 3, 32, 32))
    height, width = network.backbone.grid
    assert large["patch"].shape[2:] == large["prior/edge"].shape[2:] == (height, width)
    assert small["patch"].shape[2:] == small["prior/edge"].shape[2:] == (height // 2, width // 2)


def test_weights_that_are_no_file_are_named():
    with pytest.raises(UserError, match=r"/nowhere/weights\.pt"):
        build_network(spec_of(), weights="/nowhere/weights.pt")
