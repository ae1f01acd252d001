"""What holds for every prior; a new one is tested by being in the union."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from dpkd.priors import BUILT_IN, DEFAULT_PRIORS, Prior
from dpkd.priors.base import ImageViews, fingerprint
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.orientation import Hog
from dpkd.priors.catalogue.regions import Expert, Mask
from dpkd.priors.learned import Learned
from tests.model_cases import edge_prior, save_edges

KINDS = [kind for kind in BUILT_IN if kind not in (Expert, Mask, Learned)]  # maps of experts are given: test_expert.py
every_prior = pytest.mark.parametrize("prior", [*(kind().kind for kind in KINDS), "learned"], indirect=True)


@pytest.fixture(scope="session")
def edge_model(tmp_path_factory) -> Path:
    """An ONNX model that finds edges of some sort."""
    path = tmp_path_factory.mktemp("model") / "edges.onnx"
    save_edges(path)
    return path


@pytest.fixture
def prior(request, edge_model):
    """The prior of that kind, by its defaults."""
    if request.param == "learned":
        return edge_prior(edge_model, stride=8, batch_size=1).sealed()
    return next(kind() for kind in KINDS if kind().kind == request.param)


# kind -> (version, mean and deviation of the map of the scene). Whoever changes the numbers raises the version, so that
# maps made before are not taken for maps made after.
KNOWN = {
    "edge": (3, 0.0256, 0.1023),
    "orientation": (1, 0.4458, 0.3696),
    "superpixel": (2, 10.1432, 6.2177),
    "saliency": (2, 0.2703, 0.3078),
    "lbp": (1, 0.3048, 0.0842),
    "gabor": (2, 0.1351, 0.0553),
    "colour": (2, 0.3215, 0.2157),
    "ridge": (2, 0.1457, 0.0652),
    "hog": (1, 0.2853, 0.1724),
    "hue": (1, 0.0858, 0.0938),
    "symmetry": (1, 0.0395, 0.0356),
    "glcm": (1, 0.5464, 0.3829),
    "learned": (1, 0.4972, 0.2254),
}


STRIDE = {"edge": 2} | dict.fromkeys(("saliency", "superpixel"), 4)
STRIDE |= dict.fromkeys(("hog", "ridge", "symmetry", "learned"), 8)
STRIDE |= dict.fromkeys(("orientation", "lbp", "gabor", "colour", "hue", "glcm"), 16)

# How far the map of a crop, well within it, is from the crop of the map, and the map of the image under a darker or
# bluer light from the map under plain light: mean absolute differences, None where nothing is promised.
CROP = {"saliency": None, "superpixel": None, "learned": None, "gabor": 0.03, "edge": 0.01, "symmetry": 0.02}
DARKER = {"edge": 0.1, "orientation": 0.03, "lbp": 0.08, "hog": 0.03, "hue": 0.05, "superpixel": None, "saliency": 0.1}
BLUER = {"edge": 0.1, "orientation": 0.06, "lbp": 0.12, "hog": 0.06, "gabor": 0.06, "ridge": 0.06, "glcm": 0.1}


@every_prior
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (7, 5), (16, 16), (37, 53), (130, 60)])
def test_images_of_any_size_have_a_map_of_the_right_type_and_range(prior, size):
    image_HWC = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    before_HWC = image_HWC.copy()
    map_HWC = prior.map(ImageViews(image_HWC))
    assert map_HWC.ndim == 3
    assert map_HWC.shape[2] == prior.channels
    assert map_HWC.dtype == (np.int32 if prior.nearest else np.float32)
    assert map_HWC.min() >= 0
    assert prior.nearest or map_HWC.max() <= 1
    np.testing.assert_array_equal(image_HWC, before_HWC)


@every_prior
def test_grids_grow_with_the_image(prior):
    image_HWC = np.zeros((84, 224, 3), np.uint8)
    stride = STRIDE[prior.kind]
    assert prior.map(ImageViews(image_HWC)).shape[:2] == (round(84 / stride), 224 // stride)


@every_prior
def test_the_same_image_has_the_same_map_every_time(prior, scene):
    first_HWC = prior.map(ImageViews(scene))
    prior.map(ImageViews(255 - scene))
    np.testing.assert_array_equal(prior.map(ImageViews(scene)), first_HWC)


@every_prior
def test_the_flipped_map_is_the_map_of_the_mirrored_image(prior, scene):
    flipped_HWC, expected_HWC = (
        prior.flip(prior.map(ImageViews(scene))),
        prior.map(ImageViews(np.ascontiguousarray(scene[:, ::-1]))),
    )
    if prior.nearest:  # labels mean nothing beyond their image: only the mirroring itself is defined
        np.testing.assert_array_equal(flipped_HWC, prior.map(ImageViews(scene))[:, ::-1])
    else:
        np.testing.assert_allclose(flipped_HWC, expected_HWC, atol=0.1 if prior.kind == "saliency" else 2e-3)
        assert np.abs(flipped_HWC - expected_HWC).mean() < 0.02  # a raster scan has a direction
    np.testing.assert_allclose(prior.flip(flipped_HWC), prior.map(ImageViews(scene)), atol=1e-6)


@every_prior
def test_the_map_of_a_crop_is_the_crop_of_the_map_away_from_the_frame(prior, photograph):
    tolerance = CROP.get(prior.kind, 1e-3)
    if tolerance is None:
        pytest.skip("looks at the whole image")
    whole_HWC, part_HWC = prior.map(ImageViews(photograph)), prior.map(ImageViews(photograph[32:160, 64:224].copy()))
    stride = STRIDE[prior.kind]
    margin = -(-32 // stride)
    expected_HWC = whole_HWC[32 // stride : 160 // stride, 64 // stride : 224 // stride][margin:-margin, margin:-margin]
    assert np.abs(part_HWC[margin:-margin, margin:-margin] - expected_HWC).mean() <= tolerance


@every_prior
@pytest.mark.parametrize(
    ("light", "promise"), [((0.6, 0.6, 0.6), DARKER), ((0.8, 0.9, 1.0), BLUER)], ids=["darker", "bluer"]
)
def test_another_light_changes_the_map_no_more_than_the_prior_promises(prior, photograph, light, promise):
    if promise.get(prior.kind) is None:
        pytest.skip("measures light or colour itself")
    lit_HWC = np.rint(photograph * np.float32(light)).astype(np.uint8)
    difference = np.abs(prior.map(ImageViews(lit_HWC)) - prior.map(ImageViews(photograph))).mean()
    other = np.abs(prior.map(ImageViews(photograph[::-1].copy())) - prior.map(ImageViews(photograph))).mean()
    assert difference <= promise[prior.kind]
    assert difference < other


@every_prior
def test_the_stored_map_is_close_to_the_computed_one(prior, scene):
    map_HWC = prior.map(ImageViews(scene))
    back_HWC = prior.codec.decode(prior.codec.encode(map_HWC), map_HWC.shape)
    assert back_HWC.dtype == map_HWC.dtype
    assert np.abs(back_HWC - map_HWC).mean() <= (0 if prior.nearest else 0.02)


@every_prior
def test_another_map_from_the_same_settings_has_another_version(prior, scene):
    version, mean, deviation = KNOWN[prior.kind]
    map_HWC = prior.map(ImageViews(scene))
    assert prior.version == version
    np.testing.assert_allclose((map_HWC.mean(), map_HWC.std()), (mean, deviation), rtol=5e-3)


@every_prior
def test_settings_survive_json_and_pickle_with_their_fingerprint(prior):
    adapter = TypeAdapter(Prior)
    read = adapter.validate_json(adapter.dump_json(prior))
    assert read == prior == pickle.loads(pickle.dumps(prior))
    assert fingerprint(read) == fingerprint(prior)


def test_fingerprints_differ_by_kind_by_settings_and_by_version():
    class NewerEdge(Edge):
        version: ClassVar[int] = 4

    priors = [*DEFAULT_PRIORS, Edge(stride=8), Edge(thin=False), Hog(bins=8), NewerEdge()]
    assert len({fingerprint(prior) for prior in priors}) == len(priors)
    assert fingerprint(Edge()) == fingerprint(Edge(stride=2))


def test_an_unknown_kind_or_setting_is_refused_by_name():
    with pytest.raises(ValidationError, match="edges"):
        TypeAdapter(Prior).validate_python({"kind": "edges"})
    with pytest.raises(ValidationError, match="strid"):
        TypeAdapter(Prior).validate_python({"kind": "edge", "strid": 4})


def test_settings_load_no_heavy_package():
    heavy = {"torch", "timm", "onnx", "onnxruntime", "numba", "scipy", "skimage"}
    code = f"import sys, dpkd.priors; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
