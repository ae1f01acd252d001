"""Weights and networks from elsewhere: no code of theirs runs, and no size of theirs is believed."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkd.errors import UserError
from dpkd.models.network import build_network
from dpkd.models.saved import load_network, save_network
from dpkd.models.settings import ModelSettings, NetworkSpec
from dpkd.models.weights import load_weights
from tests.fuzz.damage import any_bytes, in_child, outcome

FEW = settings(max_examples=max(20, settings.default.max_examples // 3))
SMALL = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2, dtype=torch.float16)}
SPEC = NetworkSpec(
    model=ModelSettings(name="test_resnet"), classes=("a", "b"), image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3
)


def saved_by_torch(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Runs:
    """Pickles as a call of `os.system`."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Linear(torch.nn.Linear):
    """A model whose parts are named as the ones in `SMALL`, and that timm did not make."""

    pretrained_cfg = {"classifier": None}


FILES = {
    "w.safetensors": [safetensors.torch.save(SMALL)],
    "w.pt": [saved_by_torch(SMALL), saved_by_torch({"state_dict": SMALL}), pickle.dumps({"weight": [1, 2]})],
    "old.pt": [saved_by_torch(SMALL, _use_new_zipfile_serialization=False)],
}


@FEW
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_any_bytes_are_weights_or_refused_by_name(name, data, tmp_path_factory):
    place = tmp_path_factory.mktemp("weights") / name
    place.write_bytes(data.draw(any_bytes(FILES[name])))
    told = outcome(lambda: load_weights(Linear(3, 2), str(place)))
    assert told is None or name in told


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.bin"])
def test_weights_that_would_run_code_are_refused_and_run_none(zipped, name, tmp_path):
    mark = tmp_path / "ran"
    evil = {**SMALL, "x": Runs(f"touch {mark}")}
    (tmp_path / name).write_bytes(saved_by_torch(evil, _use_new_zipfile_serialization=zipped))
    with pytest.raises(UserError, match=name):
        load_weights(Linear(3, 2), str(tmp_path / name))
    (tmp_path / name).write_bytes(pickle.dumps(evil))
    with pytest.raises(UserError, match=name):
        load_weights(Linear(3, 2), str(tmp_path / name))
    assert not mark.exists()
    pickle.loads(pickle.dumps(evil["x"]))
    assert mark.exists()  # as it would have, unpickled plainly


def test_weights_that_claim_more_than_their_file_holds_are_refused_with_little_memory(tmp_path):
    spread = {"weight": torch.zeros(1).expand(200_000, 200_000), "bias": torch.zeros(2)}
    (tmp_path / "spread.pt").write_bytes(saved_by_torch(spread))
    plain, packed = io.BytesIO(saved_by_torch({"weight": torch.zeros(1 << 23)})), io.BytesIO()
    with zipfile.ZipFile(plain) as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in whole.infolist():
            archive.writestr(info.filename, whole.read(info))
    (tmp_path / "packed.pt").write_bytes(packed.getvalue())
    head = json.dumps({"weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "claim.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(64))
    (tmp_path / "head.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + head)
    code = """
import sys
from pathlib import Path
import torch
from dpkd.errors import UserError
from dpkd.models.weights import load_weights
torch.set_num_threads(1)
for path in sorted(Path(sys.argv[1]).iterdir()):
    model = torch.nn.Linear(3, 2)
    model.pretrained_cfg = {"classifier": None}
    try:
        load_weights(model, str(path))
    except UserError as error:
        print("refused", error)
"""
    assert in_child(code, str(tmp_path), memory_bytes=8 << 30).count("refused") == 4


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    save_network(folder, SPEC, build_network(SPEC, seed=0).state_dict())
    return folder


@FEW
@given(data=st.data())
def test_any_bytes_are_the_head_of_a_network_or_refused(network_folder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    (folder / "model.safetensors").write_bytes(b"x")  # stops there: what a head builds is timm's affair
    bombs = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"[1]", b"7", b'{"format_version": 1}'])
    (folder / "network.json").write_bytes(
        data.draw(any_bytes([(network_folder / "network.json").read_bytes()]) | bombs)
    )
    told = outcome(lambda: load_network(folder))
    assert told is not None
    assert "network.json" in told


def test_a_model_that_timm_made_still_takes_honest_weights(tmp_path):
    model = timm.create_model("test_resnet", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    other = timm.create_model("test_resnet", num_classes=2)
    load_weights(other, str(tmp_path / "w.pt"))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
