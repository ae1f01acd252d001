"""Images that the tests of the priors share."""

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from skimage import data


@pytest.fixture(scope="session")
def photograph() -> npt.NDArray[np.uint8]:
    """A photograph, 256 x 192 px: an astronaut, which scikit-image brings along (NASA, public domain)."""
    return np.ascontiguousarray(data.astronaut()[:384:2, :512:2])


@pytest.fixture(scope="session")
def scene() -> npt.NDArray[np.uint8]:
    """A drawn scene, 96 x 64 px: textured ground, a disc and a bar of other colours, uneven light; always the same."""
    random = np.random.default_rng(0)
    ground_HWC = cv2.GaussianBlur(random.uniform(60, 160, (64, 96, 3)).astype(np.float32), (0, 0), 2)
    ground_HWC += np.linspace(-20, 20, 96, dtype=np.float32)[None, :, None]
    cv2.circle(ground_HWC, (40, 30), 14, (220, 60, 50), -1, cv2.LINE_AA)
    cv2.rectangle(ground_HWC, (62, 20), (72, 55), (40, 90, 200), -1)
    return np.clip(ground_HWC + random.normal(0, 3, ground_HWC.shape), 0, 255).astype(np.uint8)
