import cv2
import numpy as np
import pytest
from sklearn import metrics

from tools.bench_saliency import f_measure, main, overlap
from tools.make_sample_data import SampleSettings, draw_samples


def test_f_and_overlap_agree_with_scikit_learn():
    random = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        found_HW, figure_HW = random.random((9, 7)) < share, random.random((9, 7)) < 0.4
        truth, guess = figure_HW.ravel(), found_HW.ravel()
        assert f_measure(found_HW, figure_HW) == pytest.approx(metrics.fbeta_score(truth, guess, beta=0.3**0.5))
        assert overlap(found_HW, figure_HW) == pytest.approx(metrics.jaccard_score(truth, guess))
    assert f_measure(np.zeros((2, 2), bool), figure_HW[:2, :2]) == 0


def test_a_map_that_is_the_mask_is_perfect_and_drawn_objects_are_found_better_than_the_middle(tmp_path):
    few = {"base_classes": 4, "val_classes": 2, "novel_classes": 2, "largest": 6, "smallest": 4, "unlabelled": 4}
    draw_samples(tmp_path / "sample", settings=SampleSettings(size=64, **few), seed=0)
    rows = {row["method"]: row for row in main(["--data", str(tmp_path / "sample/base")])}
    assert rows["saliency"]["max_f"] > rows["control: centre"]["max_f"]
    assert 0 < rows["saliency"]["error"] < 0.5


def test_a_bright_disc_is_found_whole_by_otsu(tmp_path):
    image_HW = np.full((40, 40), 60, np.uint8)
    cv2.circle(image_HW, (14, 20), 8, 200, -1)
    cv2.imwrite(str(tmp_path / "a.png"), image_HW)
    cv2.imwrite(str(tmp_path / "a.mask.png"), (image_HW > 100).astype(np.uint8))
    rows = {row["method"]: row for row in main(["--data", str(tmp_path)])}
    assert (rows["control: otsu"]["max_f"], rows["control: otsu"]["iou"], rows["control: otsu"]["error"]) == (1, 1, 0)


def test_a_folder_without_masks_is_named(tmp_path):
    with pytest.raises(SystemExit, match=f"{tmp_path}: no image"):
        main(["--data", str(tmp_path)])
