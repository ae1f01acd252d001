"""Images in folders: `<split>/<class>/*`, `<class>/*`, `<split>/*`, or all in one.

The depth tells which; one folder deep is `<split>/*` when all folders have a split's name (train, val, test, …), and
`<class>/*` otherwise. A class folder called `unlabelled` holds samples without a label. Beside an image may stand
`<stem>.mask.png` and `<stem>.expert-<name>.png`; `<stem>.instances.png` stays out.
"""

import re
from collections import defaultdict

from dpkd.data.settings import FolderSource
from dpkd.data.shards import EXPERT_PREFIX
from dpkd.data.sources.records import Blob, Found, Record, is_image
from dpkd.errors import UserError
from dpkd.io import storage

SPLIT_NAMES = frozenset(
    {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "base", "novel", "query"}
)
UNLABELLED = frozenset({"unlabelled", "unlabeled"})


def find_in_folders(source: FolderSource) -> Found:
    """All images below the folder; raises `UserError` where there are none or their depths differ."""
    if not storage.exists(source.path):
        raise UserError(f"data.source.path={source.path} does not exist: give the folder that holds the images")
    size_of = {name: size for name, size in storage.walk(source.path) if is_image(name)}
    if not size_of:
        raise UserError(
            f"data.source.path={source.path} holds no image (.jpg, .png, .webp, .bmp, .tif): give another folder"
        )
    stems = {name.rpartition(".")[0] for name in size_of if not _note(name)}
    notes: dict[str, dict[str, str]] = defaultdict(dict)
    bad = []
    for name in filter(_note, size_of):
        owner, _, word = name.rpartition(".")[0].rpartition(".")
        if owner in stems:
            notes[owner][word] = name
        else:
            bad.append((name, f"a {word} file without its image {owner}.*"))
    images = [name for name in size_of if not _note(name)]
    if not images:
        raise UserError(f"data.source.path={source.path} holds masks and no image: give another folder")
    places = _places(images, path=source.path)

    def blob(name: str) -> Blob:
        return Blob(storage.join(source.path, name), size=size_of[name])

    def record(name: str) -> Record:
        split, class_name = places[name]
        words = notes.get(name.rpartition(".")[0], {})
        return Record(
            name=name,
            image=blob(name),
            class_name=class_name,
            split=split,
            mask=blob(words["mask"]) if "mask" in words else None,
            experts=tuple(
                (word.removeprefix(EXPERT_PREFIX), blob(words[word]))
                for word in sorted(words)
                if word.startswith(EXPERT_PREFIX)
            ),
        )

    return Found(records=tuple(record(name) for name in images), bad=tuple(bad))


def _note(name: str) -> bool:
    """True for files that say something of the image beside them and are no sample."""
    return re.search(rf"[^/]\.(mask|instances|{EXPERT_PREFIX}[^./]+)\.png$", name) is not None


def _places(images: list[str], *, path: str) -> dict[str, tuple[str | None, str | None]]:
    """(split, class) of every image, by the depth of its folders."""
    parts_of = {name: name.split("/")[:-1] for name in images}
    by_depth = {min(len(parts), 2): name for name, parts in reversed(parts_of.items())}
    if len(by_depth) > 1:
        examples = " and ".join(by_depth[depth] for depth in sorted(by_depth))
        raise UserError(
            f"data.source.path={path} holds images at different depths, such as {examples}: use <split>/<class>/*, "
            "<class>/* (samples without a label in a class folder called `unlabelled`), one folder for all, or a table"
        )
    depth = next(iter(by_depth))
    only_splits = {parts[0].lower() for parts in parts_of.values() if parts} <= SPLIT_NAMES
    if depth == 0:
        return dict.fromkeys(images, (None, None))
    if depth == 1 and only_splits:
        return {name: (parts[0], None) for name, parts in parts_of.items()}
    if depth == 1:
        return {name: (None, _class(parts[0])) for name, parts in parts_of.items()}
    return {name: (parts[0], _class(parts[1])) for name, parts in parts_of.items()}


def _class(folder: str) -> str | None:
    return None if folder.lower() in UNLABELLED else folder
