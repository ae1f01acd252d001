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


def write_settings(folder: RunFolder, tree: dict[str, Any]) -> None:
    """Writes the settings, every default filled in, as `settings.yaml`."""
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    storage.write_bytes_atomic(str(folder.path / "settings.yaml"), text.encode())


def write_versions(folder: RunFolder) -> None:
    """Writes `versions.json`."""
    versions: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    versions |= {name: _version(name) for name in PACKAGES}
    versions["git"] = _git_commit()
    storage.write_bytes_atomic(str(folder.path / "versions.json"), (json.dumps(versions, indent=1) + "\n").encode())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit that dpkd runs from, with a mark where files differ from it; none outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
