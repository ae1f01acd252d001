"""What can be known is refused before the first image is decoded: exit code 2, and neither a shard nor a prior map."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dpkd.config import apply_override
from dpkd.errors import UserError
from dpkd.report.quarantine import Quarantine
from dpkd.settings import Settings
from dpkd.stages.pack import check_plan, pack
from dpkd.stages.plan import stages_of
from tests.data.packing import SerialPool, make_folder
from tests.runs import Command, settings_of, tiny

COUNTS = {f"{split}/{name}": 4 for split in ("base", "val", "novel") for name in "abcde"}


def tree_of(folder: Path, *overrides: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Settings that fit a folder of images, and the folder without some of its folders."""
    counts = {place: count for place, count in COUNTS.items() if not place.startswith(without or "-")}
    tree = deepcopy(tiny(folder / "run", source=make_folder(folder / "images", counts=counts)))
    tree["evaluate"]["episodes"] |= {"way": 5, "shots": [1], "queries": 3}
    for override in overrides:
        apply_override(tree, override, root=Settings)
    return tree


def test_a_model_that_timm_lacks_is_refused_before_packing(tmp_path: Path) -> None:
    command = Command(tree_of(tmp_path, "distill.students.vit.model.name=vit_tiny_patch16_244"))
    assert command.wait() == 2
    assert "distill.students.vit" in command.output
    assert not command.folder.path.exists()


def listed(folder: Path, *overrides: str, without: tuple[str, ...] = ()) -> None:
    """Packs for a whole run, up to the first shard."""
    settings = settings_of(tree_of(folder, *overrides, without=without))

    class Stopped(SerialPool):
        def map(self, function: Any, items: Any) -> Any:
            raise InterruptedError

    pack(
        settings.data,
        str(folder / "shards"),
        seed=0,
        pool=Stopped(),
        quarantine=Quarantine(folder / "quarantine.jsonl", limit=0),
        progress=lambda *_: None,
        check=partial(check_plan, settings=settings, left=stages_of(settings)),
    )


@pytest.mark.parametrize(
    ("overrides", "without", "named"),
    [
        ([], ("val",), r"data\.val='val'.*it has: base, novel.*data\.val=null"),
        (["data.train=train"], (), r"data\.train='train'"),
        (["evaluate.episodes.way=6"], (), r"evaluate\.episodes\.way=6"),
        (["data.labels={kind: listed, path: /nowhere.txt}"], (), r"/nowhere\.txt"),
        (["evaluate.episodes.queries=4"], (), r"queries=4"),
        (["distill.training.batch_size=32"], (), r"distill\.training\.batch_size=32"),
        (
            ["prepare.priors=[{kind: edge}, {kind: saliency}, {kind: superpixel}, {kind: expert, of: crack}]"],
            (),
            r"'crack'",
        ),
    ],
)
def test_splits_that_do_not_fit_are_refused_by_the_listing(
    overrides: list[str], without: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named):
        listed(tmp_path, *overrides, without=without)
    assert not (tmp_path / "shards").exists()


def test_the_listing_of_a_source_that_fits_is_not_refused(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        listed(tmp_path)


def test_one_labelled_class_is_refused_where_an_objective_needs_two(tmp_path: Path) -> None:
    batches = [
        f"{key}.training.{part}"
        for key in ("teachers.teacher", "distill")
        for part in ("batch_size=4", "micro_batch_size=4")
    ]
    others = tuple(f"base/{name}" for name in "bcde")
    with pytest.raises(UserError, match=r"1 labelled class \(a\), and teachers\.teacher\.objectives\.0 needs two"):
        listed(tmp_path, *batches, without=others)


@pytest.mark.slow
def test_images_without_any_label_are_trained_on_and_exported(tmp_path: Path) -> None:
    tree = deepcopy(tiny(tmp_path / "run", source=make_folder(tmp_path / "images", counts={".": 40})))
    tree["data"] |= {"train": "train", "val": "val", "test": None}
    tree["data"]["splits"] = {"kind": "fraction", "fractions": {"train": 0.9, "val": 0.1}}
    tree["teachers"]["teacher"]["objectives"] = [{"kind": "masked_prior", "targets": {"hog": 1.0}}]
    del tree["distill"]["students"]["vit"]
    tree["distill"]["students"]["conv"]["objectives"] = [{"kind": "features"}, {"kind": "patches"}]
    command = Command(tree)
    assert command.wait() == 0, command.output
    assert sorted(path.name for path in command.folder.export.iterdir()) == ["conv"]
    assert not (command.folder.path / "evaluation.json").exists()
    assert command.output.count("has no label") == 1
