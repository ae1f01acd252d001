"""Prior records, indexes and manifests of any bytes are read or refused, and no declared size is believed."""

import json
import shutil
import zlib
from pathlib import Path

import cv2
import msgpack
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dpkd.data.shards import Dataset
from dpkd.errors import UserError
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.superpixel import Superpixel
from dpkd.priors.codecs import CODECS, MAX_VALUES
from dpkd.priors.record import Record, StoredMap, flat, store
from dpkd.priors.shards import PriorIndex, PriorManifest, PriorMismatch, PriorSet
from dpkd.priors.statistics import Moments
from tests.fuzz.damage import any_bytes, in_child, outcome, unvouched
from tests.prior_cases import draw_images, pack_folder, prepare_all

MAPS = {
    "edge": flat(Edge()),
    "superpixel": store(Superpixel(), np.arange(12, dtype=np.int32).reshape(3, 4, 1)),
    "nibbles": StoredMap("nibbles", (2, 3, 2), 1 / 15, "00" * 8, CODECS["nibbles"].encode(np.full((2, 3, 2), 0.5))),
    "bytes": StoredMap("bytes", (2, 3, 2), 1 / 255, "00" * 8, CODECS["bytes"].encode(np.full((2, 3, 2), 0.5))),
    "absent": StoredMap("absent", (1, 1, 1), 1.0, "00" * 8, b""),
}
RECORD = Record(key="a/b", source=bytes(16), maps=MAPS).to_bytes()
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=9),
    lambda child: st.lists(child, max_size=4) | st.dictionaries(st.text(max_size=3), child, max_size=3),
    max_leaves=8,
)


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
    outcome(lambda: decode_all(data))


@given(st.dictionaries(st.sampled_from(["key", "source", "bad", "maps", "format_version", "x"]), PLAIN, max_size=4))
def test_any_content_under_a_true_checksum_is_a_record_or_refused(changes):
    outcome(lambda: decode_all(sealed(**changes)))


@given(st.sampled_from(sorted(MAPS)), st.integers(0, 4), PLAIN)
def test_any_part_of_a_map_under_a_true_checksum_is_read_or_refused(name, place, value):
    stored = MAPS[name].to_list()
    stored[place] = value
    outcome(lambda: decode_all(sealed(maps={name: stored})))


@given(st.sampled_from(sorted(MAPS)), any_bytes([stored.data for stored in MAPS.values()]))
def test_any_bytes_of_a_map_under_a_true_checksum_are_decoded_or_refused(name, data):
    stored = [*MAPS[name].to_list()[:4], data]
    outcome(lambda: decode_all(sealed(maps={name: stored})))


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("shape", [[2**40, 1, 1], [70_000, 70_000, 9], [-1, -1, 1], [0, 4, 1], [MAX_VALUES + 1, 1, 1]])
def test_a_shape_that_no_map_has_is_refused_before_anything_of_it_is_made(codec, shape):
    with pytest.raises(ValueError, match="is none that dpkd makes"):
        decode_all(sealed(maps={"m": [codec, shape, 1.0, bytes(8), b""]}))


def test_a_map_too_large_to_be_read_is_not_stored():
    with pytest.raises(ValueError, match="the map edge of 1 x 67108865 x 1 values is too large: raise its stride"):
        store(Edge(), np.broadcast_to(np.float32(0.5), (1, MAX_VALUES + 1, 1)))


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
    outcome(lambda: PriorIndex.from_bytes(read))


@given(data=st.data())
def test_any_content_is_an_index_of_a_prior_shard_or_refused(prepared, data):
    content = unvouched(msgpack.unpackb(index_bytes(prepared)))
    content[data.draw(st.sampled_from(sorted(content)))] = data.draw(PLAIN)

    def read() -> None:
        index = PriorIndex.from_bytes(msgpack.packb(content))
        assert len(index.offsets) == len(index.sizes) == index.shard.num_samples
        assert all(isinstance(each, Moments) and each.mean_C.dtype == float for each in index.moments.values())

    outcome(read)


@pytest.mark.parametrize(("column", "value"), [("offsets", -5), ("offsets", 2**62), ("sizes", -1), ("sizes", 2**62)])
def test_an_index_that_points_outside_its_shard_is_refused(prepared, column, value):
    content = unvouched(msgpack.unpackb(index_bytes(prepared)))
    content[column][0] = value
    with pytest.raises(ValueError, match=r"outside|number"):
        PriorIndex.from_bytes(msgpack.packb(content))


@given(data=st.data())
def test_any_bytes_are_a_manifest_of_priors_or_refused(prepared, data):
    read = data.draw(any_bytes([(prepared / "priors/default/priors.json").read_bytes()]))
    try:
        PriorManifest.model_validate_json(read)
    except ValidationError as error:
        assert str(error)  # noqa: PT017 (either outcome is right, the message must be there)


def test_a_prior_shard_is_never_sought_outside_its_folder(prepared, tmp_path):
    shards = Path(shutil.copytree(prepared, tmp_path / "shards"))
    place = shards / "priors/default/priors.json"
    content = unvouched(json.loads(place.read_text()))
    content["splits"]["train"][0]["name"] = "../../../stray.tar"
    place.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no whole prior set"):
        PriorSet.open(str(shards), "default")


def test_a_prior_shard_that_is_shorter_than_it_says_costs_no_memory(prepared, tmp_path):
    shards = Path(shutil.copytree(prepared, tmp_path / "shards"))
    place = shards / "priors/default/train-000000.index.msgpack"
    manifest = shards / "priors/default/priors.json"
    content = unvouched(msgpack.unpackb(place.read_bytes()))
    listed = unvouched(json.loads(manifest.read_text()))
    content["sizes"][0] = 2**50
    content["shard"]["size_bytes"] = listed["splits"]["train"][0]["size_bytes"] = 2**51
    place.write_bytes(msgpack.packb(content))
    manifest.write_text(json.dumps(listed))
    images, maps = Dataset.open(str(shards)).split("train"), PriorSet.open(str(shards), "default").split("train")
    with pytest.raises(PriorMismatch, match=r"train-000000\.tar.*run the prepare stage again"):
        maps.read(0, images.read(0))
