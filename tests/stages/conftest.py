"""A run whose networks stand on disk, with first weights instead of trained ones."""

from pathlib import Path

import pytest
import torch

from dpkd.backends.local_pool import LocalPool
from dpkd.engine.world import World
from dpkd.models.network import build_network
from dpkd.models.saved import save_network
from dpkd.models.settings import FigureGroundPooling, ModelSettings, NetworkSpec
from dpkd.report.quarantine import Quarantine
from dpkd.run.folder import RunFolder
from dpkd.stages.evaluate import evaluate
from dpkd.stages.pack import pack
from dpkd.stages.prepare import prepare
from dpkd.stages.run import Run
from tests.heads import heads
from tests.runs import settings_of

CONVOLUTIONAL = ModelSettings(name="resnet10t", arguments={"stem_width": 8, "channels": [16, 16, 32, 32]})
TRANSFORMER = ModelSettings(
    name="vit_tiny_patch16_224",
    arguments={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    pooling=FigureGroundPooling(),
)
SEEN = ["Blue_checked_square", "ship"]
"""Classes that the first weights of the teacher were trained on, one of them in the test split."""


@pytest.fixture(scope="session")
def untrained_run(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A packed and prepared run with a teacher, the students `conv` and `vit`, and two baselines of `conv`."""
    place = tmp_path_factory.mktemp("runs") / "untrained"
    small = {"name": "test_resnet"}
    settings = settings_of(
        {
            "run": {"dir": str(place), "seed": 7},
            "data": {
                "source": str(sample_folder),
                "image_size": 32,
                "train": "base",
                "val": "val",
                "test": "novel",
                "loader": {"workers": 0},
            },
            "prepare": {"priors": [{"kind": "saliency"}]},
            "teachers": {"teacher": {"model": small, "objectives": [{"kind": "supervised"}], "seen": SEEN}},
            "distill": {"students": {"conv": {"model": small, "baseline": [0.5, 1]}, "vit": {"model": small}}},
            "evaluate": {
                "episodes": {"way": 4, "shots": [1, 5], "queries": 8, "episodes": 100},
                "probes": {"neighbours": 5},
            },
        }
    )
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    run = Run(folder=RunFolder(place), world=world, settings=settings)
    run.folder.path.mkdir()
    pool, quarantine = LocalPool(1), Quarantine(run.folder.quarantine, limit=0.0)
    url = str(run.folder.path / "shards")
    dataset = pack(run.data, url, seed=7, pool=pool, quarantine=quarantine, progress=lambda *_: None)
    prepare(dataset, settings.prepare, pool=pool, quarantine=quarantine, progress=lambda *_: None)
    places = {
        run.folder.teacher("teacher"): TRANSFORMER,
        run.folder.students / "conv": CONVOLUTIONAL,
        run.folder.students / "vit": TRANSFORMER,
        run.folder.baselines / "conv": CONVOLUTIONAL,
        run.folder.baselines / "conv.x0.5": CONVOLUTIONAL,
    }
    for seed, (place, model) in enumerate(places.items()):
        spec = NetworkSpec(
            model=model,
            classes=tuple(dataset.manifest.classes[label] for label in sorted({*dataset.split("base").label_N} - {-1})),
            image_size=run.data.image_size,
            mean=dataset.manifest.image_mean,
            std=dataset.manifest.image_std,
            heads=heads({"saliency": 1}, teacher_dim=24 if "teachers" not in place.parts else None),
        )
        save_network(place, spec, build_network(spec, seed=seed).state_dict())
    return run


@pytest.fixture(scope="session")
def evaluated_run(untrained_run: Run) -> Run:
    """The same run after its evaluation."""
    evaluate(untrained_run)
    return untrained_run
