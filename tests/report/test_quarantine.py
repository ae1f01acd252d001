import json

import pytest

from dpkd.errors import UserError
from dpkd.report.quarantine import Quarantine


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
    assert (quarantine.count, quarantine.count_of("prepare")) == (1, 1)
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
