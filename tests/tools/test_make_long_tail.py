"""The long-tailed table: its profile over the classes, whole tracks, and other tracks in each draw."""

import csv
import io
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.data.packing import make_folder
from tools.make_long_tail import long_tailed, main

TRACKS = {name: [f"{i:03d}" for i in range(count)] for name, count in {"a": 100, "b": 60, "c": 30, "d": 20}.items()}


def test_classes_fall_off_exponentially_by_their_size() -> None:
    kept = long_tailed(TRACKS, most=81, factor=27.0, draw=0)
    assert {name: len(tracks) for name, tracks in kept.items()} == {"a": 81, "b": 27, "c": 9, "d": 3}
    assert all(set(tracks) <= set(TRACKS[name]) for name, tracks in kept.items())
    other = long_tailed(TRACKS, most=81, factor=27.0, draw=1)
    assert all(set(kept[name]) != set(other[name]) for name in kept)
    assert kept == long_tailed(TRACKS, most=81, factor=27.0, draw=0)


def test_no_track_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, counts={"train/a": 24, "train/b": 12, "test/a": 2})
    for path in tmp_path.glob("train/*/*"):  # tracks of three images
        path.rename(path.with_stem(f"{int(path.stem) // 3:05d}_{int(path.stem) % 3}"))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "--most", "6", "--factor", "3", "--val", "1"])
    main()
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    counts = Counter((row["label"], row["split"]) for row in rows)
    assert counts == {("a", "train"): 18, ("b", "train"): 6, ("a", "val"): 3, ("b", "val"): 3, ("a", "test"): 2}
    splits_of = defaultdict(set)
    for row in rows:
        splits_of[row["group"]].add(row["split"])
    assert all(len(splits) == 1 for splits in splits_of.values())
