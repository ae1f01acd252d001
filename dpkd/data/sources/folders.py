"""Reads images in folders: `<split>/<class>/*`, `<class>/*`, `<split>/*`, or all in one folder.

The depth decides. At depth one the layout is `<split>/*` if all folders have names of splits (train, val, test, …),
else `<class>/*`. Images in a class folder called `unlabelled`, or a word for a missing label, have no label. An image
may have `<stem>.mask.png` and `<stem>.expert-<name>.png` in its folder; `<stem>.instances.png`, with a number for each
object, is its mask if it has no other. The folders of operating systems (`@eaDir`, `__MACOSX`, hidden ones) are
ignored.
"""

import re
from collections import Counter

from dpkd.data.settings import FolderSource
from dpkd.data.shards import EXPERT_PREFIX
from dpkd.data.sources.records import Blob, Record, SourceContents, describe_counts, ignored_as, system_folder
from dpkd.data.text import class_of_label, is_image
from dpkd.errors import UserError
from dpkd.io import storage

ROLES = {
    "train": frozenset({"train", "training", "base"}),
    "val": frozenset({"val", "valid", "validation", "dev"}),
    "test": frozenset({"test", "testing", "eval", "novel", "query"}),
}
"""Usual names of splits by their use."""
UNLABELLED = frozenset({"unlabelled", "unlabeled"})
MAP_NAME = re.compile(rf"(.*[^/])\.((?:mask|instances|{EXPERT_PREFIX}[^./]+)\.png)", re.DOTALL)
"""The stem and the ending of a file that belongs to an image."""
MAX_NAMED = 10
"""Number of folders without an image in the log."""


def find_in_folders(source: FolderSource) -> SourceContents:
    """All images below the folder; raises `UserError` for a folder without images and for different depths."""
    if not storage.exists(source.path):
        raise UserError(f"data.source.path={source.path} does not exist: give the folder with the images")
    if storage.is_file(source.path):
        ways = "give a folder of images (unpack an archive first), or a table (.csv, .tsv, .jsonl, .parquet)"
        raise UserError(f"data.source.path={source.path} is a file: {ways}")
    images: dict[str, Blob] = {}
    maps: list[tuple[str, str, Blob]] = []
    ignored: Counter[str] = Counter()
    folders: set[str] = set()
    for name, size in storage.walk(source.path):
        folders.add(name.rpartition("/")[0])
        blob = Blob(storage.join(source.path, name), size=size)
        if not is_image(name) or system_folder(name):
            ignored[ignored_as(name)] += not name.endswith("/")
        elif match := MAP_NAME.fullmatch(name):
            maps.append((match[1], match[2], blob))
        else:
            images[name] = blob
    if not images:
        other_files = f", but {describe_counts(ignored)}" if ignored else ""
        raise UserError(
            f"data.source.path={source.path} has {'masks and ' if maps else ''}no image (.jpg, .png, .webp, .bmp, "
            f".tif){other_files}: give another folder"
        )
    given_of: dict[str, dict[str, Blob]] = {name.rpartition(".")[0]: {} for name in images}
    names, bad = {f"{stem}.{ending}" for stem, ending, _ in maps}, []
    for stem, ending, blob in maps:
        if stem not in given_of:
            bad.append((f"{stem}.{ending}", f"a {ending.removesuffix('.png')} file without its image {stem}.*"))
        elif ending != "instances.png" or f"{stem}.mask.png" not in names:
            given_of[stem]["mask.png" if ending == "instances.png" else ending] = blob
    places, layout = _places(list(images), path=source.path)
    records = [
        Record(name, blob, split=places[name][0], class_name=places[name][1], given=given_of[name.rpartition(".")[0]])
        for name, blob in images.items()
    ]
    parts = {tuple(name.split("/")[:-1]) for name in images}
    above = {"/".join(part[:depth]) for part in parts for depth in range(len(part) + 1)}
    empty = sorted(folder for folder in folders - above if not system_folder(f"{folder}/"))
    if empty:
        layout += f", no image in {', '.join(empty[:MAX_NAMED])}{' …' * (len(empty) > MAX_NAMED)}"
    return SourceContents(tuple(records), bad=tuple(bad), layout=layout, ignored=+ignored)


def _places(images: list[str], *, path: str) -> tuple[dict[str, tuple[str | None, str | None]], str]:
    """(split, class) of every image by the depth of its folders, and a description of the layout."""
    parts_of = {name: name.split("/")[:-1] for name in images}
    by_depth = {min(len(parts), 2): name for name, parts in reversed(parts_of.items())}
    if len(by_depth) > 1:
        examples = " and ".join(by_depth[depth] for depth in sorted(by_depth))
        raise UserError(
            f"data.source.path={path} has images at different depths, such as {examples}: use <split>/<class>/*, "
            "<class>/* (samples without a label in a class folder called `unlabelled`), one folder for all, or a table"
        )
    depth = next(iter(by_depth))
    if depth == 0:
        return dict.fromkeys(images, (None, None)), "all images in one folder, without labels"
    if depth == 1 and all(is_split_name(parts[0]) for parts in parts_of.values()):
        return {name: (parts[0], None) for name, parts in parts_of.items()}, "<split>/*, without labels"
    class_of = {folder: _class(folder) for folder in {parts[depth - 1] for parts in parts_of.values()}}
    unlabelled = ", ".join(sorted(folder for folder, name in class_of.items() if name is None))
    layout = "<class>/*" if depth == 1 else "<split>/<class>/*"
    return {
        name: (parts[0] if depth == 2 else None, class_of[parts[depth - 1]]) for name, parts in parts_of.items()
    }, layout + (f", without a label in {unlabelled}" if unlabelled else "")


def is_split_name(folder: str) -> bool:
    """True for the usual names of splits, with or without a year (`train2017`)."""
    return role_of(folder) is not None


def role_of(folder: str) -> str | None:
    """`train`, `val` or `test` for the usual names of splits, with or without a year; else None."""
    name = re.sub(r"[-_]?(19|20)\d\d$", "", folder.lower())
    return next((role for role, names in ROLES.items() if name in names), None)


def _class(folder: str) -> str | None:
    try:
        return None if folder.lower() in UNLABELLED else class_of_label(folder)
    except ValueError:
        return folder
