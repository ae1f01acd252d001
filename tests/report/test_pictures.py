"""What can be seen on pictures of samples and their maps."""

import numpy as np

from dpkd.report.pictures import CELL, GAP, MISSING, TITLE_HEIGHT, draw_maps, panel, sheet

IMAGE_HWC = np.full((32, 64, 3), 90, np.uint8)


def draw_map(map_HWC: np.ndarray, *, image_HWC: np.ndarray) -> np.ndarray:
    (drawn_HWC,) = draw_maps([map_HWC], images=[image_HWC])
    return drawn_HWC


def cell(drawn_HWC: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = TITLE_HEIGHT + row * (CELL + GAP), column * (CELL + GAP)
    return drawn_HWC[top : top + CELL, left : left + CELL]


def test_a_sheet_has_a_row_a_sample_and_a_column_a_map_in_the_image_s_own_shape():
    maps = {"edge": np.zeros((4, 8, 1), np.float32), "superpixel": np.zeros((4, 8, 1), np.int32)}
    drawn_HWC = sheet([(IMAGE_HWC, maps), (IMAGE_HWC, maps)])
    assert drawn_HWC.shape == (TITLE_HEIGHT + 2 * (CELL + GAP), 3 * (CELL + GAP), 3)
    for column in range(3):
        used_HW = (cell(drawn_HWC, 1, column) != 255).any(2)
        rows, columns = used_HW.any(1).nonzero()[0], used_HW.any(0).nonzero()[0]
        assert (len(rows), len(columns)) == (CELL // 2, CELL)


def test_one_amount_is_brighter_where_it_is_greater_and_on_a_scale_that_is_the_same_for_all_maps():
    ramp_HWC = np.linspace(0, 1, 8, dtype=np.float32)[None, :, None].repeat(4, 0)
    brightness = draw_map(ramp_HWC, image_HWC=IMAGE_HWC).astype(float).mean((0, 2))
    assert (np.diff(brightness[4::8]) > 0).all()
    half_HWC = np.full((1, 1, 1), 0.5, np.float32)
    assert (draw_map(half_HWC, image_HWC=IMAGE_HWC) == draw_map(half_HWC, image_HWC=IMAGE_HWC)[0, 0]).all()


def test_borders_stand_between_regions_and_nowhere_else():
    label_HWC = np.zeros((4, 8, 1), np.int32)
    label_HWC[:, 4:] = 1
    changed_HW = (draw_map(label_HWC, image_HWC=IMAGE_HWC) != IMAGE_HWC).any(2)
    assert changed_HW[:, 32].all()
    assert changed_HW.sum() == 32


def test_cells_with_the_same_values_have_the_same_colour_and_others_another_one():
    map_HWC = np.random.default_rng(0).random((4, 8, 12), np.float32) * 0.02
    map_HWC[:, 4:, 7] += 1
    drawn_HWC = draw_map(map_HWC, image_HWC=IMAGE_HWC).astype(int)
    left, right = drawn_HWC[:, :32].reshape(-1, 3), drawn_HWC[:, 32:].reshape(-1, 3)
    assert np.abs(left.mean(0) - right.mean(0)).max() > 150
    assert max(np.ptp(left, axis=0).max(), np.ptp(right, axis=0).max()) < 40


def test_a_map_that_nobody_gave_is_plain_grey():
    for absent_HWC in (np.full((1, 1, 1), np.nan, np.float32), np.full((1, 1, 1), -1, np.int32)):
        assert (draw_map(absent_HWC, image_HWC=IMAGE_HWC) == MISSING).all()


def test_flat_maps_of_any_number_of_channels_are_drawn():
    for channels in (1, 2, 3, 4, 12):
        flat_HWC = np.full((1, 1, channels), 0.5, np.float32)
        assert draw_map(flat_HWC, image_HWC=IMAGE_HWC).shape == IMAGE_HWC.shape


def test_many_channels_have_the_same_colours_in_all_maps_that_are_drawn_together():
    map_HWC = np.random.default_rng(0).random((4, 8, 12), np.float32)
    first, mirrored = draw_maps([map_HWC, map_HWC[:, ::-1]], images=[IMAGE_HWC, IMAGE_HWC])
    np.testing.assert_array_equal(mirrored, first[:, ::-1])


def test_a_right_prediction_of_many_channels_looks_like_its_target():
    hog_BCHW = np.random.default_rng(0).random((1, 9, 8, 8), np.float32)
    right_BCHW = (hog_BCHW - hog_BCHW.mean((2, 3), keepdims=True)) / hog_BCHW.std((2, 3), keepdims=True)
    picture = panel(np.zeros((1, 3, 8, 8), np.uint8), priors={"hog": hog_BCHW}, predictions={"hog": right_BCHW})
    rows = picture.reshape(-1, TITLE_HEIGHT + CELL + GAP, CELL + GAP, 3)[:, TITLE_HEIGHT:]
    assert len(rows) == 4
    assert np.abs(rows[2].astype(int) - rows[3]).max() <= 1
    assert rows[2].std() > 20
