"""The command line: what its verbs load, and where its lines go."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dpkd.log import logger, show
from tests.data.packing import make_folder
from tests.runs import tiny

SCRIPT = """
import sys
from dpkd import cli
try:
    code = cli.main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(code, "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("verb", ["--help", "plan", "pack"])
def test_a_verb_that_builds_no_network_loads_no_torch(verb: str, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images", counts={"base/a": 3, "base/b": 3, "val/a": 3, "novel/c": 3})
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(tiny(tmp_path / "run", source=source)))
    options = [] if verb == "--help" else ["--config", str(config)]
    command = [sys.executable, "-c", SCRIPT, verb, *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stderr == "0 False\n", ended.stdout


def test_characters_that_the_output_lacks_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    logger.info("dpkd · Zürich")
    show("≥ 3")
    assert written.getvalue() == b"dpkd \\xb7 Z\\xfcrich\n\\u2265 3\n"
