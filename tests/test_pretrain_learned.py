"""A run that learns to predict what a model of the user's says, started as a user would."""

import pytest

from dpkd.data.shards import Dataset
from dpkd.errors import UserError
from dpkd.priors.store import PriorSet
from dpkd.stages.plan import STAGES, left_to_do
from tests.model_cases import SIZE, save_edges, save_vit
from tests.runs import Command, settings_of, tiny, train_events


@pytest.mark.nightly
@pytest.mark.slow
def test_a_teacher_predicts_the_maps_of_a_model_and_other_weights_prepare_again(sample_folder, tmp_path):
    save_edges(tmp_path / "edges.onnx")
    tree = tiny(tmp_path / "run", source=sample_folder)
    model = {"kind": "onnx", "file": str(tmp_path / "edges.onnx"), "output": 0}
    learned = {"kind": "learned", "of": "edges", "model": model, "size": SIZE, "scale": "sigmoid"}
    tree["prepare"]["priors"].append(learned)
    tree["teachers"]["teacher"]["objectives"][1]["targets"] = {"learned-edges": 1.0}
    command = Command(tree, "--stages", "pack,prepare,teach")
    assert command.wait() == 0, command.output
    losses = [line for line in train_events(command.folder) if any("learned-edges" in key for key in line)]
    assert losses, train_events(command.folder)[-1]

    settings = settings_of(tree)
    stages = STAGES[:3]
    assert left_to_do(command.folder, settings, stages) == []
    url = str(command.folder.path / "shards")
    before = PriorSet.open(url, "default").manifest
    save_edges(tmp_path / "edges.onnx", seed=1)
    assert left_to_do(command.folder, settings, stages) == ["prepare"]
    assert PriorSet.open(url, "default").manifest == before  # to read maps takes no weights
    again = Command(tree, "--stages", "pack,prepare")
    assert again.wait() == 0, again.output
    after = PriorSet.open(url, "default").manifest
    changed = {name for name in before.fingerprints if before.fingerprints[name] != after.fingerprints[name]}
    assert changed == {"learned-edges"}
    assert Dataset.open(url).manifest.fingerprint == after.dataset


def test_missing_weights_are_named_by_the_plan(sample_folder, tmp_path):
    tree = tiny(tmp_path / "run", source=sample_folder)
    model = {"kind": "timm", "name": "vit_tiny_patch16_224", "file": str(tmp_path / "gone.safetensors")}
    tree["prepare"]["priors"].append({"kind": "learned", "of": "attention", "model": model})
    command = Command(tree)
    assert command.wait() == 2
    assert "the prior 'learned-attention'" in command.output
    assert "gone.safetensors is missing: give the path of the weights" in command.output
    assert not (command.folder.path / "shards").exists()
    with pytest.raises(UserError, match="is missing"):
        left_to_do(command.folder, settings_of(tree), ["prepare"])
    save_vit(tmp_path / "gone.safetensors")
    assert left_to_do(command.folder, settings_of(tree), ["prepare"]) == ["prepare"]
