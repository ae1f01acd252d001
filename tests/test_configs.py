"""The shipped settings: all of them are valid, and name networks that can be built."""

from pathlib import Path

import pytest
import torch

from dpkd.models.network import build_network
from dpkd.models.settings import ModelSettings, NetworkSpec
from dpkd.settings import Settings, load_settings

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


def networks(settings: Settings) -> dict[str, ModelSettings]:
    """The teacher and the students by name."""
    return {"teacher": settings.teachers["teacher"].model, **{n: s.model for n, s in settings.distill.students.items()}}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_valid_and_its_networks_run(config: Path) -> None:
    settings = load_settings(config, [])
    size = settings.data.image_size
    for name, model in networks(settings).items():
        spec = NetworkSpec(model=model, classes=("a", "b"), image_size=size, mean=(0.5,) * 3, std=(0.2,) * 3)
        with torch.no_grad():
            outputs = build_network(spec, seed=0).eval()(torch.zeros(1, 3, size, size), torch.ones(1, 1, size, size))
        assert min(outputs["patch"].shape[2:]) >= 4, f"{name}: too few patches for maps to say where"
        assert outputs["logits"].shape == (1, 2)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_opens_with_command_hardware_and_time(config: Path) -> None:
    head = [line for line in config.read_text().splitlines() if line.startswith("#")]
    for word in ("Command", "Hardware", "Time"):
        assert any(line.startswith(f"# {word}") for line in head), f"{config.name}: no line `# {word}` at its head"
