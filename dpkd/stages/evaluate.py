"""The evaluation: the same episodes and probes for teachers, students and baselines. Writes `evaluation.json`.

    {"protocol": {"way", "shots", …, "seed"}, "splits": {"val": name, "test": name}, "device": words,
     "teachers", "live_teachers", "students", "baselines": {name: network}}
     "labelled": {split: number of labelled images, or without labels of those with a mask}
    network: {"model", "image_size", "pooling", "parameters", "flops", "images_per_s",       the last two may be null
              "scores": {split: {"5way_1shot": {"mean", "ci95"}, "known_classes": {"mean", "ci95"}}},
              "plain_pooling": {split: …}            figure-ground networks, pooled without their prior map
              "seen": {split: [classes]}             only where `teachers.<name>.seen` has classes of the split
              "over_baseline": {split: …}            students: paired difference on the same episodes from
              "baseline": name                       the baseline that is best on the first split
              "probes": {split: {"knn", "linear"}}, "classification": {split: {"overall", "balanced", …}},
              "per_class": {split: {class: {"train", "samples", "accuracy", "ci95": [low, high], "mistaken_for",
                                            "examples": [keys of mistakes]}}},
              "confusion": {split: {"classes": [names], "counts": [[…]]}}     (label, prediction), the last: others
              "labels": {split: {label: {"samples", "trained", "precision": score, "auroc": score}}},
              "zero_shot": {split: {"overall", "balanced", "chance"}},      classes known only by their attributes
              "segmentation": {split: {class: {"iou", "dice", "hd95_px"}}}}     with masks; "scores" has
                                    "mean_dice", "boundary_iou", "boundary_f" and "mean_iou" besides
Where an image may have several labels, the keys of `scores` are "auroc", "average_precision_of_rare_labels" and
"mean_average_precision".

Unreadable samples are left out. Axes: N readable sample, D feature, E episode, K class, A attribute.
"""

import json
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from dpkd.data.images import decode_image
from dpkd.data.labels import Labels
from dpkd.data.shards import Split
from dpkd.engine.network import Frozen
from dpkd.errors import UserError
from dpkd.evaluation.few_shot import Episodes, draw_episodes, few_shot_accuracy
from dpkd.evaluation.long_tail import known_hits, zero_shot_accuracy
from dpkd.evaluation.seen import seen_among
from dpkd.evaluation.settings import EpisodeSettings
from dpkd.io import storage
from dpkd.io.record import parse_json, read_record
from dpkd.log import logger
from dpkd.models.counts import count_flops, count_parameters
from dpkd.models.network import Network
from dpkd.models.saved import load_network
from dpkd.models.settings import FigureGroundPooling, NetworkSpec
from dpkd.objectives.base import teacher_of
from dpkd.report.figures import KNOWN, Evaluation, column_words
from dpkd.report.quarantine import Quarantine
from dpkd.report.summary import EVALUATION_NAME, figure_or_none
from dpkd.report.tensorboard import Board
from dpkd.run.folder import RunFolder
from dpkd.settings import Settings, TeacherSettings
from dpkd.stages.check_data import attribute_table, trained_classes
from dpkd.stages.classify import PLAIN, Figures, Values, classify, compare, measure_several, predictions_of
from dpkd.stages.masks import EXAMPLES, masked_splits, measure_masks
from dpkd.stages.networks import Embedded, embed_networks, spread, teacher_network
from dpkd.stages.run import Run
from dpkd.train.task import Predictor

Specs = Mapping[str, NetworkSpec]
Outputs = Mapping[str, Embedded]
"""Outputs by network."""

ROLES = ("val", "test")
TIMING_BATCH = 64
TIMING_S = 0.8


def evaluate(run: Run) -> None:
    """Measures every network on the validation and the test split and writes `evaluation.json`.

    Every rank embeds its share; rank 0 measures and writes. A split without a label or mask is left out, and without
    any other there is no file. Raises `UserError` if a split is too small.
    """
    masked = masked_splits(run)
    measured = [name for name in run.data.evaluated_splits if name in {*run.measured_splits, *masked}]
    if unlabelled := [name for name in run.data.evaluated_splits if name not in measured]:
        if run.world.rank == 0:
            logger.info(f"evaluate: nothing is measured on {' and '.join(unlabelled)}, which has no label")
        if not measured:
            return
    settings, device, threads = run.settings.evaluate, run.world.device, torch.get_num_threads()
    on_cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    assert settings is not None, "the stage is left out without settings"
    networks = {place: network.to(device) for place, network in load_networks(run).items()}
    report: dict[str, Any] = {
        "protocol": _protocol(run, settings.episodes) | {"seed": run.seed},
        "splits": {role: getattr(run.data, role) if getattr(run.data, role) in measured else None for role in ROLES},
        "labelled": {},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "teachers": {},
        "students": {},
        "baselines": {},
    }
    tables: dict[str, dict[str, Any]] = {}
    for place, network in networks.items() if run.world.rank == 0 else ():
        kind, _, name = place.partition(".")
        tables[place] = report.setdefault(kind, {})[name] = {
            "model": network.spec.model.name,
            "image_size": network.spec.image_size,
            "pooling": network.spec.model.pooling.kind,
            "parameters": count_parameters(network),
            "flops": figure_or_none(f"FLOPs of {network.spec.model.name}", partial(count_flops, network.spec)),
            "images_per_s": figure_or_none(f"images/s of {place}", partial(images_per_s, network)),
        }
    chosen: dict[str, str] = {}
    for name in measured:
        split = run.dataset.split(name)
        masked_N = masked.get(name, np.empty(0, np.int64))
        report["labelled"][name] = int((split.label_N[run.readable(name)] >= 0).sum()) or len(masked_N)
        found = _measure(run, networks, split, episodes=settings.episodes, chosen=chosen, masked_N=masked_N)
        for kind, figures in found.items():
            for place, figure in figures.items():
                tables[place].setdefault(kind, {})[name] = figure
    if run.world.rank == 0:
        for place, table in tables.items():
            if classes := _seen(run, place):
                table["seen"] = classes
        for student, baseline in chosen.items():
            tables[student]["baseline"] = baseline.removeprefix("baselines.")
        run.folder.check_fence()
        _show(run, report)
        data = (json.dumps(report, indent=1) + "\n").encode()
        storage.write_bytes_atomic(run.folder.path / EVALUATION_NAME, data)
    run.world.barrier()


def _protocol(run: Run, episodes: EpisodeSettings | None) -> dict[str, Any]:
    """How networks are measured: the episodes, the number of labels that an image may have, or by known classes."""
    if run.dataset.split(run.data.train).info.multi_label:
        return {"labels": len(trained_classes(run.dataset, run.data))}
    return {} if episodes is None or not run.measured_splits else episodes.model_dump(mode="json")


def _show(run: Run, report: dict[str, Any]) -> None:
    """Writes the figures and the settings of the run to TensorBoard."""
    board = Board(run.folder.tensorboard / "evaluate", start_step=-1)
    board.show(0, "summary", Evaluation(report).markdown())
    tree = run.settings.model_dump(mode="json")
    board.show(0, "settings", f"```yaml\n{yaml.safe_dump(tree, sort_keys=False)}```")
    exported = {
        f"exported/{name} {split} {column_words(key)}": score["mean"]
        for name, student in report["students"].items()
        for split, scores in student.get("plain_pooling", student["scores"]).items()
        for key, score in scores.items()
    }
    board.hparams(run.settings.model_dump(mode="json", exclude_defaults=True, exclude={"launcher"}), exported)
    for path in sorted(run.folder.path.glob(f"{EXAMPLES}*.png")):
        board.show(0, path.stem, decode_image(path.read_bytes()))
    board.quarantine(0, Quarantine(run.folder.quarantine, limit=1.0))
    board.close()


def load_networks(run: Run) -> dict[str, Network]:
    """Every network of a run by its key in the report: `teachers.<name>`, `students.<name>`, …"""
    folder = run.folder
    networks = {f"teachers.{name}": teacher_network(run, name) for name in run.settings.teachers}
    kinds = {"live_teachers": folder.live_teachers, "students": folder.students, "baselines": folder.baselines}
    for kind, parent in kinds.items():
        paths = [path for path in sorted(parent.glob("[!.]*")) if path.is_dir()]
        networks |= {f"{kind}.{path.name}": load_network(path) for path in paths}
    return networks


class PlainlyPooled(Frozen):
    """A figure-ground network as it is exported: a blank map weighs all patches equally."""

    def predict(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Runs the network with a blank map instead of the given one."""
        image_BCHW, weight_B1HW = inputs
        return super().predict(image_BCHW, torch.zeros_like(weight_B1HW))


def seen_by(settings: Settings) -> dict[str, frozenset[str]]:
    """`teachers.<name>.seen` by `teachers.<name>` and, with those of its teachers, `students.<name>`."""
    seen: dict[str, frozenset[str]] = {}
    for key, network in settings.networks.items():
        own = network.seen if isinstance(network, TeacherSettings) else ()
        learns = (objective for objective in network.objectives if objective.needs().teacher)
        followed = {teacher_of(objective) or next(iter(settings.teachers)) for objective in learns}
        seen[key.removeprefix("distill.")] = frozenset(own).union(*(seen[f"teachers.{name}"] for name in followed))
    return seen


def _seen(run: Run, place: str) -> dict[str, list[str]]:
    """By split, the classes that public weights behind a network were trained on."""
    seen = seen_by(run.settings).get(place.removeprefix("live_"), frozenset())
    names, found = run.dataset.manifest.classes, {}
    for split in run.data.evaluated_splits:
        classes = [name for name, count in zip(names, run.dataset.split(split).info.class_counts, strict=True) if count]
        if seen and (both := seen_among(classes, seen)):
            found[split] = both
    return found


def _measure(
    run: Run,
    networks: Mapping[str, Network],
    split: Split,
    *,
    episodes: EpisodeSettings | None,
    chosen: dict[str, str],
    masked_N: NDArray[np.int64],
) -> dict[str, Figures]:
    """One split's figures by kind on rank 0, in the order of the report; empty on the other ranks, which embed.

    The samples `masked_N` have masks. `chosen` gets each student's baseline: the best one on the first split.
    """
    indices = run.readable(split.name)
    label_N = split.label_N[indices].astype(np.int64)
    predictors: dict[str, Predictor] = {}
    for name, network in networks.items():
        predictors[name] = Frozen(network.spec, network)
        if isinstance(network.spec.model.pooling, FigureGroundPooling):
            predictors[name + PLAIN] = PlainlyPooled(network.spec, network)
    labelled = split.name in run.measured_splits
    embedded = embed_networks(run, predictors, split, indices=indices, shown=True) if labelled else {}
    several = labelled and split.info.multi_label
    mask_values, mask_figures = measure_masks(run, networks, split, indices=masked_N) if len(masked_N) else ({}, {})
    if not labelled or several:
        episodes = None
    means: dict[str, NDArray[np.float32]] = {}
    if episodes is not None and episodes.transform == "centred_l2":
        train = run.dataset.split(run.data.train)
        few_trained = embed_networks(run, predictors, train, indices=spread(run.readable(train.name)), shown=True)
        means = {name: outputs["embedding"].mean(0) for name, outputs in few_trained.items()}
    if run.world.rank != 0:
        return {}
    if several:
        label_values, tables = measure_several(run, split, embedded)
        return compare(run, networks, label_values, chosen=chosen) | {"labels": tables}
    values: dict[str, Values] = {name: {} for name in predictors}
    if episodes is not None:
        drawn = _draw(run, episodes, label_N, split=split.name)
        for name, outputs in embedded.items():
            mean_D = means.get(name)
            values[name] = few_shot_accuracy(outputs["embedding"], drawn, settings=episodes, base_mean_D=mean_D)
    specs = {name: network.spec for name, network in networks.items()} if labelled else {}
    predictions = predictions_of(run, specs, embedded, label_N)
    for name, prediction_N in predictions.items():
        values[name][KNOWN] = known_hits(prediction_N, label_N)
    for name in values:
        values[name] |= mask_values.get(name.removesuffix(PLAIN), {})
    return {
        **compare(run, networks, values, chosen=chosen),
        "probes": _probe(run, embedded, label_N, split=split.name),
        **classify(run, split, embedded, predictions, label_N),
        "zero_shot": zero_shot(run, specs, embedded, label_N, split=split.name),
        "segmentation": mask_figures,
    }


def _draw(run: Run, settings: EpisodeSettings, label_N: Labels, *, split: str) -> Episodes:
    """The episodes of a split; the log names the classes that are too small for one."""
    episodes = draw_episodes(label_N, settings, seed=run.seed, split=split)
    if episodes.left_out:
        names = ", ".join(run.dataset.manifest.classes[label] for label in episodes.left_out)
        few = f"{len(episodes.left_out)} classes have too few samples for an episode"
        logger.info(f"evaluate {split}: {few}: {names}")
    return episodes


def _probe(run: Run, embedded: Outputs, label_N: Labels, *, split: str) -> Figures:
    """KNN and linear probe of each network; empty without settings, or if the split is too small."""
    # imports scikit-learn, which loads slowly: a restart of the workers must not wait for it
    from dpkd.evaluation.probes import probe, probe_split  # noqa: PLC0415

    settings = run.settings.evaluate.probes if run.settings.evaluate is not None and embedded else None
    halves = probe_split(label_N, settings, seed=run.seed) if settings is not None else None
    figures = {}
    if settings is not None and halves is not None:
        for name, outputs in embedded.items():
            measure = partial(probe, outputs["embedding"], label_N, split=halves, settings=settings)
            if not name.endswith(PLAIN) and (scores := figure_or_none(f"probes of {name} on {split}", measure)):
                figures[name] = scores
    return figures


def zero_shot(run: Run, specs: Specs, embedded: Outputs, label_N: Labels, *, split: str) -> Figures:
    """Accuracy of each network on the split's classes that the table describes and training did not see.

    `embedded` holds logits `attributes` NA by network. A network without attributes has no figure; with fewer than two
    such classes no network has one. Raises `UserError` if a network was trained on other attributes than those of the
    table.
    """
    table, learned = attribute_table(run.data), {name: spec for name, spec in specs.items() if spec.attributes}
    if table is None or not learned:
        return {}
    names, trained, known = run.dataset.manifest.classes, trained_classes(run.dataset, run.data), table.known()
    unseen = [label for label in np.unique(label_N[label_N >= 0]).tolist() if names[label] not in trained]
    class_K = np.array([label for label in unseen if known.get(names[label])])
    if len(class_K) < len(unseen):
        left_out = ", ".join(names[label] for label in unseen if label not in class_K)
        logger.info(f"evaluate {split}: data.attributes does not describe {left_out}: left out of zero-shot accuracy")
    if len(class_K) < 2:
        return {}
    value_KA = table.rows([names[label] for label in class_K])
    figures = {}
    for name, spec in learned.items():
        if spec.attributes != table.names:
            raise UserError(
                f"{name} was trained on the attributes {', '.join(spec.attributes)}, and data.attributes {table.path} "
                f"has {', '.join(table.names)}: restore the earlier table, or train again in another run.dir"
            )
        # an attribute without a value for any trained class was never learned
        was_learned_A = ~np.isnan(table.rows(spec.classes)).all(0)
        value_of_learned_KA = np.where(was_learned_A, value_KA, np.float32(np.nan))
        logit_NA = embedded[name]["attributes"]
        figures[name] = zero_shot_accuracy(logit_NA, label_N, class_K=class_K, value_KA=value_of_learned_KA)
    return figures


@torch.inference_mode()
def images_per_s(network: Network) -> float:
    """Images per second of the network in evaluation mode on its device, in batches of 64, without decoding."""
    device, size = next(network.parameters()).device, network.spec.image_size
    image_BCHW = torch.randn(TIMING_BATCH, 3, size, size, device=device)
    weight_B1HW = torch.rand(TIMING_BATCH, 1, size // 4, size // 4, device=device)

    def run_batch() -> None:
        network(image_BCHW, weight_B1HW)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):  # the first calls choose kernels and allocate
        run_batch()
    began, batches = time.perf_counter(), 0
    while time.perf_counter() - began < TIMING_S:
        run_batch()
        batches += 1
    return round(batches * TIMING_BATCH / (time.perf_counter() - began), 1)


def read_evaluation(folder: RunFolder) -> dict[str, Any]:
    """The report of `evaluate`; raises `UserError` if that stage has not run."""
    path = folder.path / EVALUATION_NAME
    report = read_record(path, way_out="run the stage evaluate again", parse=parse_json)
    if not report:
        raise UserError(f"{path} is missing: run the stage evaluate first")
    return report
