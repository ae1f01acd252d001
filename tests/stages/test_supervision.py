"""What training is told of labels and experts: rows in the order of the labels, and no table without a label."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dpkd.data.attributes import score_weights
from dpkd.engine.settings import TrainingSettings
from dpkd.errors import UserError
from dpkd.objectives.attributes import Attributes
from dpkd.stages.run import Run, supervision, training_set
from tests.runs import with_data

TRAINING = TrainingSettings(steps=1, batch_size=8)


@pytest.fixture
def described(untrained_run: Run, sample_folder: Path) -> Run:
    return with_data(untrained_run, attributes=str(sample_folder / "attributes.yaml"))


def test_rows_stand_in_the_order_of_the_labels(described: Run) -> None:
    data = training_set(described, TRAINING, [Attributes()])
    told = supervision(described, data, TRAINING)
    assert told.class_names == data.class_names
    assert told.attributes is not None
    weight_KA, bias_K = score_weights(told.attributes.value_KA.numpy())
    assert torch.equal(told.attributes.weight_KA, torch.from_numpy(weight_KA))
    assert torch.equal(told.attributes.bias_K, torch.from_numpy(bias_K))
    for name, row_A in zip(data.class_names, told.attributes.value_KA, strict=True):
        colour, texture, shape = name.split("-")
        held = row_A[:18].nonzero().flatten().tolist()  # five colours, five textures, eight shapes
        assert len(held) == 3
        assert {colour, texture, shape} == {OPTIONS[place] for place in held}


OPTIONS = (
    *("red", "yellow", "green", "blue", "violet"),
    *("plain", "striped", "checked", "dotted", "ringed"),
    *("disc", "square", "triangle", "star", "cross", "ring", "crescent", "arrow"),
)


def test_a_table_without_a_visible_label_is_refused(described: Run) -> None:
    data = training_set(described, TRAINING, [Attributes()])
    unlabelled = dataclasses.replace(data, label_N=np.full_like(data.label_N, -1))
    with pytest.raises(UserError, match=r"data.attributes describes classes, and no label is visible in .*'base'"):
        supervision(described, unlabelled, TRAINING)
