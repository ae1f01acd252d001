"""The evaluation: the same episodes and probes for teacher, students and baselines. Makes `evaluation.json`.

    {"protocol": {"way", "shots", …, "seed"}, "splits": {"val": name, "test": name}, "device": words,
     "teachers", "live_teachers", "students", "baselines": {name: network}}
    network: {"model", "image_size", "pooling", "parameters", "flops", "images_per_s",
              "few_shot": {split: {"5way_1shot": {"mean", "ci95"}}},     flops and images_per_s may be null
              "plain_pooling": {split: …}            figure-ground networks, pooled without their prior map
              "over_baseline": {split: …}            students: paired difference on the same episodes
              "probes": {split: {"knn", "linear"}}, "classification": {split: {"overall", "balanced", …}},
              "zero_shot": {split: {"overall", "balanced", "chance"}}}      classes known by their attributes alone

Samples that cannot be read take no part. Axes: N sample that can be read, D feature, E episode, K class.
"""

import json
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpkd.data.labels import visible_labels
from dpkd.data.shards import Split
from dpkd.engine.frozen import Frozen
from dpkd.errors import UserError
from dpkd.evaluation.few_shot import draw_episodes, few_shot_accuracy, paired_difference, score
from dpkd.evaluation.long_tail import long_tail
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.untrusted import parse_json
from dpkd.log import Progress, logger
from dpkd.models.counts import count_flops, count_parameters
from dpkd.models.network import Network
from dpkd.models.saved import load_network
from dpkd.models.settings import FigureGroundPooling
from dpkd.report.quarantine import Quarantine
from dpkd.report.summary import EVALUATION_NAME, figure_or_none, figures_markdown
from dpkd.report.tensorboard import Board
from dpkd.run.folder import RunFolder
from dpkd.settings import EvaluateSettings
from dpkd.stages.embed import Embedded, embed_networks, spread
from dpkd.stages.run import Run
from dpkd.stages.training import teacher_network
from dpkd.stages.zero_shot import zero_shot
from dpkd.train.task import Predictor

Scores = dict[str, dict[str, float]]
Accuracies = dict[str, NDArray[np.float64]]

PLAIN = " without its prior map"
"""Marks the second look at a figure-ground network, pooled as the exported timm model pools."""
TIMING_BATCH = 64
TIMING_S = 0.8


def evaluate(run: Run) -> None:
    """Measures every network on the validation and the test split and writes `evaluation.json`.

    Every rank embeds its share; rank 0 measures speed and writes. Raises `UserError` where a split is too small.
    """
    networks = {name: network.to(run.world.device) for name, network in load_networks(run).items()}
    tables: dict[str, dict[str, Any]] = {name: describe(network) for name, network in networks.items()}
    if run.world.rank == 0:
        for name, network in networks.items():
            rate = figure_or_none(f"images/s of {name}", partial(images_per_s, network))
            tables[name]["images_per_s"] = None if rate is None else round(rate, 1)
    for split in run.data.evaluated_splits:
        _measure(run, networks, split=run.dataset.split(split), tables=tables)
    if run.world.rank == 0:
        report = {
            "protocol": {**_settings(run).episodes.model_dump(mode="json"), "seed": run.seed},
            "splits": {"val": run.data.val, "test": run.data.test},
            "device": device_words(run.world.device),
            **nested(tables),
        }
        run.folder.check_fence()
        board = Board(run.folder.tensorboard / "evaluate", start_step=-1)
        board.show(0, "summary", figures_markdown(report))
        board.quarantine(0, Quarantine(run.folder.quarantine, limit=1.0))
        board.close()
        data = (json.dumps(report, indent=1) + "\n").encode()
        storage.write_bytes_atomic(str(run.folder.path / EVALUATION_NAME), data)
    run.world.barrier()


def _settings(run: Run) -> EvaluateSettings:
    assert run.settings.evaluate is not None, "the stage is left out without settings"
    return run.settings.evaluate


def refuse_small_splits(run: Run) -> None:
    """Raises `UserError` where the episodes cannot be drawn from a split; to be called before any training."""
    if run.settings.evaluate is None:
        return
    for name in run.data.evaluated_splits:
        few = run.settings.evaluate.episodes.model_copy(update={"episodes": 2})
        draw_episodes(run.dataset.split(name).label_N[run.readable(name)], few, seed=0, split=name)


def load_networks(run: Run) -> dict[str, Network]:
    """Every network of a run by its place in the report: `teachers.<name>`, `students.<name>`, …"""
    networks = {f"teachers.{name}": teacher_network(run, name) for name in run.settings.teachers}
    kinds = {
        "live_teachers": run.folder.live_teachers,
        "students": run.folder.students,
        "baselines": run.folder.baselines,
    }
    for kind, parent in kinds.items():
        paths = [path for path in sorted(parent.glob("[!.]*")) if path.is_dir()]
        networks |= {f"{kind}.{path.name}": load_network(path)[1] for path in paths}
    return networks


def describe(network: Network) -> dict[str, Any]:
    """What a report states of a network before measuring it."""
    return {
        "model": network.spec.model.name,
        "image_size": network.spec.image_size,
        "pooling": network.spec.model.pooling.kind,
        "parameters": count_parameters(network),
        "flops": figure_or_none(f"FLOPs of {network.spec.model.name}", partial(count_flops, network)),
    }


def nested(tables: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """`{"students.small": table}` as `{"students": {"small": table}}`; all kinds but live teachers are always there."""
    tree: dict[str, Any] = {"teachers": {}, "students": {}, "baselines": {}}
    for place, table in tables.items():
        kind, _, name = place.partition(".")
        tree.setdefault(kind, {})[name] = table
    return tree


def _measure(run: Run, networks: Mapping[str, Network], *, split: Split, tables: dict[str, dict[str, Any]]) -> None:
    """Adds one split's figures to the tables of all networks."""
    settings, indices = _settings(run), run.readable(split.name)
    label_N = split.label_N[indices]
    episodes = draw_episodes(label_N, settings.episodes, seed=run.seed, split=split.name)
    if episodes.left_out and run.world.rank == 0:
        names = ", ".join(run.dataset.manifest.classes[label] for label in episodes.left_out)
        few = f"{len(episodes.left_out)} classes have too few samples for an episode"
        logger.info(f"evaluate {split.name}: {few}: {names}")
    predictors: dict[str, Predictor] = {}
    for name, network in networks.items():
        predictors[name] = Frozen(network.spec, network)
        if isinstance(network.spec.model.pooling, FigureGroundPooling):
            predictors[name + PLAIN] = PlainlyPooled(network.spec, network)
    embedded = _embed(run, predictors, split, indices=indices)
    centre = settings.episodes.transform == "centred_l2"
    train = run.dataset.split(run.data.train)
    means = _embed(run, predictors, train, indices=spread(run.readable(train.name))) if centre else {}
    accuracies: dict[str, Accuracies] = {}
    for name, found in embedded.items():
        base_mean_D = means[name].embedding_ND.mean(0) if centre else None
        accuracies[name] = few_shot_accuracy(
            found.embedding_ND, episodes, settings=settings.episodes, base_mean_D=base_mean_D
        )
    for name, table in tables.items():
        table.setdefault("few_shot", {})[split.name] = _scores(accuracies[name])
        if name + PLAIN in accuracies:
            table.setdefault("plain_pooling", {})[split.name] = _scores(accuracies[name + PLAIN])
        baseline = name.replace("students.", "baselines.")
        if baseline != name and baseline in accuracies:
            table.setdefault("over_baseline", {})[split.name] = {
                key: paired_difference(accuracy_E, accuracies[baseline][key]).table()
                for key, accuracy_E in accuracies[name].items()
            }
    _probe(run, embedded, label_N, split=split.name, tables=tables)
    _classify(run, networks, embedded, label_N, split=split.name, tables=tables)
    specs = {name: network.spec for name, network in networks.items()}
    zero_shot(run, specs, embedded, label_N, split=split.name, tables=tables)


def _probe(
    run: Run,
    embedded: Mapping[str, Embedded],
    label_N: NDArray[np.int64],
    *,
    split: str,
    tables: dict[str, dict[str, Any]],
) -> None:
    """Adds kNN and linear probe, where the settings ask for them and the split is large enough."""
    # brings in scikit-learn, which is slow to load: a restart of the workers must not wait for it
    from dpkd.evaluation.probes import probe, probe_split  # noqa: PLC0415

    settings = _settings(run).probes
    halves = probe_split(label_N, settings, seed=run.seed) if settings else None
    if settings is None or halves is None or run.world.rank != 0:
        return
    for name, table in tables.items():
        embedding_ND = embedded[name].embedding_ND
        measure = partial(probe, embedding_ND, label_N, split=halves, settings=settings)
        scores = figure_or_none(f"probes of {name} on {split}", measure)
        if scores is not None:
            table.setdefault("probes", {})[split] = scores


def _scores(accuracy: Accuracies) -> Scores:
    return {key: score(accuracy_E).table() for key, accuracy_E in accuracy.items()}


class PlainlyPooled(Frozen):
    """A figure-ground network as it is exported: a blank map weighs all patches alike."""

    def predict(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Runs the network with a blank map in the place of the given one."""
        image_BCHW, weight_B1HW = inputs
        return super().predict(image_BCHW, torch.zeros_like(weight_B1HW))


def _embed(
    run: Run, predictors: Mapping[str, Predictor], split: Split, *, indices: NDArray[np.int64]
) -> dict[str, Embedded]:
    with Progress(f"evaluate on {split.name}", len(indices), shown=run.world.rank == 0) as progress:
        return embed_networks(
            predictors,
            split,
            maps=run.maps_of(split.name, run.priors.channels if run.priors is not None else ()),
            map_size=run.map_size,
            world=run.world,
            loader=run.data.loader,
            indices=indices,
            advance=progress.advance,
        )


def _classify(
    run: Run,
    networks: Mapping[str, Network],
    embedded: Mapping[str, Embedded],
    label_N: NDArray[np.int64],
    *,
    split: str,
    tables: dict[str, dict[str, Any]],
) -> None:
    """Adds the accuracy of the networks' own logits, where they know all classes of the split."""
    names = run.dataset.manifest.classes
    present = {names[label] for label in np.unique(label_N[label_N >= 0])}
    train = run.dataset.split(run.data.train)
    lost = run.unreadable(train.name)
    seen_label_N = visible_labels(train.label_N, run.data.labels, keys=train.keys, seed=run.seed, unreadable=lost)
    train_count_K = np.bincount(seen_label_N[seen_label_N >= 0], minlength=len(names))
    for name, network in networks.items():
        logits_NK = embedded[name].logits_NK
        if logits_NK is None or not present <= set(network.spec.classes):
            continue
        own = np.array([names.index(each) for each in network.spec.classes])
        table = long_tail(own[logits_NK.argmax(1)], label_N, train_count_K=train_count_K)
        tables[name].setdefault("classification", {})[split] = table


@torch.inference_mode()
def images_per_s(network: Network) -> float:
    """Images a second through the network in evaluation mode on its device, in batches of 64, decoding not counted."""
    device = next(network.parameters()).device
    size = network.spec.image_size
    image_BCHW = torch.randn(TIMING_BATCH, 3, size, size, device=device)
    weight_B1HW = torch.rand(TIMING_BATCH, 1, size // 4, size // 4, device=device)
    for _ in range(2):  # the first calls choose kernels and allocate
        network(image_BCHW, weight_B1HW)
    _wait(device)
    began, batches = time.perf_counter(), 0
    while time.perf_counter() - began < TIMING_S:
        network(image_BCHW, weight_B1HW)
        _wait(device)
        batches += 1
    return batches * TIMING_BATCH / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_words(device: torch.device) -> str:
    """The device that speeds were measured on, for a reader."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def read_evaluation(folder: RunFolder) -> dict[str, Any]:
    """What `evaluate` wrote; raises `UserError` where it has not run."""
    path = folder.path / EVALUATION_NAME
    try:
        report: dict[str, Any] = parse_json(storage.read_bytes(path))
    except NO_FILE as error:
        raise UserError(f"{path} is missing: run the stage evaluate first") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); run the stage evaluate again") from error
    return report
