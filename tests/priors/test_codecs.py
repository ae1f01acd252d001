import numpy as np
import pytest

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.codecs import CODECS, LABELS, NIBBLES, JpegCodec
from dpkd.priors.record import StoredMap


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (10, 10, 9)])
def test_nibbles_are_off_by_at_most_half_a_step(shape):
    map_HWC = np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)
    back_HWC = NIBBLES.decode(NIBBLES.encode(map_HWC), shape)
    assert back_HWC.dtype == np.float32
    assert np.abs(back_HWC - map_HWC).max() <= 1 / 30 + 1e-6


def test_jpeg_keeps_a_smooth_map_within_a_few_hundredths_and_channels_apart(scene):
    edge = Edge(thin=False, stride=4)
    map_HWC = np.concatenate([edge.map(ImageViews(scene)), 1 - edge.map(ImageViews(255 - scene))], axis=2)
    back_HWC = JpegCodec().decode(JpegCodec().encode(map_HWC), (16, 24, 2))
    assert np.abs(back_HWC - map_HWC).mean() < 0.02
    assert np.abs(back_HWC - map_HWC).max() < 0.15


@pytest.mark.parametrize("largest", [0, 255, 256, 65535])
def test_labels_come_back_exactly(largest):
    map_HWC = np.random.default_rng(0).integers(0, largest + 1, (9, 11, 1)).astype(np.int32)
    map_HWC[0, 0] = largest
    back_HWC = LABELS.decode(LABELS.encode(map_HWC), (9, 11, 1))
    assert back_HWC.dtype == np.int32
    np.testing.assert_array_equal(back_HWC, map_HWC)


@pytest.mark.parametrize("name", [name for name in CODECS if name != "absent"])
def test_bytes_of_another_shape_cut_short_or_of_another_kind_are_refused(name):
    map_HWC = np.zeros((6, 8, 2), np.int32 if name == "labels" else np.float32)
    data = CODECS[name].encode(map_HWC)
    for wrong, shape in [(data, (8, 8, 2)), (b"", (6, 8, 2)), (b"no such data", (6, 8, 2)), (data[:9], (6, 8, 2))]:
        with pytest.raises(ValueError, match=r".+"):
            StoredMap(codec=name, shape=shape, scale=1.0, fingerprint=b"", data=wrong).decode()
