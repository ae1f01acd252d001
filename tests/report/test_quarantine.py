import json

import pytest

from dpkd.errors import UserError
from dpkd.report.quarantine import NUM_SHOWN, Quarantine


def test_an_item_is_reported_once_also_by_a_later_process(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    for _ in range(2):
        quarantine = Quarantine(path, limit=0.1)
        quarantine.add("pack", "a.jpg", "the file is empty")
    quarantine.add("prepare", "a.jpg", "too small")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["pack", "prepare"]
    assert lines[0] == {"stage": "pack", "item": "a.jpg", "reason": "the file is empty"}


def test_a_stage_that_begins_again_forgets_only_its_own(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", limit=0.1)
    quarantine.add("pack", "a", "x")
    quarantine.add("prepare", "b", "y")
    quarantine.begin("pack")
    assert (quarantine.count, quarantine.counts) == (1, {"prepare": 1})
    assert Quarantine(tmp_path / "q.jsonl", limit=0.1).count == 1


def test_the_limit_stops_the_run_and_names_items_file_and_setting(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", limit=0.01)
    quarantine.add("pack", "a.jpg", "the file is empty")
    quarantine.check(100)
    quarantine.add("pack", "b.jpg", "the jpg is cut short")
    with pytest.raises(UserError, match=r"2 of 100 .*data.bad_limit=0.01.*a.jpg: the file is empty.*q.jsonl"):
        quarantine.check(100)


def test_a_line_cut_by_a_kill_does_not_harm(tmp_path):
    path = tmp_path / "q.jsonl"
    Quarantine(path, limit=0.1).add("pack", "a", "x")
    path.write_text(path.read_text() + '{"stage": "pa')
    quarantine = Quarantine(path, limit=0.1)
    quarantine.add("pack", "b", "y")
    assert Quarantine(path, limit=0.1).count == 2


def test_a_note_is_kept_and_not_counted(tmp_path):
    path = tmp_path / "q.jsonl"
    for _ in range(2):
        quarantine = Quarantine(path, limit=0)
        quarantine.add("prepare", "train-000000.tar", "it is cut short", counted=False)
        quarantine.check(10)
    (line,) = map(json.loads, path.read_text().splitlines())
    assert line == {"stage": "prepare", "item": "train-000000.tar", "reason": "it is cut short", "counted": False}
    quarantine.add("prepare", "train-000000.tar/a", "the shard is cut short")
    quarantine.add("pack", "b", "x")
    for each in (quarantine, Quarantine(path, limit=0)):
        assert (each.count, each.counts) == (2, {"prepare": 1, "pack": 1})
    quarantine.begin("prepare")
    assert (quarantine.count, len(path.read_text().splitlines())) == (1, 1)


def test_the_table_names_the_first_items_and_counts_the_rest(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", limit=1)
    assert quarantine.markdown() == "Nothing was quarantined."
    for i in range(NUM_SHOWN + 3):
        quarantine.add("pack", f"{i}.jpg", "a|b")
    lines = quarantine.markdown().splitlines()
    assert lines[2] == "| pack | 0.jpg | a/b |"
    assert len([line for line in lines if line.startswith("| pack")]) == NUM_SHOWN
    assert lines[-1].startswith("… and 3 more")
