import msgpack
import numpy as np
import pytest
import webdataset

from dpkd.priors.base import ImageViews
from dpkd.priors.catalogue.edge import Edge
from dpkd.priors.catalogue.orientation import Hog
from dpkd.priors.record import Record, flat_map, store_map
from tests.prior_cases import draw_images, pack_folder, prepare_all


def test_a_record_comes_back_as_it_was(scene):
    maps = {"edge": store_map(Edge(), Edge().map(ImageViews(scene))), "hog": flat_map(Hog())}
    record = Record(key="a/b", source=b"0123456789abcdef", maps=maps, bad="why")
    assert Record.from_bytes(record.to_bytes()) == record


def test_no_changed_byte_goes_unseen():
    record = Record(key="k", source=b"0123456789abcdef", maps={"hog": flat_map(Hog())})
    data = bytearray(record.to_bytes())
    for at in range(len(data)):
        for change in (0x01, 0x80, 0xFF):
            data[at] ^= change
            with pytest.raises(ValueError, match=r".+"):
                Record.from_bytes(bytes(data))
            data[at] ^= change
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r".+"):
            Record.from_bytes(bytes(data[:length]))


def test_webdataset_reads_a_prior_shard(tmp_path):
    dataset = pack_folder(draw_images(tmp_path / "images"), tmp_path / "shards")
    prepare_all(dataset)
    tar = tmp_path / "shards/priors/default/train-000000.tar"
    decode = webdataset.handle_extension("msgpack", msgpack.unpackb)  # webdataset 1.0 knows it as "mp" alone
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False).decode(decode))
    assert [sample["__key__"] for sample in samples] == dataset.split("train").keys[:5]
    edge = samples[0]["priors.msgpack"]["maps"]["edge"]
    codec, shape, scale, *_ = edge
    assert codec == "nibbles"
    assert shape == [20, 16, 1]
    assert np.isclose(scale, 1 / 15)
