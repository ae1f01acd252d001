"""Which stages are left to do."""

from pathlib import Path

from dpkd.run.folder import RunFolder
from dpkd.stages.plan import POOL_STAGES, STAGES, left_to_do, stage_inputs
from tests.runs import settings_of, tiny


def test_of_what_is_done_only_packing_or_preparing_asked_for_alone_is_left(tmp_path: Path) -> None:
    settings, folder = settings_of(tiny(tmp_path / "run", source=tmp_path)), RunFolder(tmp_path / "run")
    folder.path.mkdir()
    assert left_to_do(folder, settings, STAGES) == list(STAGES)
    for stage in STAGES:
        with folder.running(stage, stage_inputs(stage, settings)):
            pass
    for stages in (STAGES, POOL_STAGES, ["teach"], ["evaluate"]):
        assert left_to_do(folder, settings, stages) == []
    for stage in POOL_STAGES:
        assert left_to_do(folder, settings, [stage]) == [stage]
