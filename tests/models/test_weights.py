"""Weights to start from: what fits is loaded, what does not is refused by name."""

import argparse
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from dpkd.errors import UserError
from dpkd.models.network import build_network
from dpkd.models.saved import save_network
from dpkd.models.settings import ModelSettings, NetworkSpec

VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def spec_of(name: str, *, arguments=None, num_classes=3, size=32) -> NetworkSpec:
    model = ModelSettings(name=name, arguments=arguments or {})
    classes = tuple(f"class {number}" for number in range(num_classes))
    return NetworkSpec(model=model, classes=classes, image_size=size, mean=(0.5,) * 3, std=(0.2,) * 3)


def same(ours, theirs, *, but=()) -> bool:
    theirs = theirs.state_dict()
    return all(
        torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items() if not name.startswith(but)
    )


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"epoch": 3, "state_dict": state}])
def test_a_torch_file_loads_whole_with_its_classifier(tmp_path, wrap):
    plain = timm.create_model("test_resnet", num_classes=3)
    torch.save(wrap(plain.state_dict()), tmp_path / "weights.pt")
    assert same(build_network(spec_of("test_resnet"), weights=str(tmp_path / "weights.pt")).backbone.timm, plain)


@pytest.mark.parametrize("prefix", ["model.", "net.backbone.", "module.model.", "backbone.timm."])
def test_a_prefix_of_all_names_is_removed_and_what_lacks_it_is_ignored(tmp_path, prefix):
    plain = timm.create_model("test_resnet", num_classes=3)
    state = {f"{prefix}{name}": tensor for name, tensor in plain.state_dict().items()}
    others = {"loss.weight": torch.ones(2), "hyper_parameters": argparse.Namespace(lr=0.1)}
    torch.save({"state_dict": state | {"loss.weight": torch.ones(2)}, **others}, tmp_path / "last.ckpt")
    assert same(build_network(spec_of("test_resnet"), weights=str(tmp_path / "last.ckpt")).backbone.timm, plain)


def test_averaged_weights_are_taken_before_the_last_ones(tmp_path):
    plain, last = (timm.create_model("test_resnet", num_classes=3) for _ in range(2))
    torch.save({"state_dict": last.state_dict(), "state_dict_ema": plain.state_dict()}, tmp_path / "last.pth.tar")
    assert same(build_network(spec_of("test_resnet"), weights=str(tmp_path / "last.pth.tar")).backbone.timm, plain)


def test_a_file_of_several_networks_is_refused(tmp_path):
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    both = {f"{name}.backbone.{key}": tensor for name in ("student", "teacher") for key, tensor in state.items()}
    torch.save(both, tmp_path / "dino.pth")
    with pytest.raises(UserError, match=r"several networks \(student.backbone., teacher.backbone.\)"):
        build_network(spec_of("test_resnet"), weights=str(tmp_path / "dino.pth"))


def test_a_message_on_weights_of_another_model_is_short(tmp_path):
    torch.save({"vit.embeddings.cls_token": torch.ones(1, 1, 192)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"the file has 'vit\.embeddings\.cls_token'") as caught:
        build_network(spec_of("resnet18"), weights=str(tmp_path / "weights.pt"))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_classifier_of_other_classes_is_left_out(tmp_path):
    plain = timm.create_model("test_resnet", num_classes=10)
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    network = build_network(spec_of("test_resnet"), weights=str(tmp_path / "weights.safetensors"))
    assert same(network.backbone.timm, plain, but=("fc.",))
    assert network.backbone.timm.fc.out_features == 3


def test_a_network_saved_by_dpkd_is_a_start_too(tmp_path):
    spec = spec_of("test_resnet")
    first = build_network(spec, seed=1)
    save_network(tmp_path, spec, first.state_dict())
    second = build_network(spec_of("test_resnet"), weights=str(tmp_path / "model.safetensors"), seed=2)
    assert same(second.backbone.timm, first.backbone.timm)


def test_position_embeddings_of_another_size_are_resampled(tmp_path):
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **VIT)
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    spec = spec_of("vit_tiny_patch16_224", arguments=VIT, size=64)
    network = build_network(spec, weights=str(tmp_path / "weights.safetensors"))
    assert network.backbone.timm.pos_embed.shape == (1, 65, 48)
    assert same(network.backbone.timm, plain, but=("pos_embed", "head."))


def test_weights_of_another_model_are_refused_by_name(tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=3, img_size=32).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt does not fit the model"):
        build_network(spec_of("test_resnet"), weights=str(tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    ("name", "content"), [("a.pt", b"junk"), ("b.pt", b""), ("c.safetensors", b"junk"), ("d.safetensors", b"")]
)
def test_a_file_that_is_no_weights_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        build_network(spec_of("test_resnet"), weights=str(tmp_path / name))


def test_a_file_that_holds_other_things_is_refused(tmp_path):
    torch.save({"loss": 0.5}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="no state dict"):
        build_network(spec_of("test_resnet"), weights=str(tmp_path / "weights.pt"))
