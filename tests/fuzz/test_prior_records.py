"""Prior records, indexes and manifests of any bytes are read or refused, and no declared size is believed."""

import zlib
from pathlib import Path

import cv2
import msgpack
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.regions import Superpixel
from dpkd.priors.codecs import CODECS, MAX_VALUES
from dpkd.priors.record import Record, StoredMap, flat_map, store_map
from dpkd.priors.store import PriorIndex
from tests.fuzz.damage import any_bytes, in_child, outcome
from tests.prior_cases import draw_images, pack_folder, prepare_all

MAPS = {
    "edge": flat_map(Edge()),
    "superpixel": store_map(Superpixel(), np.arange(12, dtype=np.int32).reshape(3, 4, 1)),
    "nibbles": StoredMap("nibbles", (2, 3, 2), 1 / 15, bytes(8), CODECS["nibbles"].encode(np.full((2, 3, 2), 0.5))),
    "bytes": StoredMap("bytes", (2, 3, 2), 1 / 255, bytes(8), CODECS["bytes"].encode(np.full((2, 3, 2), 0.5))),
    "absent": StoredMap("absent", (1, 1, 1), 1.0, bytes(8), b""),
}
RECORD = Record(key="a/b", source=bytes(16), maps=MAPS).to_bytes()


def sealed(**changes) -> bytes:
    """A record with a true checksum, whatever it holds."""
    content = msgpack.unpackb(RECORD)
    content.pop("checksum")
    content |= changes
    return msgpack.packb({**content, "checksum": zlib.crc32(msgpack.packb(content))})


def decode_all(data: bytes) -> None:
    record = Record.from_bytes(data)
    for stored in record.maps.values():
        decoded = stored.decode()
        assert decoded.shape == stored.shape
        assert decoded.dtype in (np.float32, np.int32)


@given(any_bytes([RECORD]))
def test_any_bytes_are_a_record_or_refused(data):
    assert (outcome(lambda: decode_all(data)) is None) == (data == RECORD)


@given(st.sampled_from(sorted(MAPS)), any_bytes([stored.data for stored in MAPS.values()]))
def test_any_bytes_of_a_map_under_a_true_checksum_are_decoded_or_refused(name, data):
    stored = [*MAPS[name][:4], data]
    told = outcome(lambda: decode_all(sealed(maps={name: stored})))
    assert told is None or data != MAPS[name].data


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("shape", [[2**40, 1, 1], [70_000, 70_000, 9], [-1, -1, 1], [0, 4, 1], [MAX_VALUES + 1, 1, 1]])
def test_a_shape_that_no_map_has_is_refused_before_anything_of_it_is_made(codec, shape):
    with pytest.raises(ValueError, match="is outside the limits of dpkd"):
        decode_all(sealed(maps={"m": [codec, shape, 1.0, bytes(8), b""]}))


def test_a_map_too_large_to_be_read_is_not_stored():
    with pytest.raises(ValueError, match="the map edge of 1 x 67108865 x 1 values is too large: increase its stride"):
        store_map(Edge(), np.broadcast_to(np.float32(0.5), (1, MAX_VALUES + 1, 1)))


def test_bombs_in_a_map_are_refused_with_little_memory(tmp_path):
    zeros = zstandard.ZstdCompressor(write_content_size=True)
    bombs = {"zstd": ["bytes", [2, 3, 2], 1.0, bytes(8), zeros.compress(bytes(1 << 30))]}
    chunked = zeros.compressobj()  # no size in its header
    data = b"".join([*(chunked.compress(bytes(1 << 24)) for _ in range(64)), chunked.flush()])
    bombs["zstd without its size"] = ["nibbles", [2, 3, 2], 1.0, bytes(8), data]
    jpeg = bytearray(CODECS["jpeg"].encode(np.full((2, 3, 1), 0.5, np.float32)))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = (60_000).to_bytes(2, "big") + (60_000).to_bytes(2, "big")
    bombs["jpeg"] = ["jpeg", [2, 3, 1], 1.0, bytes(8), bytes(jpeg)]
    png = cv2.imencode(".png", np.zeros((9_000, 9_000), np.uint8))[1].tobytes()
    bombs["png"] = ["labels", [2, 3, 1], 1.0, bytes(8), png]
    for name, stored in bombs.items():
        (tmp_path / name).write_bytes(sealed(maps={"m": stored}))
    code = """
import sys
from pathlib import Path
from dpkd.priors.record import Record
for path in Path(sys.argv[1]).iterdir():
    try:
        Record.from_bytes(path.read_bytes()).maps["m"].decode()
    except ValueError as error:
        print(path.name, "refused:", error)
"""
    assert in_child(code, str(tmp_path), memory_bytes=3 << 30).count("refused") == len(bombs)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    dataset = pack_folder(draw_images(folder / "images"), folder / "shards")
    prepare_all(dataset, priors=(Edge(),))
    return folder / "shards"


def index_bytes(prepared: Path) -> bytes:
    return (prepared / "priors/default/train-000000.index.msgpack").read_bytes()


@given(data=st.data())
def test_any_bytes_are_an_index_of_a_prior_shard_or_refused(prepared, data):
    read = data.draw(any_bytes([index_bytes(prepared)]))
    assert (outcome(lambda: PriorIndex.from_bytes(read)) is None) == (read == index_bytes(prepared))
