"""`dpkd adapt`: a classifier of new classes from a few labelled images, as a plain timm folder and ONNX.

    <out>/config.json, model.safetensors, model.onnx    as `dpkd export` writes them, with the new classes
    <out>/README.md           how to load it, the classes, the method, and how good it is
    <out>/adapt.json          method, scale, shots and their files by class, figures
    <out>/shots.safetensors   of linear heads: `label` [S], `view` [S, V, D] embeddings, to which classes can be added

Axes: S shot, V view, C channel, H W height and width, D embedding, K class.
"""

import json
import os
from collections.abc import Collection
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dpkd.backends.local_pool import LocalPool
from dpkd.data.image_headers import BrokenImage
from dpkd.data.images import decode_image
from dpkd.data.settings import FolderSource
from dpkd.data.sources import find
from dpkd.data.sources.records import Blob, sorted_classes
from dpkd.errors import UserError, did_you_mean
from dpkd.evaluation import adaptation
from dpkd.evaluation.adaptation import Floats, Head, Integers, Measured
from dpkd.evaluation.exported import BATCH_SIZE, STEPS, Exported
from dpkd.io import storage
from dpkd.io.errors import write_errors
from dpkd.io.record import parse_json, read_record
from dpkd.log import Progress, logger
from dpkd.report.model_card import adapted_card

Method = Literal["auto", "prototypes", "logistic", "fine_tune"]
METHODS: tuple[str, ...] = get_args(Method)
MIN_SHOTS, MAX_FLOPS = 10, 5e12
"""`auto` tries the fine-tune from so many shots of each class, and up to so many operations in all: some minutes."""
START_SCALE = 2.0
"""Of the prototypes with which the fine-tune begins."""
NOT_KNOWN = "its accuracy is not known, because a class has one shot and none can be left out: give two or more"
CARD_NAME, SHOTS_NAME = "adapt.json", "shots.safetensors"
FORMAT_VERSION = 2
"""Of both files; classes are added to folders of this version alone."""


class Adapted(NamedTuple):
    """The written classifier; `measured` is None where a class has one shot, so that none can be left out."""

    folder: Path
    classes: tuple[str, ...]
    method: str
    measured: Measured | None


class Shots(NamedTuple):
    """The embedded shots of all classes; `image_SVCHW` is kept for the fine-tune alone, in half precision."""

    label_S: Integers
    view_SVD: Floats
    image_SVCHW: Tensor | None


def adapt(
    export: Path | str,
    shots: Path | str,
    *,
    out: Path | str | None = None,
    method: Method = "auto",
    seed: int = 0,
    onnx: bool = True,
) -> Adapted:
    """Writes a classifier of the classes in `shots` (`<class>/*`) on the network of an exported timm folder.

    Where `export` was itself written by `adapt` with a linear head, the classes are added to its own, whose images are
    not needed again. `auto` takes the method with the most right answers on shots left out, prototypes on a tie.
    Raises `UserError` before any work for an unknown method, a folder in use, and input that cannot be used.
    """
    export, shots = Path(export), Path(shots)
    folder = Path(out) if out is not None else export.with_name(f"{export.name}-{shots.resolve().name}")
    if method not in METHODS:
        raise UserError(f"--method {method}: no such method{did_you_mean(method, METHODS)} ({', '.join(METHODS)})")
    if os.path.lexists(folder):
        raise UserError(f"--out {folder} exists already and is never overwritten: remove it or choose another folder")
    earlier = _earlier(export, method)
    classes: dict[str, list[str]] = earlier.get("classes", {})
    images = _listed(shots, known=classes)
    exported = Exported(export)
    embedded = _embedded(exported, images, seed=seed, keep_images=not earlier and method in ("auto", "fine_tune"))
    if earlier:
        stored = safetensors.numpy.load_file(export / SHOTS_NAME)
        label_S = np.concatenate([stored["label"], embedded.label_S + len(classes)])
        embedded = Shots(label_S, np.concatenate([stored["view"], embedded.view_SVD]), None)
    figures = _tried(exported, embedded, method, seed=seed)
    name, measured = max(figures.items(), key=lambda item: item[1].correct if item[1] else 0)  # on a tie the first
    network, head = _fit(exported, embedded, name, np.arange(len(embedded.label_S)), seed=seed)
    card: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "export": earlier.get("export", str(export)),
        "method": name,
        "seed": seed,
        "measured": measured and measured._asdict(),
        "classes": classes | {each: [blob.url for blob in blobs] for each, blobs in images.items()},
        "certainty": f"accuracy on new images {measured}" if measured else NOT_KNOWN,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_errors(folder), TemporaryDirectory(dir=folder.parent, prefix=".dpkd-") as hidden:
        scratch = Path(hidden, folder.name)
        scratch.mkdir()
        network.with_head(head.scaled(measured.scale if measured else 1.0)).write(scratch, card["classes"], onnx=onnx)
        (scratch / CARD_NAME).write_text(json.dumps(card, indent=1) + "\n")
        (scratch / "README.md").write_text(adapted_card(folder.name, card))
        if network is exported:
            safetensors.numpy.save_file({"label": embedded.label_S, "view": embedded.view_SVD}, scratch / SHOTS_NAME)
        storage.publish(scratch, folder)
    logger.info(f"{name}: {card['certainty']}")
    logger.info(f'adapted: {folder}; timm.create_model("local-dir:{folder}", pretrained=True) loads it')
    return Adapted(folder, tuple(card["classes"]), name, measured)


def _earlier(export: Path, method: str) -> dict[str, Any]:
    """The `adapt.json` of an adapted folder, else empty; raises `UserError` if no class can be added to it."""
    earlier = read_record(export / CARD_NAME, way_out="adapt with the shots of all classes", parse=parse_json)
    if earlier and earlier.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{export} was written by another version of dpkd: adapt with the shots of all classes")
    if earlier and (method == "fine_tune" or not (export / SHOTS_NAME).is_file()):
        raise UserError(
            f"{export} was made by {earlier['method']}, and a fine-tune needs the images of all classes: adapt "
            f"{earlier['export']} with them, with --method prototypes or logistic if more shall be added later"
        )
    return earlier


def _listed(folder: Path, *, known: Collection[str]) -> dict[str, list[Blob]]:
    """The images of each class, by name; raises `UserError` for another layout and for what cannot be used."""
    try:
        contents = find(FolderSource(path=str(folder)), pool=LocalPool(1))
    except UserError as error:
        raise UserError(str(error).replace("data.source.path=", "--shots ")) from error
    records = sorted(contents.records, key=lambda record: record.name)
    names = sorted_classes(record.class_name for record in records)
    if not names or any(record.split is not None for record in records):
        raise UserError(f"--shots {folder} was read as {contents.layout}: give a folder of class folders, <class>/*")
    for name, reason in contents.bad:
        raise UserError(f"--shots {folder / name}: {reason}")
    if both := [name for name in names if name in known]:
        raise UserError(f"EXPORT has the class {both[0]} already: rename its folder in --shots {folder}")
    if len(names) + len(known) < 2:
        raise UserError(f"--shots {folder} has one class, {names[0]}: give at least two, one folder each")
    if unlabelled := sum(record.class_name is None for record in records):
        logger.info(f"{unlabelled:,} images without a class are left out")
    return {name: [record.image for record in records if record.class_name == name] for name in names}


def _embedded(exported: Exported, images: dict[str, list[Blob]], *, seed: int, keep_images: bool) -> Shots:
    """All views of the images; raises `UserError` for an image that cannot be read, and for an unusable network."""
    if not isinstance(exported.model.get_classifier(), nn.Linear | nn.Identity):
        raise UserError(f"{exported.folder}: its classifier is not one linear layer")
    counts, embeddings, kept = [len(blobs) for blobs in images.values()], [], []
    each = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else counts[0]
    with Progress(f"{len(counts)} classes with {each} shots", sum(counts)) as progress:
        for index, blob in enumerate(chain.from_iterable(images.values())):
            try:
                view_VCHW = exported.views(decode_image(blob.read(), window=exported.window), seed=seed, index=index)
            except BrokenImage as error:
                raise UserError(f"--shots {blob.url}: {error}; replace or remove the image") from error
            embeddings.append(exported.embed(view_VCHW))
            kept += [view_VCHW.half()] if keep_images else []
            progress.advance()
    if not np.isfinite(embeddings).all():
        raise UserError(f"{exported.folder} gives embeddings that are NaN or infinite: train its network again")
    label_S = np.repeat(np.arange(len(counts)), counts)
    return Shots(label_S, np.stack(embeddings), torch.stack(kept) if kept else None)


def _tried(exported: Exported, shots: Shots, method: str, *, seed: int) -> dict[str, Measured | None]:
    """How the method, or each that `auto` tries, classifies shots that are left out; None if a class has one shot."""

    def classify(name: str, learn: Integers, left_out: Integers) -> Floats:
        network, head = _fit(exported, shots, name, learn, seed=seed)
        if network is exported or shots.image_SVCHW is None:
            return head.logits(shots.view_SVD[left_out, 0])
        return head.logits(network.embed(shots.image_SVCHW[left_out, 0].float()))

    names = [method] if method != "auto" else ["prototypes", "logistic"]
    if method == "auto" and shots.image_SVCHW is not None:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            exported(exported.example(1))
        num_images = (adaptation.MAX_FOLDS + 1) * STEPS * BATCH_SIZE
        least, flops = np.bincount(shots.label_S).min(), 3 * num_images * counter.get_total_flops()  # 2 of 3 backward
        if least >= MIN_SHOTS and flops <= MAX_FLOPS:
            names.append("fine_tune")
        else:
            logger.info(f"  fine_tune is not tried with {least} shots of a class and {flops / 1e12:.1f} TFLOP")
    figures: dict[str, Measured | None] = dict.fromkeys(names)
    for name in names:
        if (logit_SK := adaptation.out_of_fold(partial(classify, name), shots.label_S, seed=seed)) is not None:
            figures[name] = adaptation.measure(logit_SK, shots.label_S)
            logger.info(f"  {name:<11}{figures[name]}")
    return figures


def _fit(exported: Exported, shots: Shots, method: str, learn: Integers, *, seed: int) -> tuple[Exported, Head]:
    """The network, or a fine-tuned copy, and a head for its embedding, learnt from the shots of these numbers."""
    label_S, view_SVD = shots.label_S[learn], shots.view_SVD[learn]
    if method == "logistic":
        return exported, adaptation.logistic(view_SVD, label_S)
    head = adaptation.prototypes(view_SVD.mean(1), label_S)
    if method == "prototypes":
        return exported, head
    assert shots.image_SVCHW is not None, "the fine-tune needs the images"
    start = exported.with_head(head.scaled(START_SCALE))
    network = start.fine_tuned(shots.image_SVCHW[learn], label_S, seed=seed)
    return network, Head(*(tensor.detach().numpy() for tensor in network.model.get_classifier().parameters()))
