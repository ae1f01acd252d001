"""What a run was made with: its resolved settings, package versions, and the git commit."""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from dpkd.io import storage
from dpkd.run.folder import RunFolder

PACKAGES = (
    "dpkd",
    "torch",
    "torchvision",
    "timm",
    "deepspeed",
    "ray",
    "webdataset",
    "numpy",
    "opencv-contrib-python-headless",
)


def write_provenance(folder: RunFolder, settings: dict[str, Any]) -> None:
    """Writes `settings.yaml`, every default filled in, and `versions.json`."""
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    storage.write_bytes_atomic(str(folder.path / "settings.yaml"), text.encode())
    installed = {package.metadata["Name"].lower(): package.version for package in metadata.distributions()}
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    versions |= {name: installed.get(name) for name in PACKAGES} | {"git": _git_commit()}
    storage.write_bytes_atomic(str(folder.path / "versions.json"), (json.dumps(versions, indent=1) + "\n").encode())


def _git_commit() -> str | None:
    """The commit that dpkd runs from, with a mark where files differ from it; none outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
