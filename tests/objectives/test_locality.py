"""Layers that follow layers: the loss against the authors' formula, and the layers of each family against hooks."""

import pytest
import torch
import torch.nn.functional as F

from dpkd.errors import UserError
from dpkd.models.network import build_network
from dpkd.models.settings import HeadSpec
from dpkd.objectives.base import losses_of
from dpkd.objectives.locality import LocalityGuidance
from dpkd.settings import parse_settings
from tests.contexts import context_of
from tests.models.test_network import FAMILIES, spec_of


def test_layers_are_compared_on_the_larger_grid_as_by_the_authors():
    student = {"to_teacher/layer-0-1": torch.randn(2, 6, 3, 5), "to_teacher/layer-2-0": torch.randn(2, 4, 4, 4)}
    taught = {"layer-1": torch.randn(2, 6, 6, 4), "layer-0": torch.randn(2, 4, 4, 4)}
    losses = losses_of([LocalityGuidance(layers={0: 1, 2: 0})], context_of(student, {"t": taught}))
    assert losses.keys() == {"locality.layer-0", "locality.layer-2"}
    for own, other in ((0, 1), (2, 0)):
        pair = student[f"to_teacher/layer-{own}-{other}"], taught[f"layer-{other}"]
        size = tuple(max(one.shape[axis] for one in pair) for axis in (2, 3))
        one, two = (F.interpolate(x.double(), size, mode="bilinear", align_corners=False) for x in pair)
        expected = 2.5 * (one - two).square().mean()
        assert float(losses[f"locality.layer-{own}"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_leave_all_other_outputs_as_they_are_and_have_the_width_of_their_heads(name):
    head = HeadSpec(reads="layer-1", width=5)
    plain = build_network(spec_of(name), seed=0).eval()
    network = build_network(spec_of(name, heads={"to_teacher/layer-1-0": head}), seed=0).eval()
    network.extra = frozenset({"layer-0"})
    image_BCHW = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before, after = plain(image_BCHW), network(image_BCHW)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert after.keys() - before.keys() == {"layer-0", "layer-1", "to_teacher/layer-1-0"}
    assert after["layer-0"].shape[:2] == (2, network.backbone.width("layer-0"))
    assert after["to_teacher/layer-1-0"].shape == (2, 5, *after["layer-1"].shape[2:])


@pytest.mark.parametrize(("name", "module"), [("vit_small_patch16_224", "blocks.0"), ("resnet10t", "layer1")])
def test_a_layer_is_the_output_of_its_module(name, module):
    network = build_network(spec_of(name), seed=0).eval()
    index = 0 if name.startswith("vit") else 1
    network.extra = frozenset({f"layer-{index}"})
    caught = []
    network.backbone.timm.get_submodule(module).register_forward_hook(lambda *call: caught.append(call[2]))
    with torch.no_grad():
        layer_BDHW = network(torch.randn(2, 3, 64, 64))[f"layer-{index}"]
    expected = caught[0]
    if name.startswith("vit"):
        expected = network.backbone.patches(expected, (64, 64))
    assert torch.equal(layer_BDHW, expected)


def test_a_layer_that_the_model_lacks_is_named():
    with pytest.raises(UserError, match=r"'vit_tiny_patch16_224' has no layer 2: timm gives 2, counted from 0"):
        build_network(spec_of("vit_tiny_patch16_224", heads={"x": HeadSpec(reads="layer-2", width=5)}))


def test_gradients_reach_the_layer_and_those_before_it_alone():
    spec = spec_of("vit_tiny_patch16_224", heads={"to_teacher/layer-0-1": HeadSpec(reads="layer-0", width=5)})
    network = build_network(spec, seed=0)
    context = context_of(network(torch.randn(2, 3, 64, 64)), {"t": {"layer-1": torch.randn(2, 5, 4, 4)}})
    (loss,) = losses_of([LocalityGuidance(layers={0: 1})], context).values()
    loss.backward()
    first, second = network.backbone.timm.blocks
    assert first.mlp.fc1.weight.grad.abs().sum() > 0
    assert second.mlp.fc1.weight.grad is None


def test_layers_are_numbers_in_settings():
    student = {"model": "resnet18", "objectives": [{"kind": "locality", "layers": {"0": 1, 6: 2}}]}
    teacher = {"model": "resnet18", "objectives": [{"kind": "supervised"}]}
    tree = {"data": {"source": "x"}, "teachers": {"teacher": teacher}, "distill": {"students": {"s": student}}}
    (objective,) = parse_settings(tree, origin="test").distill.students["s"].objectives
    assert objective == LocalityGuidance(layers={0: 1, 6: 2})
