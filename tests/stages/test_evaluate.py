"""The evaluation of a run against the slow way: one image at a time, one episode at a time."""

import dataclasses
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize

from dpkd.data.augment import apply_image, apply_map, centre_view
from dpkd.data.images import decode_image
from dpkd.engine.network import Frozen
from dpkd.engine.settings import TrainingSettings
from dpkd.errors import UserError
from dpkd.evaluation.few_shot import draw_episodes, score
from dpkd.models.counts import count_parameters
from dpkd.models.saved import load_network
from dpkd.stages.check_data import SplitCounts, check_splits, measured_splits
from dpkd.stages.evaluate import evaluate, load_networks, read_evaluation
from dpkd.stages.networks import embed_networks
from dpkd.stages.run import Run
from tests.runs import with_data


def embed_slowly(run: Run, student: str, split_name: str) -> NDArray[np.float32]:
    """Image by image, straight from shards and prior shards, normalised by hand."""
    network = load_network(run.folder.students / student)
    spec = network.spec
    split, maps = run.dataset.split(split_name), run.maps_of(split_name, ["saliency"])
    assert maps is not None
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    rows = []
    for i in range(split.num_samples):
        sample = split.read(i)
        image_HWC = decode_image(sample.image)
        view = centre_view(image_HWC.shape[:2])
        seen_HWC = apply_image(view, image_HWC, size=spec.image_size).astype(np.float32) / 255
        saliency_HWC = maps.read(i, sample)["saliency"]
        weight_HW1 = apply_map(view, saliency_HWC, size=run.map_size, nearest=False, flip=lambda each: each)
        with torch.no_grad():
            outputs = network(
                torch.from_numpy((seen_HWC - mean) / std).permute(2, 0, 1)[None],
                torch.from_numpy(weight_HW1).permute(2, 0, 1)[None],
            )
        rows.append(outputs["embedding"][0].numpy())
    return np.stack(rows)


@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_")  # scikit-learn's, where support samples agree
@pytest.mark.parametrize("student", ["conv", "vit"])
def test_few_shot_figures_are_those_of_the_slow_way(evaluated_run: Run, student: str) -> None:
    assert evaluated_run.settings.evaluate is not None
    settings = evaluated_run.settings.evaluate.episodes
    split = evaluated_run.dataset.split("novel")
    embedding_ND = embed_slowly(evaluated_run, student, "novel")
    x_ND = normalize(np.sign(embedding_ND) * np.sqrt(np.abs(embedding_ND)))
    episodes = draw_episodes(split.label_N, settings, seed=evaluated_run.seed)
    accuracy = []
    for support_WK, query_WQ in zip(episodes.support_EWK, episodes.query_EWQ, strict=True):
        model = NearestCentroid().fit(x_ND[support_WK.ravel()], split.label_N[support_WK.ravel()])
        accuracy.append(model.score(x_ND[query_WQ.ravel()], split.label_N[query_WQ.ravel()]))
    reported = read_evaluation(evaluated_run.folder)["students"][student]["scores"]["novel"]["4way_5shot"]
    expected = score(np.array(accuracy))
    # batches of another size round differently, which may turn a query that lies between two classes
    assert reported == pytest.approx(expected, abs=2e-3)
    assert reported["mean"] > 0.27  # above chance, also with first weights


def test_every_network_has_its_figures_on_both_splits(evaluated_run: Run) -> None:
    report = read_evaluation(evaluated_run.folder)
    assert set(report["students"]) == {"conv", "vit"}
    assert set(report["baselines"]) == {"conv", "conv.x0.5"}
    for table in [*report["teachers"].values(), *report["students"].values(), *report["baselines"].values()]:
        assert table["images_per_s"] > 0
        assert set(table["scores"]) == {"val", "novel"}
        for scores in table["scores"].values():
            assert set(scores) == {"4way_1shot", "4way_5shot"}
            assert all(0 < each["mean"] < 1 and 0 < each["ci95"] < 0.1 for each in scores.values())
        assert set(table["probes"]["novel"]) == {"knn", "linear"}
        assert "classification" not in table  # no network knows the classes of val and novel
    learned_from_it = [report["teachers"]["teacher"], *report["students"].values()]
    assert [table.get("seen") for table in learned_from_it] == [{"novel": ["blue-checked-square"]}] * 3
    assert not any("seen" in table for table in report["baselines"].values())
    networks = load_networks(evaluated_run)
    assert report["students"]["vit"]["parameters"] == count_parameters(networks["students.vit"])


def test_a_student_is_compared_on_the_same_episodes_with_the_baseline_that_is_best_on_val(evaluated_run: Run) -> None:
    report = read_evaluation(evaluated_run.folder)
    student, tried = report["students"]["conv"], report["baselines"]
    best = max(tried, key=lambda name: tried[name]["scores"]["val"]["4way_5shot"]["mean"])
    assert student["baseline"] == best
    for split in ("val", "novel"):
        means = [table["scores"][split]["4way_5shot"]["mean"] for table in (student, tried[best])]
        assert student["over_baseline"][split]["4way_5shot"]["mean"] == pytest.approx(means[0] - means[1])
    assert "over_baseline" not in report["students"]["vit"]


def test_a_figure_ground_network_is_also_measured_as_it_leaves(evaluated_run: Run) -> None:
    report = read_evaluation(evaluated_run.folder)
    vit = report["students"]["vit"]
    assert vit["plain_pooling"]["novel"]["4way_5shot"] != vit["scores"]["novel"]["4way_5shot"]
    assert "plain_pooling" not in report["students"]["conv"]


def test_evaluating_again_gives_the_same_figures(evaluated_run: Run) -> None:
    first = _without_speed(read_evaluation(evaluated_run.folder))
    evaluate(evaluated_run)
    assert _without_speed(read_evaluation(evaluated_run.folder)) == first


def _without_speed(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_speed(value) for key, value in tree.items() if key != "images_per_s"}
    return tree


def test_networks_that_know_the_classes_are_measured_by_their_own_logits(evaluated_run: Run, tmp_path: Any) -> None:
    run = with_episodes(with_data(evaluated_run, test="base"), shots=(1,), queries=4, transform="centred_l2")
    before = (run.folder.path / "evaluation.json").read_bytes()
    evaluate(run)
    table = read_evaluation(run.folder)["students"]["conv"]
    (run.folder.path / "evaluation.json").write_bytes(before)
    assert "probes" not in table
    network = load_network(run.folder.students / "conv")
    spec = network.spec
    split = run.dataset.split("base")
    right = [
        (run.dataset.manifest.classes[label] == spec.classes[logits_K.argmax()])
        for label, logits_K in zip(split.label_N, _logits(run, network), strict=True)
        if label >= 0
    ]
    assert table["classification"]["base"]["overall"] == pytest.approx(np.mean(right), abs=0.01)
    assert set(table["classification"]["base"]) >= {"overall", "balanced", "worst_class"}
    by_class, names = table["per_class"]["base"], run.dataset.manifest.classes
    true = [names[label] for label in split.label_N if label >= 0]
    assert {name: row["samples"] for name, row in by_class.items()} == Counter(true)
    hits = Counter(name for name, hit in zip(true, right, strict=True) if hit)
    for name, row in by_class.items():
        assert row["accuracy"] == pytest.approx(hits[name] / row["samples"], abs=0.1)
        assert (row["mistaken_for"] is None) == (row["accuracy"] == 1)
        assert row["mistaken_for"] != name
    assert min(row["accuracy"] for row in by_class.values()) == table["classification"]["base"]["worst_class"]


def with_episodes(run: Run, **changes: Any) -> Run:
    """The run with other episodes, and no probes."""
    assert run.settings.evaluate is not None
    episodes = run.settings.evaluate.episodes.model_copy(update=changes)
    evaluated = run.settings.evaluate.model_copy(update={"episodes": episodes, "probes": None})
    return dataclasses.replace(run, settings=run.settings.model_copy(update={"evaluate": evaluated}))


def _logits(run: Run, network: Any) -> list[NDArray[np.float32]]:
    logits: list[NDArray[np.float32]] = []

    class Kept(Frozen):
        def predict(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            outputs = super().predict(*inputs)
            logits.extend(outputs["logits"].numpy())
            return outputs

    split = run.dataset.split("base")
    kept = {"network": Kept(network.spec, network)}
    embed_networks(run, kept, split, indices=np.arange(split.num_samples), batch_size=5)
    return logits


FEW = TrainingSettings(steps=1, batch_size=8)


def test_a_split_too_small_for_the_episodes_is_refused_before_training(evaluated_run: Run) -> None:
    classes, counts = evaluated_run.dataset.manifest.classes, evaluated_run.counts
    check_splits(evaluated_run.settings, classes, counts, place="", trainings={"distill.training": FEW})
    with pytest.raises(UserError, match="split 'val' has 5 labelled classes"):
        check_splits(
            with_episodes(evaluated_run, way=6).settings, classes, counts, place="", trainings={"distill.training": FEW}
        )


def test_nothing_is_measured_on_a_split_without_a_label(evaluated_run: Run) -> None:
    classes, data = evaluated_run.dataset.manifest.classes, evaluated_run.data
    counts = evaluated_run.counts | {"novel": SplitCounts(9, [0] * len(classes))}
    assert measured_splits(data, counts) == ("val",)
    check_splits(evaluated_run.settings, classes, counts, place="", trainings={"distill.training": FEW})


def test_the_file_is_plain_json(evaluated_run: Run) -> None:
    report = json.loads((evaluated_run.folder.path / "evaluation.json").read_text())
    assert report["splits"] == {"val": "val", "test": "novel"}
    assert report["protocol"]["episodes"] == 100
