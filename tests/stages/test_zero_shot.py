"""Zero-shot figures: which classes and attributes take part, and what is said of the others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpkd.errors import UserError
from dpkd.evaluation.long_tail import zero_shot_accuracy
from dpkd.models.saved import load_network
from dpkd.models.settings import NetworkSpec
from dpkd.stages.evaluate import zero_shot
from dpkd.stages.run import Run
from tests.runs import with_data

NAMES = ("size", "gloss", "novelty")


@pytest.fixture
def run(untrained_run: Run, tmp_path: Path) -> Run:
    """The run with a table: `novelty` is known of no class that is trained on, and the last novel class has no row."""
    rng = np.random.default_rng(0)
    rows = {name: [*rng.uniform(size=2), ""] for name in classes_of(untrained_run, "base")}
    rows |= {name: list(rng.uniform(size=3)) for name in classes_of(untrained_run, "novel")[:-1]}
    table = tmp_path / "table.csv"
    lines = [",".join([name, *map(str, cells)]) for name, cells in rows.items()]
    table.write_text("\n".join(["class," + ",".join(NAMES), *lines]))
    return with_data(untrained_run, attributes=str(table))


def classes_of(run: Run, split: str) -> list[str]:
    labels = np.unique(run.dataset.split(split).label_N)
    return [run.dataset.manifest.classes[label] for label in labels if label >= 0]


def measured(run: Run, split_name: str, logit_NA: np.ndarray, **changes: Any) -> dict[str, Any]:
    spec: NetworkSpec = load_network(run.folder.students / "conv").spec.model_copy(
        update={"attributes": NAMES} | changes
    )
    embedded = {"conv": {"attributes": logit_NA.astype(np.float32)}}
    specs = {"conv": spec, "vit": spec.model_copy(update={"attributes": ()})}
    label_N = run.dataset.split(split_name).label_N
    return zero_shot(run, specs, embedded, label_N, split=split_name)


def test_described_classes_are_told_apart_by_what_was_learnt(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    split = run.dataset.split("novel")
    logit_NA = np.random.default_rng(1).normal(size=(split.num_samples, 3))
    names = classes_of(run, "novel")
    rows = [line.split(",") for line in Path(str(run.data.attributes)).read_text().splitlines()]
    value_KA = np.array([[float(cell) for cell in row[1:3]] for row in rows if row[0] in names])
    class_K = np.array([run.dataset.manifest.classes.index(name) for name in names[:-1]])
    expected = zero_shot_accuracy(logit_NA[:, :2], split.label_N, class_K=class_K, value_KA=value_KA)
    assert measured(run, "novel", logit_NA) == {"conv": pytest.approx(expected)}
    assert f"evaluate novel: data.attributes does not describe {names[-1]}: left out" in capsys.readouterr().out


def test_a_split_of_classes_that_were_trained_on_or_not_described_has_no_figure(run: Run) -> None:
    for split in ("base", "val"):
        assert measured(run, split, np.zeros((run.dataset.split(split).num_samples, 3))) == {}


def test_a_table_of_other_attributes_than_the_network_learnt_is_refused(run: Run) -> None:
    logit_NA = np.zeros((run.dataset.split("novel").num_samples, 2))
    with pytest.raises(UserError, match=r"conv was trained on the attributes size, sheen, and data.attributes .*gloss"):
        measured(run, "novel", logit_NA, attributes=("size", "sheen"))
