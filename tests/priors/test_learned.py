"""Maps by models of the user's: tiny ones, made here, beside the same models run by hand."""

import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import nn

from dpkd.errors import UserError
from dpkd.priors import Prior
from dpkd.priors.base import BatchExtractor, ImageViews, fingerprint
from dpkd.priors.codecs import BYTES, JpegCodec
from dpkd.priors.learned import Learned, TimmModel, scaled
from tests.model_cases import (
    MEAN,
    SIZE,
    STD,
    Depth,
    Edges,
    attention_prior,
    depth_prior,
    edge_prior,
    save_edges,
    save_onnx,
    save_vit,
)


def pictures(count: int) -> list[ImageViews]:
    """Smooth random images of several sizes."""
    random = np.random.default_rng(0)
    drawn = [random.uniform(0, 255, (20 + 7 * i, 50 - 3 * i, 3)).astype(np.float32) for i in range(count)]
    return [ImageViews(cv2.GaussianBlur(each_HWC, (0, 0), 2).astype(np.uint8)) for each_HWC in drawn]


def as_input(picture: ImageViews) -> torch.Tensor:
    """The image as the model is to see it, 1CHW, by torch alone."""
    height, width = picture.size
    method = cv2.INTER_AREA if min(height, width) >= SIZE else cv2.INTER_LINEAR
    image_HWC = cv2.resize(picture.rgb_HWC, (SIZE, SIZE), interpolation=method)
    image_CHW = torch.from_numpy(image_HWC).permute(2, 0, 1).float() / 255
    return ((image_CHW - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]


def test_the_class_attention_is_that_of_the_last_block(tmp_path):
    vit = save_vit(tmp_path / "vit.safetensors")
    prior = attention_prior(tmp_path / "vit.safetensors")
    seen = []
    vit.blocks[-1].attn.fused_attn = False
    vit.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for picture in pictures(3):
        map_HWC = prior.map(picture)
        vit(as_input(picture))
        expected_HW = seen.pop()[0, :, 0, 1:].mean(0).view(4, 4).detach()
        np.testing.assert_allclose(map_HWC[:, :, 0], expected_HW / expected_HW.max(), atol=1e-5)
        assert map_HWC.std() > 0.01


def test_the_energy_and_the_features_are_those_of_the_patches(tmp_path):
    vit = save_vit(tmp_path / "vit.safetensors")
    (picture,) = pictures(1)
    with torch.no_grad():
        patch_HWD = vit.forward_features(as_input(picture))[0, 1:].view(4, 4, 24).numpy()
    energy = attention_prior(tmp_path / "vit.safetensors", model={"output": "energy"})
    expected_HW = (patch_HWD**2).sum(2)
    np.testing.assert_allclose(energy.map(picture)[:, :, 0], expected_HW / expected_HW.max(), atol=1e-4)
    features = attention_prior(tmp_path / "vit.safetensors", model={"output": "features"}, channels=24, scale="minmax")
    low_D, high_D = patch_HWD.min((0, 1)), patch_HWD.max((0, 1))
    np.testing.assert_allclose(features.map(picture), (patch_HWD - low_D) / (high_D - low_D), atol=1e-4)


def test_an_onnx_model_of_several_outputs_gives_the_one_that_is_named(tmp_path):
    edges = save_edges(tmp_path / "edges.onnx")
    (picture,) = pictures(1)
    for position, expected in enumerate(edges(as_input(picture))):
        prior = edge_prior(tmp_path / "edges.onnx", model={"output": position})
        np.testing.assert_allclose(prior.map(picture)[:, :, 0], torch.sigmoid(expected)[0, 0].detach(), atol=1e-5)


def test_an_onnx_model_gives_what_its_torch_model_gives(tmp_path):
    depth = save_onnx(tmp_path / "depth.onnx", Depth())
    (picture,) = pictures(1)
    expected_HW = depth(as_input(picture))[0].detach().numpy()
    expected_HW = (expected_HW - expected_HW.min()) / (expected_HW.max() - expected_HW.min())
    np.testing.assert_allclose(depth_prior(tmp_path / "depth.onnx").map(picture)[:, :, 0], expected_HW, atol=1e-4)


def test_the_stride_gives_the_mean_of_the_models_cells_on_the_grid_of_the_image(tmp_path):
    save_edges(tmp_path / "edges.onnx")
    picture = ImageViews(np.random.default_rng(0).integers(0, 256, (64, 32, 3), np.uint8))
    own_HWC, coarse_HWC = (edge_prior(tmp_path / "edges.onnx", stride=stride).map(picture) for stride in (None, 8))
    assert (own_HWC.shape, coarse_HWC.shape) == ((16, 16, 1), (8, 4, 1))
    np.testing.assert_allclose(coarse_HWC, own_HWC.reshape(8, 2, 4, 4, 1).mean((1, 3)), atol=1e-6)


@pytest.mark.parametrize("kind", ["timm", "onnx"])
def test_the_map_at_a_place_of_a_batch_does_not_depend_on_the_other_images(tmp_path, kind):
    save, make, model = {
        "timm": (save_vit, attention_prior, ()),
        "onnx": (save_onnx, depth_prior, (Depth(),)),
    }[kind]
    save(tmp_path / "file.safetensors", *model)
    prior = make(tmp_path / "file.safetensors")
    first, second, third, fourth = pictures(4)
    together = prior.maps([first, second, third, fourth], device="cpu")
    np.testing.assert_array_equal(prior.maps([first], device="cpu")[0], together[0])
    np.testing.assert_array_equal(prior.maps([fourth, second, first], device="cpu")[1], together[1])


def test_colours_come_in_the_order_that_the_model_was_trained_on(tmp_path):
    save_edges(tmp_path / "edges.onnx")
    (picture,) = pictures(1)
    swapped = ImageViews(np.ascontiguousarray(picture.rgb_HWC[:, :, ::-1]))
    bgr = edge_prior(tmp_path / "edges.onnx", colour="bgr", mean=MEAN[::-1], std=STD[::-1])
    flat = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    rgb = edge_prior(tmp_path / "edges.onnx", **flat)
    np.testing.assert_allclose(
        edge_prior(tmp_path / "edges.onnx", colour="bgr", **flat).map(picture), rgb.map(swapped), atol=1e-6
    )
    assert np.abs(bgr.map(picture) - edge_prior(tmp_path / "edges.onnx").map(picture)).mean() > 0.01


def test_every_scale_gives_the_values_of_its_definition():
    values_BCHW = np.random.default_rng(0).normal(0, 5, (2, 3, 4, 5)).astype(np.float32)
    values = torch.from_numpy(values_BCHW)
    np.testing.assert_allclose(scaled(values_BCHW, "sigmoid"), torch.sigmoid(values), atol=1e-6)
    np.testing.assert_allclose(scaled(values_BCHW, "softmax"), torch.softmax(values, 1), atol=1e-6)
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    np.testing.assert_allclose(scaled(values_BCHW, "minmax"), (values - low) / (high - low), atol=1e-6)
    np.testing.assert_allclose(scaled(values_BCHW, "largest"), (values / high).clamp(0, 1), atol=1e-6)
    np.testing.assert_allclose(scaled(values_BCHW / 300, "unit"), (values / 300).clamp(0, 1), atol=1e-6)
    for scale in ("minmax", "largest"):
        assert np.unique(scaled(np.full((1, 1, 2, 2), -3, np.float32), scale)).tolist() == [0.0]


def test_the_weights_name_the_prior_and_their_place_does_not(tmp_path):
    save_vit(tmp_path / "a.safetensors", seed=0)
    save_vit(tmp_path / "b.safetensors", seed=1)
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "copy.safetensors")
    first, other, copy = (attention_prior(tmp_path / f"{name}.safetensors").sealed() for name in ("a", "b", "copy"))
    assert fingerprint(first) == fingerprint(copy)
    assert fingerprint(first) != fingerprint(other)
    for same in ({"batch_size": 2}, {"device": "cpu"}):
        assert fingerprint(attention_prior(tmp_path / "a.safetensors", **same).sealed()) == fingerprint(first)
    for changed in ({"stride": 4}, {"mean": (0.5,) * 3}, {"scale": "minmax"}, {"model": {"output": "energy"}}):
        assert fingerprint(attention_prior(tmp_path / "a.safetensors", **changed).sealed()) != fingerprint(first)
    shutil.copy(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    assert fingerprint(attention_prior(tmp_path / "a.safetensors").sealed()) == fingerprint(other)


def test_external_data_of_an_onnx_model_counts_as_its_weights(tmp_path):
    seals = []
    for seed in (0, 1):
        save_onnx(tmp_path / "depth.onnx", Depth(seed=seed), external_data=True)
        assert (tmp_path / "depth.onnx.data").exists()
        seals.append(depth_prior(tmp_path / "depth.onnx").sealed().model.sha256)
    assert seals[0] != seals[1]
    (tmp_path / "depth.onnx.data").unlink()
    with pytest.raises(UserError, match=r"'learned-depth'.*depth\.onnx\.data is missing"):
        depth_prior(tmp_path / "depth.onnx").sealed()


def test_a_sealed_prior_is_read_without_its_weights(tmp_path):
    save_vit(tmp_path / "vit.safetensors")
    prior = attention_prior(tmp_path / "vit.safetensors").sealed()
    (tmp_path / "vit.safetensors").unlink()
    adapter = TypeAdapter(Prior)
    read = adapter.validate_json(adapter.dump_json(prior))
    assert read == prior == pickle.loads(pickle.dumps(prior)) == prior.sealed()
    assert fingerprint(read) == fingerprint(prior)
    assert isinstance(read, BatchExtractor)


def test_few_cells_and_many_channels_are_stored_as_bytes(tmp_path):
    assert attention_prior(tmp_path / "x").codec == BYTES
    assert depth_prior(tmp_path / "x").codec == JpegCodec()
    assert depth_prior(tmp_path / "x", channels=12, scale="softmax").codec == BYTES


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": (0.5,)}, "mean has 1 numbers, and colour=rgb needs 3"),
        ({"std": (0.0, 0.1, 0.1)}, "std and size must be greater than 0"),
        ({"scale": "softmax"}, "scale=softmax needs more than one channel, and channels=1"),
        ({"size": (32, 48)}, "a square size"),
        ({"channels": 2}, "output=attention of a timm model has one channel"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path, changes, words):
    with pytest.raises(ValidationError, match=words):
        attention_prior(tmp_path / "vit.safetensors", **changes)


class Broken(nn.Module):
    """Gives NaN for every image."""

    def forward(self, image_BCHW):
        return torch.log(-1 - image_BCHW[:, :1] ** 2)


def wrong_models(folder: Path) -> dict[str, tuple[Learned, str]]:
    """A prior that cannot work, and what the error says of it, by name."""
    save_vit(folder / "vit.safetensors")
    save_edges(folder / "edges.onnx")
    save_onnx(folder / "one.onnx", Edges(), batch_size=1)
    save_onnx(folder / "nan.onnx", Broken())
    save_onnx(folder / "depth.onnx", Depth())
    named = {"output": "depth"}
    return {
        "channels": (edge_prior(folder / "edges.onnx", channels=3), r"\(4, 1, 16, 16\).*3 channels.*set channels"),
        "size": (edge_prior(folder / "edges.onnx", size=48), r"does not run on float32 of \(4, 3, 48, 48\).*set size"),
        "batch": (edge_prior(folder / "one.onnx"), r"does not run on float32 of \(4, .*batch_size"),
        "position": (
            edge_prior(folder / "edges.onnx", model={"output": 2}),
            "=2 is not one of the 2 outputs: ",
        ),
        "unnamed": (
            edge_prior(folder / "edges.onnx", model={"output": None}),
            "=None is not one of the 2",
        ),
        "name": (depth_prior(folder / "depth.onnx", model=named), "model.output='depth' is not one of the 1 outputs"),
        "wide": (edge_prior(folder / "edges.onnx", scale="unit"), "are from .* scale=unit .* set scale to sigmoid"),
        "nan": (edge_prior(folder / "nan.onnx", model={"output": None}), "for blank images are not finite"),
        "grey": (depth_prior(folder / "depth.onnx", colour="grey", mean=(0.5,), std=(0.2,)), "does not run on float32"),
        "weights": (
            Learned(of="x", size=SIZE, model=TimmModel(name="test_vit", file=str(folder / "vit.safetensors"))),
            "does not fit the model",
        ),
        "unknown": (
            Learned(of="x", size=SIZE, model=TimmModel(name="vit_tinny", file=str(folder / "vit.safetensors"))),
            "'vit_tinny' is not a timm model; nearest: .*vit",
        ),
    }


WRONG = ("channels", "size", "batch", "position", "unnamed", "name", "wide", "nan")
WRONG += ("grey", "weights", "unknown")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    return wrong_models(tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize("name", WRONG)
def test_a_model_that_cannot_work_is_named_before_its_first_map(wrong, name):
    prior, words = wrong[name]
    with pytest.raises(UserError, match=rf"(?s)the prior '{prior.name}', {prior.model.file}: .*{words}"):
        prior.sealed().maps(pictures(2), device="cpu")


def test_what_is_no_onnx_model_is_named_when_it_is_sealed(tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(UserError, match=r"'learned-depth'.*cannot be read as a model"):
        depth_prior(tmp_path / "text.onnx").sealed()


def test_other_weights_than_the_settings_name_are_refused(tmp_path):
    save_vit(tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=r"its sha256 is [0-9a-f]{64}, and model\.sha256 is 00"):
        attention_prior(tmp_path / "vit.safetensors", model={"sha256": "00"}).sealed()
    with pytest.raises(UserError, match=r"'learned-attention', .*gone is missing: give the path of the weights"):
        attention_prior(tmp_path / "gone").sealed()
    prior = attention_prior(tmp_path / "vit.safetensors").sealed()
    save_vit(tmp_path / "vit.safetensors", seed=1)
    with pytest.raises(UserError, match=r"on this machine.*copy the file again"):
        prior.maps(pictures(1), device="cpu")


def test_the_examples_of_the_page_are_taken():
    page = (Path(__file__).resolve().parents[2] / "docs/priors.md").read_text()
    example = page.partition("## A model of yours")[2].partition("```yaml\n")[2].partition("```")[0]
    priors = TypeAdapter(tuple[Prior, ...]).validate_python(yaml.safe_load(example)["prepare"]["priors"])
    assert [prior.name for prior in priors] == ["saliency", "learned-attention", "learned-depth", "learned-edges"]
