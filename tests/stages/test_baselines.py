"""The baselines of students: which there are, what they learn, and that none is trained without labels."""

from pathlib import Path

from dpkd.stages.baselines import baselines
from dpkd.stages.plan import stages_of
from tests.runs import Command, settings_of, tiny


def test_a_baseline_has_the_network_of_its_student_and_learns_labels_alone(tmp_path: Path) -> None:
    tree = tiny(tmp_path / "run", source=tmp_path)
    tree["distill"]["students"]["conv"] |= {"baseline": [0.5, 1], "schedule": {"warmup": 0.3}}
    settings = settings_of(tree)
    found = baselines(settings)
    assert list(found) == ["conv.x0.5", "conv"]
    for name, steps in (("conv.x0.5", 3), ("conv", 6)):
        student, alone = settings.distill.students["conv"], found[name].settings
        assert found[name].student == "conv"
        assert (alone.model.name, alone.model.arguments) == (student.model.name, student.model.arguments)
        assert alone.model.pooling.kind == "mean"
        assert [(objective.kind, objective.weight) for objective in alone.objectives] == [("supervised", 1.0)]
        assert alone.schedule == student.schedule
        assert (alone.training.steps, alone.training.labelled_share) == (steps, 1.0)
    assert stages_of(settings)[-4:] == ["baseline-conv.x0.5", "baseline-conv", "evaluate", "export"]


def test_the_plain_baseline_has_no_recipe_and_the_other_has_that_of_the_student(tmp_path: Path) -> None:
    tree = tiny(tmp_path / "run", source=tmp_path)
    tree["distill"]["students"]["conv"]["objectives"] = [{"kind": "supervised", "balance": "logit_adjusted"}]
    tree["distill"]["students"]["conv"]["baseline"] = [1, "plain"]
    tree["distill"]["training"] |= {"imbalance": "auto", "sampling": "class_aware"}
    found = baselines(settings_of(tree))
    assert list(found) == ["conv", "conv.plain"]
    expected = {"conv": ("logit_adjusted", "auto", "class_aware"), "conv.plain": ("none", "none", "auto")}
    for name, (_, alone) in found.items():
        assert alone.objectives[0].model_dump()["balance"] == expected[name][0]
        assert (alone.training.imbalance, alone.training.sampling) == expected[name][1:]
        assert alone.training.num_steps(100) == 6


def test_without_labels_there_is_no_baseline(sample_folder: Path, tmp_path: Path) -> None:
    tree = tiny(tmp_path / "run", source=sample_folder / "base" / "unlabelled")
    tree["data"] |= {"train": "train", "val": None, "test": None}
    tree["distill"]["training"] |= {"batch_size": 8}
    command = Command(tree, "--stages", "pack,prepare,baselines")
    assert command.wait() == 0, command.output
    assert "baseline-conv: left out, because labels of fewer than two classes are visible" in command.output
    assert not (tmp_path / "run" / "baselines").exists()
