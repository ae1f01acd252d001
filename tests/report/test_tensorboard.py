"""What TensorBoard reads back from the files of a board."""

import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dpkd.report.pictures import CELL, GAP, TITLE_HEIGHT, panel
from dpkd.report.quarantine import Quarantine
from dpkd.report.tensorboard import Board


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_each_network_has_its_own_run_and_shares_its_tags_with_the_others(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.write(
        10,
        {
            "loss/teacher/supervised": 2.0,
            "loss/small/supervised": 3.0,
            "learning_rate/small": 0.1,
            "gradient_norm/small": 0.7,
            "speed/images_per_s": 55.0,
        },
    )
    board.close()
    assert read(tmp_path / "teacher").Tags()["scalars"] == ["loss/supervised"]
    small = read(tmp_path / "small")
    assert sorted(small.Tags()["scalars"]) == ["loss/supervised", "training/gradient_norm", "training/learning_rate"]
    assert [(event.step, event.value) for event in small.Scalars("loss/supervised")] == [(10, 3.0)]
    assert read(tmp_path).Scalars("speed/images_per_s")[0].value == 55.0


def test_few_shot_accuracy_stands_with_its_interval_and_as_a_band(tmp_path: Path) -> None:
    board = Board(tmp_path)
    for step in (10, 20):
        board.accuracy(step, network="small", split="val", scores={"5way_1shot": {"mean": 0.5, "ci95": 0.125}})
    board.close()
    events = read(tmp_path / "small")
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert values == {
        "few_shot/val_5way_1shot": [0.5, 0.5],
        "few_shot_ci95/val_5way_1shot_low": [0.375, 0.375],
        "few_shot_ci95/val_5way_1shot_high": [0.625, 0.625],
    }
    (layout,) = events.Tensors("custom_scalars__config__")
    assert b"few_shot_ci95/val_5way_1shot_low" in layout.tensor_proto.string_val[0]


def test_settings_and_figures_stand_on_the_page_that_compares_runs(tmp_path: Path) -> None:
    board = Board(tmp_path)
    settings = {"data": {"image_size": 64, "val": None}, "objectives": [{"kind": "rotation", "weight": 0.5}]}
    board.hparams(settings, {"exported/conv val 5-shot": 0.75})
    board.close()
    events = read(tmp_path)
    assert events.Scalars("exported/conv val 5-shot")[0].value == 0.75
    started = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    content = HParamsPluginData.FromString(started).session_start_info.hparams
    assert {name: value.number_value or value.string_value for name, value in content.items()} == {
        "data.image_size": 64.0,
        "objectives.0.kind": "rotation",
        "objectives.0.weight": 0.5,
    }


def test_what_an_interrupted_run_wrote_beyond_its_checkpoint_is_struck_out(tmp_path: Path) -> None:
    first = Board(tmp_path)
    for step in (10, 20, 30):
        first.write(step, {"speed/images_per_s": 1.0})
    first.close()
    time.sleep(1.1)  # TensorBoard orders files by the second in their names; another attempt starts later
    again = Board(tmp_path, start_step=10)
    for step in (20, 30, 40):
        again.write(step, {"speed/images_per_s": 2.0})
    again.close()
    events = read(tmp_path).Scalars("speed/images_per_s")
    assert [(event.step, event.value) for event in events] == [(10, 1.0), (20, 2.0), (30, 2.0), (40, 2.0)]


def test_a_panel_has_a_column_a_sample_and_a_row_a_map(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    drawn_HWC = panel(
        rng.integers(0, 256, (3, 3, 32, 32), np.uint8),
        priors={"edge": rng.random((3, 1, 8, 8)), "superpixel": rng.integers(0, 9, (3, 1, 8, 8)).astype(float)},
        predictions={"edge": rng.normal(size=(3, 1, 4, 4)), "hog": rng.normal(size=(3, 9, 4, 4))},
        attention_B1HW=rng.random((3, 1, 4, 4)),
    )
    board = Board(tmp_path)
    board.show(5, "panel", drawn_HWC, network="teacher")
    board.close()
    (event,) = read(tmp_path / "teacher").Images("panel")
    picture = np.asarray(Image.open(BytesIO(event.encoded_image_string)))
    rows = 7  # image, edge, superpixel, edge target, edge predicted, hog predicted, attention
    assert picture.shape == (rows * (TITLE_HEIGHT + CELL + GAP), 3 * (CELL + GAP), 3)


def row(picture: np.ndarray, number: int) -> np.ndarray:
    """The first cell of a row."""
    top = number * (TITLE_HEIGHT + CELL + GAP) + TITLE_HEIGHT
    return picture[top : top + CELL, :CELL]


def test_a_prediction_that_is_right_looks_like_its_target() -> None:
    rng = np.random.default_rng(0)
    edge_B1HW = rng.random((1, 1, 8, 8), np.float32)
    coarse_HW = edge_B1HW[0, 0].reshape(4, 2, 4, 2).mean((1, 3))
    right_B1HW = ((coarse_HW - coarse_HW.mean()) / coarse_HW.std())[None, None]
    picture = panel(np.zeros((1, 3, 8, 8), np.uint8), priors={"edge": edge_B1HW}, predictions={"edge": right_B1HW})
    target, predicted = row(picture, 2).astype(int), row(picture, 3).astype(int)
    assert abs(target - predicted).max() <= 8  # one step of the colour scale
    assert target.std() > 20


def test_a_panel_shows_the_image_and_the_map_where_they_belong() -> None:
    image_BCHW = np.zeros((1, 3, 16, 16), np.uint8)
    image_BCHW[0, 0, :, 8:] = 255  # red on the right
    edge_B1HW = np.zeros((1, 1, 4, 4), np.float32)
    edge_B1HW[0, 0, 0] = 1.0  # strong at the top
    picture = panel(image_BCHW, priors={"edge": edge_B1HW}, predictions={})
    image = row(picture, 0)
    assert image[5, 5].tolist() == [0, 0, 0]
    assert image[5, CELL - 5].tolist() == [255, 0, 0]
    edge = row(picture, 1).astype(int)
    assert edge[5].sum() > edge[CELL - 5].sum()


def test_a_map_that_is_not_finite_does_not_stop_the_picture() -> None:
    broken_B1HW = np.full((1, 1, 4, 4), np.nan, np.float32)
    assert panel(np.zeros((1, 3, 8, 8), np.uint8), priors={"edge": broken_B1HW}, predictions={}).dtype == np.uint8


def test_quarantined_samples_are_counted_by_stage_and_named(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", limit=1)
    for stage, item in (("pack", "a.jpg"), ("prepare", "base-000000.tar/b"), ("prepare", "base-000000.tar/c")):
        quarantine.add(stage, item, "it is cut short")
    board = Board(tmp_path / "tb")
    board.quarantine(3, quarantine)
    board.close()
    events = read(tmp_path / "tb")
    counts = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert counts == {"quarantine/samples": [(3, 3)], "quarantine/pack": [(3, 1)], "quarantine/prepare": [(3, 2)]}
    (text,) = events.Tensors("quarantine/text_summary")
    assert b"base-000000.tar/c" in text.tensor_proto.string_val[0]
