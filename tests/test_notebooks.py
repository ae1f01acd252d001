"""The notebooks of the docs run from their first cell to their last, in an empty folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "made"), [("start", "nearest.png"), ("own_prior", "maps.png")])
def test_a_notebook_runs_whole(name: str, made: str, tmp_path: Path) -> None:
    cells = json.loads((ROOT / "docs/notebooks" / f"{name}.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}."}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / made).is_file()
    assert not any(cell["outputs"] for cell in cells if cell["cell_type"] == "code")
