import cv2
import numpy as np
import pytest
from scipy import ndimage
from skimage import color, measure

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.edge import (
    BIAS,
    FLOOR,
    LEAST,
    SURE,
    WEIGHTS,
    Edge,
    boundary_odds,
    crests,
    levels,
    line_strength,
    structure,
)


def blurred(map_HW, scale):
    return ndimage.gaussian_filter(map_HW, scale, mode="mirror", radius=int(np.ceil(3 * scale)))


def halved(map_HW):
    height, width = map_HW.shape
    return map_HW.reshape(height // 2, 2, width // 2, 2).mean((1, 3))


def slopes(map_HW, scale):
    """Central differences of the map, smoothed and times the scale unless it is 0; 0 across the frame; x and y."""
    smooth_HW = blurred(map_HW, scale) * scale if scale else map_HW
    y_HW, x_HW = (each_HW.copy() for each_HW in np.gradient(smooth_HW))
    x_HW[:, [0, -1]] = y_HW[[0, -1]] = 0
    return x_HW, y_HW


def eigenvalues(planes, scale):
    """Roots of the eigenvalues of the structure tensor of the planes, the smaller first, HW2."""
    gradient_HW2C = np.stack([np.stack(slopes(plane_HW, scale), axis=-1) for plane_HW in planes], axis=-1)
    return np.sqrt(np.linalg.eigvalsh(gradient_HW2C @ np.swapaxes(gradient_HW2C, -1, -2)).clip(0))


def reference_cues(image_HWC):
    """The cues but those along lines in float64, with scikit-image's Lab and SciPy's Gaussians; sides of 16 k px."""
    half_HWC = np.stack([np.rint(halved(plane_HW)) for plane_HW in np.moveaxis(image_HWC, 2, 0)], axis=2)
    light_HW, *chroma = np.moveaxis(color.rgb2lab(half_HWC.astype(np.uint8)), 2, 0)
    planes = [[light_HW, *(3 * plane_HW for plane_HW in chroma)]]
    for _ in range(3):
        planes.append([halved(plane_HW) for plane_HW in planes[-1]])
    luma_HW = np.rint(image_HWC @ (0.299, 0.587, 0.114)) / 2.55
    variance_HW = halved(luma_HW**2) - halved(luma_HW) ** 2
    step_HW = eigenvalues(planes[0], 0.8)[..., 1]
    mean_HW = np.sqrt(blurred((eigenvalues(planes[0], 0.8) ** 2).sum(-1), 1))
    contrast_HW = halved(np.sqrt(np.sqrt(variance_HW.clip(0)) + 0.25))
    return (
        {"step": step_HW, "light": np.hypot(*slopes(planes[0][0], 0.8)), "mean": mean_HW},
        {
            "cross": eigenvalues(planes[1], 1)[..., 0],
            "texture": np.hypot(*slopes(contrast_HW, 1.5)),
            "around": blurred(halved(step_HW), 4),
        },
        {},
        {"cross": eigenvalues(planes[3], 1)[..., 0], "around": blurred(halved(halved(halved(step_HW))), 4)},
    )


def test_the_cues_agree_with_scipy_and_scikit_image(photograph):
    for found, expected in zip(levels(ImageViews(photograph)), reference_cues(photograph), strict=True):
        for name, expected_HW in expected.items():
            np.testing.assert_allclose(found[name], expected_HW, atol=0.02 * expected_HW.max(), err_msg=name)


def test_the_odds_are_the_weighed_sum_of_the_logarithms_of_the_cues(photograph):
    found_HW = boundary_odds(ImageViews(photograph))
    expected_HW = np.full(found_HW.shape, BIAS)
    for cues, weights in zip(levels(ImageViews(photograph)), WEIGHTS, strict=True):
        assert set(cues) == set(weights)
        for name, weight in weights.items():
            said_HW = weight * np.log(cues[name] + FLOOR)
            zoom = (found_HW.shape[0] / said_HW.shape[0], found_HW.shape[1] / said_HW.shape[1])
            expected_HW += ndimage.zoom(said_HW, zoom, order=1, grid_mode=True, mode="nearest")
    assert np.abs(found_HW - expected_HW).mean() < 0.03  # interpolated level by level, not at once
    odds_HW = np.log(1 / Edge(thin=False).map(ImageViews(photograph))[:, :, 0] - 1)
    np.testing.assert_allclose(-odds_HW, found_HW, atol=1e-3)


def gradients(planes):
    """The central differences of each plane, HW6, 0 across the frame."""
    return np.stack([part_HW for plane_HW in planes for part_HW in slopes(plane_HW, 0)], axis=2).astype(np.float32)


def test_structure_agrees_with_numpy(photograph):
    planes = [plane_HW.astype(np.float32) for plane_HW in np.moveaxis(photograph[:40, :50], 2, 0)]
    gradient_HW6, tensor_3HW, strength_3HW = structure(planes, 1.5)
    expected_HW6 = np.stack([part_HW for plane_HW in planes for part_HW in slopes(plane_HW.astype(float), 1.5)], axis=2)
    np.testing.assert_allclose(gradient_HW6, expected_HW6, atol=1e-3)
    x_HWC, y_HWC = expected_HW6[:, :, ::2], expected_HW6[:, :, 1::2]
    expected_3HW = [(x_HWC**2).sum(2), (y_HWC**2).sum(2), (x_HWC * y_HWC).sum(2)]
    np.testing.assert_allclose(tensor_3HW, expected_3HW, rtol=1e-3, atol=0.05)
    smaller_HW, larger_HW = np.moveaxis(eigenvalues([plane_HW.astype(float) for plane_HW in planes], 1.5), 2, 0)
    np.testing.assert_allclose(strength_3HW[:2], [larger_HW, smaller_HW], atol=0.05)
    np.testing.assert_allclose(strength_3HW[2], np.hypot(x_HWC[:, :, 0], y_HWC[:, :, 0]), atol=0.01)


def test_strength_along_a_line_agrees_with_scipy():
    gradient_HW6 = gradients(np.random.default_rng(0).normal(size=(3, 20, 24)))
    x_HWC, y_HWC = gradient_HW6[:, :, ::2], gradient_HW6[:, :, 1::2]
    tensor_3HW = np.stack([(x_HWC**2).sum(2), (y_HWC**2).sum(2), (x_HWC * y_HWC).sum(2)])
    tensor_3HW = np.stack([cv2.GaussianBlur(part_HW, (0, 0), 2) for part_HW in tensor_3HW])
    weight_K = np.array([1, 0.7, 0.2], np.float32)
    angle_HW = 0.5 * np.arctan2(2 * tensor_3HW[2], tensor_3HW[0] - tensor_3HW[1])
    across = np.cos(angle_HW), np.sin(angle_HW)
    place = np.mgrid[:20, :24]
    total_CHW = 0
    for k in range(-2, 3):
        at = np.rint([place[0] + 2 * k * across[0], place[1] - 2 * k * across[1]])
        part_6HW = [ndimage.map_coordinates(part_HW, at, order=0) for part_HW in np.moveaxis(gradient_HW6, 2, 0)]
        total_CHW += weight_K[abs(k)] * (across[0] * np.array(part_6HW[::2]) + across[1] * np.array(part_6HW[1::2]))
    expected_HW = np.sqrt((total_CHW**2).sum(0)) / (1 + 2 * 0.9)
    found_HW = line_strength(gradient_HW6, tensor_3HW, weight_K=weight_K, step=2.0)
    np.testing.assert_allclose(found_HW[5:-5, 5:-5], expected_HW[5:-5, 5:-5], atol=1e-4)


def test_opposite_steps_along_a_line_cancel_and_equal_ones_do_not():
    even_CHW = np.zeros((3, 32, 32))
    even_CHW[0, :, 16:] = 10
    striped_CHW = even_CHW.copy()
    striped_CHW[0, ::2] = 10 - striped_CHW[0, ::2]  # every second row the other way round
    across_x = np.zeros((3, 32, 32), np.float32)
    across_x[0] = 1
    kept, cancelled = (
        line_strength(gradients(each), across_x, weight_K=np.ones(3, np.float32), step=1.0)[16, 16]
        for each in (even_CHW, striped_CHW)
    )
    assert kept == pytest.approx(5)
    assert cancelled == pytest.approx(1)  # of five steps, three one way and two the other


def test_a_crest_is_no_smaller_than_what_scipy_finds_to_either_side():
    map_HW = cv2.GaussianBlur(np.random.default_rng(0).random((40, 50)).astype(np.float32), (0, 0), 1.5)
    found_HW = crests(map_HW, direction_px=1.0, fine_px=0.5, least=0.5)
    smooth_HW, fine_HW = blurred(map_HW.astype(float), 1), cv2.GaussianBlur(map_HW, (0, 0), 0.5)
    xx_HW, yy_HW = (ndimage.convolve1d(smooth_HW, [1, -2, 1], axis, mode="mirror") for axis in (1, 0))
    xy_HW = ndimage.convolve1d(
        ndimage.convolve1d(smooth_HW, [0.5, 0, -0.5], 0, mode="mirror"), [0.5, 0, -0.5], 1, mode="mirror"
    )
    _, direction_HW22 = np.linalg.eigh(np.stack([[xx_HW, xy_HW], [xy_HW, yy_HW]]).transpose(2, 3, 0, 1))
    place, across = np.mgrid[:40, :50], direction_HW22[..., 0].transpose(2, 0, 1)[::-1]  # of the smallest eigenvalue
    sides = [ndimage.map_coordinates(fine_HW, place + sign * across, order=1, mode="nearest") for sign in (1, -1)]
    expected_HW = np.where((fine_HW >= np.maximum(*sides)) & (fine_HW >= 0.5), fine_HW, 0)
    inner = np.s_[2:-2, 2:-2]
    assert ((found_HW > 0) != (expected_HW > 0))[inner].mean() < 0.005
    both_HW = (found_HW > 0) & (expected_HW > 0)
    np.testing.assert_allclose(found_HW[both_HW], expected_HW[both_HW], atol=1e-6)


def test_a_thinned_map_keeps_whole_lines_that_have_a_sure_place(photograph):
    picture = ImageViews(photograph)
    whole_HW, thin_HW = (Edge(thin=thin).map(picture)[:, :, 0] for thin in (False, True))
    crest_HW = crests(whole_HW, direction_px=1.0, fine_px=0.5, least=LEAST)
    line_HW = measure.label(crest_HW > 0, connectivity=2)
    expected_HW = crest_HW * np.isin(line_HW, np.unique(line_HW[crest_HW >= SURE]))
    np.testing.assert_array_equal(thin_HW, expected_HW)
    assert 0 < (thin_HW > 0).sum() < (crest_HW > 0).sum()


def test_an_even_image_has_no_boundary_and_a_step_in_light_or_colour_has_one_where_it_is():
    image_HWC = np.full((64, 64, 3), 90, np.uint8)
    assert Edge(thin=False).map(ImageViews(image_HWC)).max() < LEAST
    assert Edge().map(ImageViews(image_HWC)).max() == 0
    for right in ((250, 250, 250), (113, 80, 60)):  # the second is about as light
        image_HWC[:, 32:] = right
        found_HW = Edge().map(ImageViews(image_HWC))[4:-4, :, 0]
        assert set(np.nonzero(found_HW)[1]) <= {15, 16}
        assert (found_HW.max(1) > 0.5).all()


def test_the_rim_of_an_object_is_likelier_than_the_texture_of_the_ground(scene):
    found_HW = Edge(stride=1, thin=False).map(ImageViews(scene))[:, :, 0]
    y_HW, x_HW = np.mgrid[:64, :96]
    away_HW = np.hypot(x_HW - 40, y_HW - 30) - 14
    rim, ground = found_HW[abs(away_HW) < 1].mean(), found_HW[away_HW > 8].mean()
    assert rim > 3 * ground


def test_crests_of_a_disc_lie_on_its_rim():
    image_HWC = np.full((96, 96, 3), 60, np.uint8)
    cv2.circle(image_HWC, (48, 48), 30, (200, 180, 40), -1, cv2.LINE_AA)
    crest_HW = Edge().map(ImageViews(image_HWC))[:, :, 0] > 0.5
    y_HW, x_HW = np.mgrid[:48, :48] * 2 + 0.5
    away_HW = np.abs(np.hypot(x_HW - 48, y_HW - 48) - 30)
    assert away_HW[crest_HW].max() <= 3
    turn = np.degrees(np.arctan2(y_HW - 48, x_HW - 48))[crest_HW]
    assert len(np.unique(turn // 10)) == 36  # all the way round
