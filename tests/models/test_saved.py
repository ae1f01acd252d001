"""Networks on disk: what was saved comes back, and nothing damaged is loaded."""

import pytest
import torch

from dpkd.errors import StorageError, UserError
from dpkd.io.record import checked, parse_checked
from dpkd.models.network import build_network
from dpkd.models.saved import load_network, save_network
from dpkd.models.settings import FigureGroundPooling, ModelSettings, NetworkSpec
from tests.heads import heads

SPEC = NetworkSpec(
    model=ModelSettings(name="test_resnet", pooling=FigureGroundPooling(floor=0.1)),
    classes=("a", "b"),
    image_size=32,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.2, 0.3),
    heads=heads({"edge": 1}, teacher_dim=9),
)


@pytest.fixture
def saved(tmp_path):
    network = build_network(SPEC, seed=3)
    network(torch.randn(4, 3, 32, 32), torch.rand(4, 1, 8, 8))  # moves the running statistics
    save_network(tmp_path / "teacher", SPEC, network.state_dict())
    return tmp_path / "teacher", network


def test_a_saved_network_comes_back_bit_for_bit(saved):
    folder, network = saved
    loaded = load_network(folder)
    assert loaded.spec == SPEC
    assert not loaded.training
    state = network.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_loading_needs_no_file_that_training_started_from(tmp_path):
    network = build_network(SPEC, seed=0)
    started = SPEC.model_copy(
        update={"model": SPEC.model.model_copy(update={"weights": "/gone.pt", "pretrained": True})}
    )
    save_network(tmp_path, started, network.state_dict())
    assert load_network(tmp_path).spec == started


def test_loading_draws_nothing_from_the_callers_generator(saved):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    load_network(saved[0])
    assert torch.equal(torch.rand(1), expected)


def test_a_flipped_bit_is_refused(saved):
    weights = saved[0] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        load_network(saved[0])


def test_a_truncated_file_is_refused(saved):
    weights = saved[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_network(saved[0])


@pytest.mark.parametrize("name", ["model.safetensors", "network.json"])
def test_a_missing_file_is_named(saved, name):
    (saved[0] / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_network(saved[0])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format_version": 1}', '{"format_version": 1, "spec": 3}'])
def test_a_broken_description_is_refused(saved, text):
    (saved[0] / "network.json").write_text(text)
    with pytest.raises(UserError, match=r"network\.json is damaged"):
        load_network(saved[0])


def test_another_format_is_refused_with_both_versions(saved):
    path = saved[0] / "network.json"
    path.write_bytes(checked({**parse_checked(path.read_bytes()), "format_version": 9}))
    with pytest.raises(UserError, match="is 9, and this dpkd reads 1"):
        load_network(saved[0])


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    other = SPEC.model_copy(update={"heads": heads({"hog": 9})})
    save_network(tmp_path, SPEC, build_network(other, seed=0).state_dict())
    with pytest.raises(UserError, match=r"heads\.prior/edge"):
        load_network(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        save_network(tmp_path / "file" / "teacher", SPEC, build_network(SPEC, seed=0).state_dict())


def test_a_description_changed_since_it_was_written_is_refused(saved):
    path = saved[0] / "network.json"
    path.write_text(path.read_text().replace("0.1", "0.4", 1))
    with pytest.raises(UserError, match=r"network\.json is damaged .*its checksum is wrong"):
        load_network(saved[0])
