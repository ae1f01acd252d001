"""Writes a table of a data set made long-tailed by whole tracks: `train`, the dropped tracks as `val`, and `test`.

    python tools/make_long_tail.py data/gtsrb_dev --factor 50 --draw 0 > gtsrb-0.csv

The folder has train/<class>/<track>_<frame>.<ext> and test/<class>/*. The k-th largest of K classes keeps
`most * factor ** (-k / (K - 1))` tracks, drawn anew by each draw; up to `--val` of the other tracks are for choices.
"""

import argparse
import csv
import hashlib
import sys
from collections import defaultdict
from pathlib import Path


def long_tailed(tracks_of: dict[str, list[str]], *, most: int, factor: float, draw: int) -> dict[str, list[str]]:
    """The tracks of each class in their drawn order, cut to the exponential profile over the classes by size."""
    by_size = sorted(tracks_of, key=lambda name: (-len(tracks_of[name]), name))
    kept = {}
    for rank, name in enumerate(by_size):
        count = max(1, round(most * factor ** (-rank / max(1, len(by_size) - 1))))
        drawn = sorted(tracks_of[name], key=lambda track: hashlib.sha256(f"{draw}/{name}/{track}".encode()).digest())
        kept[name] = drawn[:count]
    return kept


def main() -> None:
    """Writes the table to the standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--factor", type=float, default=50.0, help="largest to smallest class")
    parser.add_argument("--most", type=int, default=68, help="tracks of the largest class")
    parser.add_argument("--val", type=int, default=5, help="most tracks of a class in val")
    parser.add_argument("--draw", type=int, default=0)
    options = parser.parse_args()
    images: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in sorted(options.folder.glob("train/*/*.*")):
        images[path.parent.name, path.stem.split("_")[0]].append(path)
    tracks_of: dict[str, list[str]] = defaultdict(list)
    for name, track in images:
        tracks_of[name].append(track)
    kept = long_tailed(tracks_of, most=options.most, factor=options.factor, draw=options.draw)
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["path", "label", "split", "group"])
    for name, tracks in tracks_of.items():
        dropped = [track for track in tracks if track not in kept[name]]
        splits = dict.fromkeys(dropped[: options.val], "val") | dict.fromkeys(kept[name], "train")
        for track, split in sorted(splits.items()):
            table.writerows([path.resolve(), name, split, f"{name}/{track}"] for path in images[name, track])
    for path in sorted(options.folder.glob("test/*/*.*")):
        table.writerow([path.resolve(), path.parent.name, "test", f"test/{path.stem}"])


if __name__ == "__main__":
    main()
