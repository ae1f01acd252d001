"""A prior that another package brings: the package is written into a folder, as pip would leave it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.prior_cases import draw_images

WARMTH = '''
from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from dpkd.priors.codecs import JpegCodec


class Warmth(BaseModel):
    """How much redder than blue each eighth pixel is."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["warmth"] = "warmth"
    gain: float = 1.0
    name: ClassVar[str] = "warmth"
    version: ClassVar[int] = 1
    channels: ClassVar[int] = 1
    nearest: ClassVar[bool] = False
    codec: ClassVar[JpegCodec] = JpegCodec()

    def map(self, picture):
        rgb_HWC = picture.rgb_HWC[::8, ::8].astype(np.float32) / 255
        return np.clip(0.5 + self.gain * (rgb_HWC[:, :, :1] - rgb_HWC[:, :, 2:]) / 2, 0, 1)

    def flip(self, map_HWC):
        return np.ascontiguousarray(map_HWC[:, ::-1])
'''

PREPARE = """
import sys
from pathlib import Path
from dpkd.priors.store import PriorSet
from dpkd.settings import parse_settings
from tests.prior_cases import pack_folder, prepare_all
tree = {"prepare": {"priors": [{"kind": "edge"}, {"kind": "warmth", "gain": 0.5}]}, "data": {"source": "x"},
        "distill": {"students": {"s": {"model": "resnet18", "objectives": [{"kind": "supervised"}]}}}}
settings = parse_settings(tree, origin="test")
dataset = pack_folder(Path(sys.argv[1]), sys.argv[2])
prepare_all(dataset, priors=settings.prepare.priors)
split = dataset.split("train")
maps = PriorSet.open(dataset.url, "default").split("train").read(0, split.read(0))
print({name: map_HWC.shape for name, map_HWC in maps.items()})
"""


def install(folder: Path, *, code: str = WARMTH, target: str = "warm:Warmth") -> Path:
    """The package `warm-priors` with its entry point."""
    info = folder / "warm_priors-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "warm.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: warm-priors\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dpkd.priors]\nwarmth = {target}\n")
    return folder


def run(code: str, *arguments: str, packages: Path) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[2]
    environment = {"PYTHONPATH": f"{packages}:{root}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)


def test_a_prior_of_an_installed_package_is_prepared_by_its_kind(tmp_path):
    packages = install(tmp_path / "packages")
    images = draw_images(tmp_path / "images")
    done = run(PREPARE, str(images), str(tmp_path / "shards"), packages=packages)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "{'edge': (20, 16, 1), 'warmth': (5, 4, 1)}"


BATCHED = WARMTH.replace(
    "    def flip",
    """    batch_size: int = 4
    device: ClassVar[str] = "accelerator"

    def sealed(self):
        return self

    def identity(self):
        return self.model_dump_json(exclude={"batch_size"})

    def maps(self, pictures, *, device):
        assert len(pictures) <= 4
        return [1 - self.map(picture) for picture in pictures]

    def flip""",
)


def test_a_prior_of_an_installed_package_may_take_images_in_batches(tmp_path):
    images = draw_images(tmp_path / "images")
    shown = PREPARE.replace("{name: map_HWC.shape for name, map_HWC in maps.items()}", "maps['warmth'].mean().round(2)")
    means = []
    for name, code in (("one", WARMTH), ("many", BATCHED)):
        packages = install(tmp_path / name, code=code)
        done = run(shown, str(images), str(tmp_path / f"shards-{name}"), packages=packages)
        assert done.returncode == 0, done.stderr
        means.append(float(done.stdout.splitlines()[-1]))
    assert means[1] == pytest.approx(1 - means[0], abs=0.02)


@pytest.mark.parametrize(
    ("code", "target", "words"),
    [
        (WARMTH, "warm:Cold", ["'warmth' of warm-priors", "cannot be imported", "Cold", "uninstall"]),
        ("import no_such_package", "warm:Warmth", ["warm-priors", "no_such_package"]),
        (WARMTH.replace("def flip", "def turn"), "warm:Warmth", ["warm-priors", "lacks flip"]),
        (WARMTH.replace("frozen=True, ", ""), "warm:Warmth", ["is not frozen"]),
        (WARMTH.replace('"warmth"', '"edge"'), "warm:Warmth", ["the kind 'edge' is dpkd's already"]),
        (BATCHED.replace("def sealed", "def seal"), "warm:Warmth", ["warm-priors", "lacks sealed"]),
        ("Warmth = 3", "warm:Warmth", ["no pydantic model"]),
    ],
)
def test_a_package_that_is_wrong_is_named_with_what_is_wrong(tmp_path, code, target, words):
    done = run("import dpkd.priors", packages=install(tmp_path, code=code, target=target))
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last_line
