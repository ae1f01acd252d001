"""Reads existing WebDataset tars as a source.

Each tar is listed separately, so the last sample of a truncated tar never includes members of the next tar. That sample
and the tar are reported as bad, because members may be missing. A data set packed by dpkd keeps its classes and their
order.

    <key>.jpg|png|…     the image        <key>.json    {"label": 3, "class_name", "group", "attributes"}, all optional
    <key>.mask.png      the mask         <key>.cls     the label as text, if the json has none
    <key>.expert-<name>.png              other members are counted and left out
"""

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Any

from braceexpand import braceexpand

from dpkd.data.image_headers import BrokenImage
from dpkd.data.settings import ShardSource
from dpkd.data.shards import MANIFEST_NAME, Dataset, is_given
from dpkd.data.sources.folders import is_split_name
from dpkd.data.sources.records import Blob, Record, SourceContents, ignored_as, refuse_no_file, system_folder
from dpkd.data.tars import Member, list_members
from dpkd.data.text import IMAGE_SUFFIXES, cell_name, class_of_label, decode_text
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE, read_errors
from dpkd.io.record import parse_json
from dpkd.launch.pool import Pool

COMPRESSED = (".tar.gz", ".tgz", ".tar.zst")
MAX_TEXT_BYTES = 1 << 20
"""Longer label members are refused."""

Tar = tuple[str, str]
"""URL of a tar, and its path relative to the source."""


def find_in_archives(source: ShardSource, *, pool: Pool) -> SourceContents:
    """All samples of the tars; raises `UserError` for a source without tars."""
    tars, classes = _tars(source.path)
    listed = dict(pool.map(partial(_list_tar, classes=classes), tars))
    contents = [listed[number] for number in range(len(tars))]
    records = [record for content in contents for record in content.records]
    if len({record.name.rpartition(".")[0] for record in records}) < len(records):
        # two tars have the same key for different samples
        records = [
            replace(record, name=f"{name.removesuffix('.tar')}/{record.name}")
            for (_, name), content in zip(tars, contents, strict=True)
            for record in content.records
        ]
    return SourceContents(
        records=tuple(records),
        bad=tuple(item for content in contents for item in content.bad),
        classes=classes,
        shuffled=True,
        ignored=sum((Counter(content.ignored) for content in contents), Counter()),
    )


def _tars(path: str) -> tuple[list[Tar], tuple[str, ...] | None]:
    """The tars of a folder or pattern, in order, and the classes if the folder is a data set of dpkd."""
    if storage.exists(storage.join(path, MANIFEST_NAME)):
        manifest = Dataset.open(path).manifest
        names = [shard.name for split in manifest.splits.values() for shard in split.shards]
        return [(storage.join(path, name), name) for name in names], manifest.classes
    if any(sign in path for sign in "{*?[") or path.endswith((".tar", *COMPRESSED)):
        try:
            patterns = list(braceexpand(path))
        except ValueError as error:
            raise UserError(f"data.source.path={path}: {error}; close every brace") from error
        matches = (storage.glob(pattern) if set("*?[") & set(pattern) else [pattern] for pattern in patterns)
        tars = [(url, PurePosixPath(url).name) for urls in matches for url in urls]
    else:
        tars = [(storage.join(path, name), name) for name, _ in storage.walk(path)] if storage.exists(path) else []
    if packed := [name for _, name in tars if name.endswith(COMPRESSED)]:
        raise UserError(f"data.source.path={path} has compressed tars, such as {packed[0]}: decompress them first")
    tars = [tar for tar in tars if tar[1].endswith(".tar")]
    if not tars:
        raise UserError(
            f"data.source.path={path} has no .tar file: give a folder of WebDataset tars, or a pattern with braces"
        )
    return tars, None


def _list_tar(tar: Tar, *, classes: tuple[str, ...] | None) -> SourceContents:
    """The samples of one tar; samples with possibly missing members are listed as bad."""
    url, tar_name = tar
    try:
        refuse_no_file(url)
        with read_errors(url), storage.open_read(url) as file:
            listing = list_members(file, size_bytes=storage.size(url))
    except BrokenImage as error:
        return SourceContents((), bad=((tar_name, str(error)),))
    except NO_FILE:
        return SourceContents((), bad=((tar_name, "the tar does not exist"),))
    bad = [(f"{tar_name}/{name}", reason) for name, reason in listing.refused]
    parts: list[tuple[str, str, Member]] = []
    ignored: Counter[str] = Counter()
    for member in listing.members:
        match = re.fullmatch(r"((?:.*/|)[^./]+)\.([^/]+)", member.name, re.DOTALL)
        if match is None or system_folder(member.name):
            ignored[ignored_as(member.name)] += 1
            continue
        key, extension = match[1], match[2].lower()
        if f".{extension}" not in (*IMAGE_SUFFIXES, ".json", ".cls") and not is_given(extension):
            ignored[f".{extension}"] += 1
        parts.append((key, extension, member))
    # consecutive members with the same key, as WebDataset groups them
    samples = [(key, list(run)) for key, run in groupby(parts, key=itemgetter(0))]
    if listing.fault is not None:
        bad.append((tar_name, listing.fault))
        if samples:
            key, _ = samples.pop()
            bad.append((f"{tar_name}/{key}", "the last sample of a truncated tar: members may be missing"))
    counts = Counter(key for key, _ in samples)
    records: list[Record] = []
    for key, run in samples:
        try:
            if counts[key] > 1:
                raise ValueError("the tar has the key in two places")
            records.append(_record(tar, run, classes=classes))
        except ValueError as error:
            bad.append((f"{tar_name}/{key}", str(error)))
    return SourceContents(tuple(records), tuple(bad), ignored=ignored)


def _record(tar: Tar, parts: list[tuple[str, str, Member]], *, classes: tuple[str, ...] | None) -> Record:
    """The sample of (key, extension, member); raises `ValueError` with the reason if it cannot be used."""
    blob_of = {extension: Blob(tar[0], member.offset, member.size) for _, extension, member in parts}
    images = [extension for extension in blob_of if f".{extension}" in IMAGE_SUFFIXES]
    if len(images) != 1 or len(blob_of) < len(parts):
        listed = ", ".join(extension for _, extension, _ in parts)
        raise ValueError(f"a sample needs one image and no duplicate member, and the members are: {listed}")
    texts = {extension: blob for extension, blob in blob_of.items() if extension in ("json", "cls")}
    for extension, blob in texts.items():
        if blob.size > MAX_TEXT_BYTES:
            raise ValueError(f"its {extension} member has {blob.size:,} bytes, more than {MAX_TEXT_BYTES:,}")
    meta: Any = parse_json(texts["json"].read()) if "json" in texts else {}
    if not isinstance(meta, dict) or not isinstance(meta.get("attributes") or {}, dict):
        raise ValueError("the json member, or its attributes, is not an object")  # noqa: TRY004 (a fault of the data)
    return Record(
        name=f"{parts[0][0]}.{images[0]}",
        image=blob_of[images[0]],
        class_name=_class(meta, texts["cls"].read() if "cls" in texts else None, classes=classes),
        split=_split(tar[1]),
        labels=_labels(meta.get("labels")),
        group=cell_name(meta.get("group")),
        given={extension: blob for extension, blob in blob_of.items() if is_given(extension)},
        attributes=meta.get("attributes") or {},
    )


def _labels(labels: Any) -> dict[str, int] | None:
    """The several labels of the json member, 1, 0 or -1 by name; None if it has another content, of another program."""
    return labels if isinstance(labels, dict) and all(value in (1, 0, -1) for value in labels.values()) else None


def _class(meta: dict[str, Any], cls: bytes | None, *, classes: tuple[str, ...] | None) -> str | None:
    """The class by name or number; raises `ValueError` for a label out of range or a contradiction."""
    label = class_of_label(meta.get("label"))
    if not isinstance(meta.get("class_name"), str | None):
        raise ValueError("the class name is not a string")  # noqa: TRY004 (a fault of the data)
    name = cell_name(meta.get("class_name"))
    if cls is not None:
        in_cls = class_of_label(decode_text(cls))
        if label is not None and in_cls is not None and in_cls not in (label, name):
            raise ValueError(f"the json member has the label {label!r}, and the cls member has {in_cls!r}")
        if label is None and name is None:
            label = in_cls
    if classes is None or label is None:
        return label if name is None else name
    if not label.isdecimal() or int(label) >= len(classes):
        raise ValueError(f"label {label} is out of range: the data set has {len(classes)} classes, numbered from 0")
    if name not in (None, classes[int(label)]):
        raise ValueError(f"label {label} means class {classes[int(label)]!r}, and the class name is {name!r}")
    return classes[int(label)]


def _split(tar_name: str) -> str | None:
    """`train` of `train-000012.tar`, of `train-00000-of-00003.tar` and of `train/000012.tar`."""
    path = PurePosixPath(tar_name)
    stem = re.sub(r"[-_.]?\d+[-_.]?of[-_.]?\d+([-_.][0-9a-f]{8,})?$", "", path.stem)
    prefix = stem if stem != path.stem else re.sub(r"[-_.]?\d*$", "", stem, count=1)
    if is_split_name(path.parent.name) and not is_split_name(prefix):
        return path.parent.name
    return prefix or path.parent.name or None
