"""Objectives declare what they need and compute their loss; two of one kind both count; one of any package works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpkd.errors import UserError
from dpkd.objectives import BuiltIn
from dpkd.objectives.base import Context, Head, Needs, Objective, losses_of, named
from dpkd.objectives.features import FeatureDistillation
from dpkd.objectives.logits import LogitDistillation
from dpkd.objectives.supervised import Supervised
from dpkd.settings import parse_settings
from tests.contexts import context_of
from tests.runs import VIT, Command, all_weights, settings_of, tiny, train_events

if TYPE_CHECKING:
    from dpkd.run.folder import RunFolder


class Brightness(Objective):
    """Predicts the mean colour of the view from the embedding: an objective that no file of dpkd knows."""

    kind: str = f"{__name__}:Brightness"
    scale: float = 1.0

    def needs(self) -> Needs:
        return Needs(heads={"brightness": Head("embedding", 3)})

    def loss(self, context: Context) -> torch.Tensor:
        target_B3 = context.image().float().mean((2, 3)) / 255
        return self.weight * (context.student("brightness") - self.scale * target_B3).square().mean()


KIND = {"kind": "tests.objectives.test_contract:Brightness", "weight": 0.5, "scale": 2.0}


def test_an_objective_of_a_test_file_trains_resumes_and_is_drawn(whole: RunFolder, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "own", source=None, shards=whole.path / "shards")
    tree["teachers"]["teacher"]["objectives"].append(KIND)
    tree["distill"]["students"]["conv"]["objectives"] = [*tree["distill"]["students"]["conv"]["objectives"], KIND]
    del tree["distill"]["students"]["vit"]
    straight = Command(tree, "--stages", "prepare,teach,distill")
    assert straight.wait() == 0, straight.output
    tree["run"]["dir"] = str(tmp_path / "killed")
    killed = Command(tree, "--stages", "prepare,teach,distill")
    killed.wait_for_step("distill", 3)
    killed.kill_all()
    again = Command(tree, "--stages", "prepare,teach,distill")
    assert again.wait() == 0, again.output
    assert all_weights(straight.folder).keys() == all_weights(again.folder).keys()
    for name, tensor in all_weights(straight.folder).items():
        assert torch.equal(tensor, all_weights(again.folder)[name]), name
    for stage, network in (("teach", "teacher"), ("distill", "student-conv")):
        last = [line for line in train_events(again.folder) if line["stage"] == stage][-1]
        assert last[f"loss/{network}/Brightness"] > 0
        board = EventAccumulator(str(again.folder.tensorboard / stage / network)).Reload()
        assert "loss/Brightness" in board.Tags()["scalars"]
    heads = json.loads((again.folder.teacher("teacher") / "network.json").read_text())["spec"]["heads"]
    assert heads["brightness"] == {"reads": "embedding", "width": 3, "hidden": None}


class WithoutLoss(Objective):
    kind: str = f"{__name__}:WithoutLoss"

    def needs(self) -> Needs:
        return Needs()


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (KIND | {"scael": 1}, ["distill.students.s.objectives.0", "scael: no such key (did you mean 'scale'?)"]),
        (KIND | {"weight": -1}, ["distill.students.s.objectives.0", "weight: -1 does not fit"]),
        ({"kind": f"{__name__}:WithoutLoss"}, ["distill.students.s.objectives.0", "lacks loss"]),
        ({"kind": "logits", "average_views": True}, ["objectives.0 reads 2 views or more", "data.views.global.count"]),
        ({"kind": "patch_labels", "teacher": "public"}, ["'public' is never trained and has no logits"]),
    ],
)
def test_a_class_that_is_no_objective_is_named_with_what_is_wrong(objective: dict, words: list[str]) -> None:
    teachers = {"teacher": {"model": "resnet18", "objectives": [{"kind": "supervised"}]}}
    if objective.get("teacher"):
        teachers["public"] = {"model": "resnet18", "weights": "x"}
    student = {"model": "resnet18", "objectives": [objective]}
    tree = {"data": {"source": "x"}, "teachers": teachers, "distill": {"students": {"s": student}}}
    with pytest.raises(UserError) as caught:
        parse_settings(tree, origin="test")
    assert all(word in str(caught.value) for word in words), caught.value


def test_two_objectives_of_one_kind_both_count_under_names_of_their_own() -> None:
    logits_BK = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    objectives: list[Objective] = [
        Supervised(weight=1.0),
        Supervised(weight=0.5, label_smoothing=0.3),
        Supervised(name="third", weight=0.25, label_smoothing=0.6),
    ]
    losses = losses_of(objectives, context_of({"logits": logits_BK}, {}))
    assert list(losses) == ["supervised", "supervised-2", "third"]
    for (name, objective), (_, loss) in zip(named(objectives).items(), losses.items(), strict=True):
        alone = losses_of([objective], context_of({"logits": logits_BK}, {}))
        assert torch.equal(loss, next(iter(alone.values()))), name
    assert len({float(loss) for loss in losses.values()}) == 3


def test_each_objective_follows_the_teacher_that_it_names() -> None:
    draw = torch.Generator().manual_seed(0)
    student = {
        "logits": torch.randn(6, 3, generator=draw),
        "to_teacher/one/embedding": torch.randn(6, 5, generator=draw),
        "to_teacher/two/embedding": torch.randn(6, 7, generator=draw),
    }
    taught = {
        "one": {"logits": torch.randn(6, 3, generator=draw), "embedding": torch.randn(6, 5, generator=draw)},
        "two": {"logits": torch.randn(6, 3, generator=draw), "embedding": torch.randn(6, 7, generator=draw)},
    }
    both: list[Objective] = []
    for name in taught:
        both += [LogitDistillation(teacher=name), FeatureDistillation(teacher=name)]
    losses = losses_of(both, context_of(student, taught))
    assert list(losses) == ["logits", "features", "logits-2", "features-2"]
    for number, name in enumerate(taught):
        alone = losses_of(both[2 * number : 2 * number + 2], context_of(student, {name: taught[name]}))
        assert [float(loss) for loss in alone.values()] == [
            float(loss) for loss in list(losses.values())[2 * number :][:2]
        ]


@pytest.mark.parametrize("kind", [model.model_fields["kind"].default for model in BuiltIn.__origin__.__args__])
def test_every_kind_is_in_the_settings_and_declares_its_needs_without_torch(kind: str) -> None:
    extra: dict[str, Any] = {}
    if kind == "region_bounds":
        extra = {"of": "saliency", "bounds": [{"statistic": "area", "at_most": 0.5}]}
    if kind == "locality":
        extra = {"layers": {0: 1}}
    code = (
        "import sys, pydantic, dpkd.objectives as o\n"
        f"objective = pydantic.TypeAdapter(o.AnyObjective).validate_python({{'kind': {kind!r}, **{extra!r}}})\n"
        "assert objective.needs() and 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_public_network_teaches_beside_one_of_the_run_and_is_never_trained(
    whole: RunFolder, tmp_path: Path, shared_data: Path
) -> None:
    weights = shared_data / "tf_efficientnet_lite0.safetensors"
    tree = tiny(tmp_path / "two", source=None, shards=whole.path / "shards")
    tree["teachers"]["public"] = {"model": "tf_efficientnet_lite0", "weights": str(weights)}
    tree["distill"]["students"] = {
        "conv": tree["distill"]["students"]["conv"]
        | {
            "objectives": [
                {"kind": "supervised"},
                {"kind": "logits", "teacher": "teacher"},
                {"kind": "features", "teacher": "teacher"},
                {"kind": "features", "teacher": "public"},
                {"kind": "patches", "teacher": "public", "saliency": 0, "edge": 0},
            ]
        }
    }
    assert list(settings_of(tree).trained_teachers) == ["teacher"]
    command = Command(tree, "--stages", "prepare,teach,distill,evaluate")
    assert command.wait() == 0, command.output
    last = [line for line in train_events(command.folder) if line["stage"] == "distill"][-1]
    assert {key for key in last if key.startswith("loss/student-conv/")} == {
        f"loss/student-conv/{name}" for name in ("supervised", "logits", "features", "features-2", "patches")
    }
    assert not command.folder.teacher("public").exists()
    spec = json.loads((command.folder.students / "conv" / "network.json").read_text())["spec"]
    assert {name: head["width"] for name, head in spec["heads"].items()} == {
        "to_teacher/public/embedding": 1280,
        "to_teacher/public/patch": 1280,
        "to_teacher/teacher/embedding": 16,
    }
    report = json.loads((command.folder.path / "evaluation.json").read_text())
    assert set(report["teachers"]) == {"teacher", "public"}


def test_every_objective_that_needs_no_expert_trains_and_no_head_leaves(whole: RunFolder, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "all", source=None, shards=whole.path / "shards")
    tree["data"]["views"] = {"global": {"count": 2}}
    tree["evaluate"] = None
    objectives = [
        {"kind": "supervised"},
        {"kind": "logits", "average_views": True},
        {"kind": "standardised_logits", "average_views": True},
        {"kind": "features", "hidden": 12, "distance": "radio", "average_views": True},
        {"kind": "features"},
        {"kind": "relations", "distance": 1, "angle": 2, "average_views": True},
        {"kind": "patch_relations", "saliency": 1},
        {"kind": "patch_labels"},
        {"kind": "patch_labels", "name": "sun", "prior": None},
        {"kind": "locality", "layers": {0: 1, 1: 2}},
        {"kind": "sigreg", "width": 5, "hidden": 7},
        {"kind": "pseudo_labels", "threshold": 0.0},
        {"kind": "pseudo_labels", "threshold": 0.0, "magnitude": 0.5, "share": 0.5},
    ]
    tree["distill"]["students"] = {"vit": {"model": VIT, "objectives": objectives, "engine": {"kind": "torch"}}}
    tree["distill"]["training"] |= {"steps": 2, "checkpoint_every": 2}
    command = Command(tree, "--stages", "prepare,teach,distill,export")
    assert command.wait() == 0, command.output
    last = [line for line in train_events(command.folder) if line["stage"] == "distill"][-1]
    losses = {key.removeprefix("loss/student-vit/"): value for key, value in last.items() if key.startswith("loss/")}
    names = {"supervised", "logits", "standardised_logits", "features", "features-2", "patch_relations", "patch_labels"}
    parts = {"relations.similarity", "relations.distance", "relations.angle", "locality.layer-0", "locality.layer-1"}
    own = {"sigreg.agreement", "sigreg.normality", "pseudo_labels", "pseudo_labels-2"}
    assert losses.keys() == names | parts | own | {"sun"}
    assert all(0 < value < 1e6 for value in losses.values())
    heads = json.loads((command.folder.students / "vit" / "network.json").read_text())["spec"]["heads"]
    assert {name: tuple(head.values()) for name, head in heads.items()} == {
        "to_teacher/embedding": ("embedding", 16, None),
        "to_teacher/embedding-12": ("embedding", 16, 12),
        "to_teacher/layer-0-1": ("layer-0", 8, None),
        "to_teacher/layer-1-2": ("layer-1", 8, None),
        "to_teacher/patch_labels": ("patch", 7, None),
        "sigreg": ("embedding", 5, 7),
    }
    exported = load_file(command.folder.export / "vit" / "model.safetensors")
    arguments = {"num_classes": 6, **VIT["arguments"]}
    assert exported.keys() == timm.create_model(VIT["name"], **arguments).state_dict().keys()


def test_a_teacher_that_learns_from_derived_views_and_other_grounds_resumes_bit_for_bit(
    whole: RunFolder, tmp_path: Path
) -> None:
    tree = tiny(tmp_path / "own", source=None, shards=whole.path / "shards")
    tree["data"]["labels"] = {"kind": "fraction", "fraction": 0.5}
    teacher = tree["teachers"]["teacher"]
    teacher["objectives"] += [{"kind": "rotation", "weight": 0.5, "share": 0.5}, {"kind": "mixup", "stages": 2}]
    teacher["augment"] = {"background": {"share": 0.5}}
    teacher["training"] |= {"labelled_share": 0.5}
    straight = Command(tree, "--stages", "prepare,teach")
    assert straight.wait() == 0, straight.output
    for kind in ("supervised", "rotation", "mixup"):
        assert train_events(straight.folder)[0][f"loss/teacher/{kind}"] > 0
    tree["run"]["dir"] = str(tmp_path / "killed")
    killed = Command(tree, "--stages", "prepare,teach")
    killed.wait_for_step("teach", 3)
    killed.kill_all()
    again = Command(tree, "--stages", "prepare,teach")
    assert again.wait() == 0, again.output
    for name, weights in all_weights(straight.folder).items():
        assert torch.equal(weights, all_weights(again.folder)[name]), name
