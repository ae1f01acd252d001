"""What stands in a run folder may be damaged in any way: it is read, passed over, or refused by its name."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpkd.engine.state import Writer
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.io.untrusted import MAX_DEPTH, parse_json
from dpkd.report.summary import write_summary
from dpkd.run.folder import RunFolder
from dpkd.train.checkpoint import Checkpoints
from tests.fuzz.damage import any_bytes, outcome

STAGES = json.dumps(
    {"pack": {"status": "done", "seconds": 1.5, "given": {"seed": 1, "data": {"a": [1, None]}}}}
).encode()
BOMBS = st.sampled_from(
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
        b"[1]",
        b"7",
        b'"\\ud800"',
        b"\xff\xfe",
        b"null",
        b'{"pack": 1}',
    ]
)
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@given(data=any_bytes([STAGES]) | BOMBS)
def test_any_bytes_are_a_record_of_stages_or_refused(data, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    (folder.path / "stages.json").write_bytes(data)

    def read() -> None:
        folder.is_done("pack", {"seed": 1})
        folder.refuse_contradiction("pack", folder.stages().get("pack", {"given": {}})["given"])
        with folder.running("pack", {"seed": 2}):
            pass

    told = outcome(read)
    assert told is None or "stages.json" in told


@pytest.mark.parametrize("data", [b"", b'{"teacher": {"few_sh', b"\xff\xfe"])
def test_an_evaluation_that_is_cut_short_is_refused_by_its_name(data, tmp_path):
    (tmp_path / "evaluation.json").write_bytes(data)
    with pytest.raises(UserError, match=r"evaluation\.json cannot be read"):
        write_summary(tmp_path)


def test_folders_and_links_with_odd_names_are_no_checkpoints(tmp_path):
    two_checkpoints(tmp_path)
    for name in ("step-abc", "step-", "step--0000003-a0001", "step-" + "\u0663" * 8 + "-a0001", "attempt-\u0663.json"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009-a0001").symlink_to("/proc")
    assert newest(tmp_path) == (2, 2)


class Value:
    """A part that is one number."""

    value = -1

    def snapshot(self) -> Writer:
        value = str(self.value)

        def write(folder: Path) -> None:
            (folder / "value.txt").write_text(value)

        return write

    def load(self, folder: Path) -> None:
        self.value = int((folder / "value.txt").read_text())


def two_checkpoints(folder: Path) -> Path:
    """Saves steps 1 and 2; returns the manifest of the second."""
    checkpoints, part = Checkpoints(folder, world=ALONE, keep=3), Value()
    checkpoints.load_newest({})
    for step in (1, 2):
        part.value = step
        checkpoints.save(step, {"a": part})
    checkpoints.finish()
    return folder / "step-00000002-a0001" / "manifest.json"


def newest(folder: Path) -> tuple[int, int]:
    """Step and value of the newest checkpoint that loads."""
    part = Value()
    return Checkpoints(folder, world=ALONE, keep=3).load_newest({"a": part}), part.value


@given(data=st.data())
def test_a_manifest_of_any_bytes_leaves_the_checkpoint_before(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    manifest = two_checkpoints(folder)
    manifest.write_bytes(data.draw(any_bytes([manifest.read_bytes()]) | BOMBS))
    assert newest(folder) in ((1, 1), (2, 2))


@given(data=st.data())
def test_a_claim_of_any_bytes_hides_no_checkpoint(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    two_checkpoints(folder)
    newest(folder)
    claim = folder / "attempt-0002.json"
    claim.write_bytes(data.draw(BOMBS | st.binary(max_size=60)))
    assert newest(folder) == (2, 2)


@pytest.mark.parametrize("path", ["../../outside.txt", "/etc/hostname", "a/value.txt\0", "x" * 5_000])
def test_a_manifest_that_names_other_files_brings_nothing_of_them_in(path, tmp_path):
    manifest = two_checkpoints(tmp_path / "checkpoints")
    (tmp_path / "outside.txt").write_text("7")
    content = json.loads(manifest.read_text())
    content["files"][path] = {"size_bytes": 1, "sha256": "0" * 64}
    manifest.write_text(json.dumps(content))
    assert newest(tmp_path / "checkpoints") == (1, 1)


@given(
    st.binary(max_size=40)
    | st.recursive(st.none() | st.floats(), st.lists, max_leaves=9).map(lambda v: json.dumps(v).encode())
)
def test_json_is_read_as_the_standard_library_does_or_refused(data):
    try:
        expected = json.loads(data)
    except ValueError:
        with pytest.raises(ValueError, match=r".+"):
            parse_json(data)
        return
    if outcome(lambda: parse_json(data)) is None:
        assert repr(parse_json(data)) == repr(expected)


def test_json_may_nest_as_deep_as_it_says_and_no_deeper():
    assert parse_json("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH)
    for depth in (MAX_DEPTH + 1, 500, 100_000):
        with pytest.raises(ValueError, match="inside one another"):
            parse_json("[" * depth + "1" + "]" * depth)
