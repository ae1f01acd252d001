"""A run whose networks stand on disk, with first weights instead of trained ones."""

from pathlib import Path

import pytest
import torch

from dpkd.backends.engines import make_engine
from dpkd.data.settings import FolderSource, LoaderSettings
from dpkd.engine.world import World
from dpkd.evaluation.settings import EpisodeSettings, ProbeSettings
from dpkd.launch.pool import LocalPool
from dpkd.models.network import build_network
from dpkd.models.saved import save_network
from dpkd.models.settings import FigureGroundPooling, ModelSettings, NetworkSpec
from dpkd.priors import Saliency
from dpkd.report.quarantine import Quarantine
from dpkd.run.folder import RunFolder
from dpkd.settings import DataSettings, EvaluateSettings, PrepareSettings
from dpkd.stages.evaluate import evaluate
from dpkd.stages.pack import pack
from dpkd.stages.prepare import prepare
from dpkd.stages.run import Run

CONVOLUTIONAL = ModelSettings(name="resnet10t", arguments={"stem_width": 8, "channels": [16, 16, 32, 32]})
TRANSFORMER = ModelSettings(
    name="vit_tiny_patch16_224",
    arguments={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    pooling=FigureGroundPooling(),
)


@pytest.fixture(scope="session")
def untrained_run(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A packed and prepared run with a teacher, the students `conv` and `vit`, and a baseline of `conv`."""
    run = Run(
        folder=RunFolder(tmp_path_factory.mktemp("runs") / "untrained"),
        world=World(rank=0, size=1, local_rank=0, device=torch.device("cpu")),
        seed=7,
        data=DataSettings(
            source=FolderSource(path=str(sample_folder)),
            image_size=32,
            train="base",
            val="val",
            test="novel",
            loader=LoaderSettings(workers=0),
        ),
        prepare=PrepareSettings(priors=(Saliency(),)),
        evaluate=EvaluateSettings(
            episodes=EpisodeSettings(way=4, shots=(1, 5), queries=8, episodes=100), probes=ProbeSettings(neighbours=5)
        ),
        make_engine=make_engine,
    )
    run.folder.path.mkdir()
    pool, quarantine = LocalPool(1), Quarantine(run.folder.quarantine, limit=0.0)
    url = str(run.folder.path / "shards")
    dataset = pack(run.data, url, seed=7, pool=pool, quarantine=quarantine, progress=lambda *_: None)
    prepare(dataset, run.prepare, pool=pool, quarantine=quarantine, progress=lambda *_: None)
    places = {
        run.folder.teacher: TRANSFORMER,
        run.folder.students / "conv": CONVOLUTIONAL,
        run.folder.students / "vit": TRANSFORMER,
        run.folder.baselines / "conv": CONVOLUTIONAL,
    }
    for seed, (place, model) in enumerate(places.items()):
        spec = NetworkSpec(
            model=model,
            classes=tuple(dataset.manifest.classes[label] for label in sorted({*dataset.split("base").label_N} - {-1})),
            image_size=run.data.image_size,
            mean=dataset.manifest.image_mean,
            std=dataset.manifest.image_std,
            targets={"saliency": 1},
            teacher_dim=24 if "teacher" not in str(place) else None,
        )
        save_network(place, spec, build_network(spec, seed=seed).state_dict())
    return run


@pytest.fixture(scope="session")
def evaluated_run(untrained_run: Run) -> Run:
    """The same run after its evaluation."""
    evaluate(untrained_run)
    return untrained_run
