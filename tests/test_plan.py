"""Which stages are left to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

from dpkd.run.folder import RunFolder
from dpkd.stages.plan import POOL_STAGES, left_to_do, stage_inputs, stages_of
from tests.runs import settings_of, tiny


def test_of_what_is_done_only_packing_or_preparing_asked_for_alone_is_left(tmp_path: Path) -> None:
    settings, folder = settings_of(tiny(tmp_path / "run", source=tmp_path)), RunFolder(tmp_path / "run")
    folder.path.mkdir()
    every = stages_of(settings)
    assert left_to_do(folder, settings, every) == every
    for stage in every:
        with folder.running(stage, stage_inputs(stage, settings)):
            pass
    for stages in (every, POOL_STAGES, ["teach"], ["evaluate"]):
        assert left_to_do(folder, settings, stages) == []
    for stage in POOL_STAGES:
        assert left_to_do(folder, settings, [stage]) == [stage]


_COUNTS_READS = """
import collections, json, sys
import json
import os
import subprocess
import sys
from pathlib import Path

reads = collections.Counter()
sys.addaudithook(lambda event, found: reads.update([str(found[0])]) if event == "open" else None)
from dpkd.stages.driver import run
from dpkd.settings import load_settings

run(load_settings(sys.argv[1], []))
networks = [str(path) for path in Path(sys.argv[2]).glob("*/*/model.safetensors")]
print(json.dumps({name: reads[name] for name in networks}))
"""


def test_a_start_reads_each_finished_network_once(whole: RunFolder) -> None:
    command = [sys.executable, "-c", _COUNTS_READS, str(whole.path.with_suffix(".yaml")), str(whole.path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "nothing to do" in done.stdout
    reads = json.loads(done.stdout.splitlines()[-1])
    assert len(reads) == 6  # a teacher, two students, a baseline, two exports
    assert set(reads.values()) == {1}
