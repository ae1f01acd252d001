"""Models of the user's on a GPU: the same maps as on the CPU, within rounding. Skipped where there is none."""

import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from dpkd.backends.factory import make_accelerator
from dpkd.backends.local_pool import LocalPool
from dpkd.data.shards import Dataset
from dpkd.launch.settings import LauncherSettings
from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.store import PriorSet
from tests.model_cases import (
    Depth,
    attention_prior,
    depth_prior,
    edge_prior,
    save_edges,
    save_onnx,
    save_vit,
)
from tests.prior_cases import draw_images, pack_folder, prepare_all

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
ON_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
with_onnx = pytest.mark.skipif(not ON_CUDA, reason="no onnxruntime-gpu")


def three_priors(folder: Path) -> dict:
    """A prior of each kind of model."""
    save_vit(folder / "vit.safetensors")
    save_edges(folder / "edges.onnx")
    save_onnx(folder / "depth.onnx", Depth())
    return {
        "timm": attention_prior(folder / "vit.safetensors"),
        "edges": edge_prior(folder / "edges.onnx"),
        "onnx": depth_prior(folder / "depth.onnx"),
    }


@pytest.mark.parametrize(
    "kind", ["timm", pytest.param("edges", marks=with_onnx), pytest.param("onnx", marks=with_onnx)]
)
def test_maps_on_a_gpu_are_those_of_the_cpu(tmp_path, kind):
    prior = three_priors(tmp_path)[kind]
    random = np.random.default_rng(0)
    pictures = [ImageViews(random.integers(0, 256, (40, 48, 3), np.uint8)) for _ in range(3)]
    for here, there in zip(prior.maps(pictures, device="cpu"), prior.maps(pictures, device="cuda"), strict=True):
        np.testing.assert_allclose(there, here, atol=0.02)


def device_of(_item: int) -> tuple[str, int]:
    """What this worker may see."""
    return os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.device_count()


def test_each_gpu_has_a_worker_that_sees_it_alone(tmp_path):
    accelerator = make_accelerator(LauncherSettings(kind="local"), hangs=tmp_path / "hangs")
    assert accelerator is not None
    pool, _ = accelerator
    assert isinstance(pool, LocalPool)
    assert pool.num_workers == torch.cuda.device_count()
    assert {count for _, (_, count) in pool.map(device_of, range(8))} == {1}


def test_a_set_prepared_with_a_gpu_holds_the_maps_of_the_cpu(tmp_path):
    priors = (Edge(), *(prior for kind, prior in three_priors(tmp_path).items() if kind == "timm" or ON_CUDA))
    images = draw_images(tmp_path / "images")
    here, there = (pack_folder(images, tmp_path / name) for name in ("here", "there"))
    prepare_all(here, priors=priors)
    accelerator = make_accelerator(LauncherSettings(kind="local"), hangs=tmp_path / "hangs")
    prepare_all(there, priors=priors, pool=LocalPool(2), accelerator=accelerator)
    for mine, other in zip(all_maps(here), all_maps(there), strict=True):
        for name, map_HWC in mine.items():
            np.testing.assert_allclose(other[name], map_HWC, atol=0.1 if name == "learned-edges" else 0.02)


def all_maps(dataset: Dataset) -> list[dict[str, np.ndarray]]:
    """The maps of every training sample."""
    split, maps = dataset.split("train"), PriorSet.open(dataset.url, "default").split("train")
    return [maps.read(i, split.read(i)) for i in range(split.num_samples)]
