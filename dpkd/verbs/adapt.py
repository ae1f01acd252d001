"""`dpkd adapt`: a classifier of new classes from a few labelled images, as a plain timm folder and ONNX.

    <out>/config.json, model.safetensors, model.onnx    as `dpkd export` writes them, with the new classes
    <out>/README.md           how to load it, the classes, the method, and how good it is
    <out>/adapt.json          method, scale, shots and their files by class, figures
    <out>/shots.safetensors   of prototypes: `centre` [D], `label` [S], `plain` and `mean` [S, D] embeddings

Axes: S shot, V view, C channel, H W height and width, D embedding, K class.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpkd.backends.local_pool import LocalPool
from dpkd.data.image_headers import BrokenImage
from dpkd.data.images import decode_image
from dpkd.data.settings import FolderSource
from dpkd.data.sources import find
from dpkd.data.sources.records import Blob, sorted_classes
from dpkd.errors import UserError, did_you_mean
from dpkd.evaluation.adaptation import (
    MAX_FOLDS,
    Floats,
    Head,
    Integers,
    Measured,
    balanced_prototypes,
    class_means,
    folds,
    logistic,
    measure,
    out_of_fold,
    prototypes,
    spread,
)
from dpkd.evaluation.exported import Exported
from dpkd.io import storage
from dpkd.io.errors import write_errors
from dpkd.log import Progress, logger
from dpkd.report.model_card import FRONT_MATTER
from dpkd.report.summary import markdown_table

Method = Literal["auto", "prototypes", "logistic", "fine_tune"]
METHODS: tuple[str, ...] = get_args(Method)
MIN_SHOTS, MAX_FLOPS = 10, 5e12
"""`auto` tries the fine-tune from so many shots of each class, and up to so many operations in all: some minutes."""
START_SCALE = 2.0
"""Of the prototypes with which the fine-tune begins."""
CARD_NAME, SHOTS_NAME = "adapt.json", "shots.safetensors"

CARD = """\
{front_matter}
# {name}

The network of `{export}` as a classifier of new classes, made from a few labelled images by `dpkd adapt`.
Method `{method}`: {certainty}.

The interval is that of Clopper and Pearson for new images that are drawn like the shots, with classes as frequent as
among them. Each shot was classified by a model that learnt from the others.

{table}

```python
import timm, torch
from PIL import Image, ImageOps

model = timm.create_model("local-dir:{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model), is_training=False)
image = transform(ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB"))[None]
with torch.no_grad():
    probability = model(image).softmax(1)[0].tolist()
print(dict(zip(model.pretrained_cfg["label_names"], probability)))
```

`model.onnx` takes normalised images of any batch size, and gives embedding and logits.
"""


class Shots(NamedTuple):
    """The embedded images of the new classes."""

    label_S: Integers
    embedding_SVD: Floats
    view_SVCHW: Tensor | None
    """Half precision; kept for the fine-tune alone."""


Fit = Callable[[Integers], tuple[Exported, Head]]
"""Learns from the shots of these numbers: the exported network or a fine-tuned copy, and a head for its embedding."""


@dataclass(frozen=True)
class Adapted:
    """The written classifier; `measured` is None where a class has one shot, so that none can be left out."""

    folder: Path
    classes: tuple[str, ...]
    method: str
    measured: Measured | None


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

    Where `export` was itself written by `adapt` with prototypes, its classes keep their rows bit for bit, and those of
    `shots` are added. `auto` takes the method with the most right answers on shots left out, prototypes on a tie.
    Raises `UserError` before any work for an unknown method, a folder in use, and input that cannot be used.
    """
    export, shots = Path(export), Path(shots)
    folder = Path(out) if out is not None else export.with_name(f"{export.name}-{shots.resolve().name}")
    if method not in METHODS:
        raise UserError(f"--method {method}: no such method{did_you_mean(method, METHODS)} ({', '.join(METHODS)})")
    if os.path.lexists(folder):
        raise UserError(f"--out {folder} exists already and is never overwritten: remove it or choose another folder")
    earlier, images = _earlier(export, method), _listed(shots)
    classes = {} if earlier is None else earlier["classes"]
    if both := [name for name in images if name in classes]:
        raise UserError(f"{export} has the class {both[0]} already: rename its folder in --shots {shots}")
    if len(classes | images) < 2:
        raise UserError(f"--shots {shots} has one class, {next(iter(images))}: give at least two, one folder each")
    exported = Exported(export)
    found = _embedded(exported, images, seed=seed, keep_views=earlier is None and method in ("auto", "fine_tune"))
    if earlier is None:
        network, card, stored = _new(exported, found, method, seed=seed)
    else:
        network, card, stored = _added(exported, found, earlier)
    card["classes"] = classes | {name: [blob.url for blob in blobs] for name, blobs in images.items()}
    scratch = folder.with_name(f".{folder.name}.new")
    try:
        with write_errors(folder):
            storage.remove_tree(scratch)
            scratch.mkdir(parents=True)
            network.write(scratch, list(card["classes"]), onnx=onnx)
            (scratch / CARD_NAME).write_text(json.dumps(card, indent=1) + "\n")
            if stored is not None:
                safetensors.numpy.save_file(stored, scratch / SHOTS_NAME)
            (scratch / "README.md").write_text(_model_card(folder.name, card))
        storage.publish(scratch, folder)
    finally:
        storage.remove_tree(scratch)
    logger.info(f"{card['method']}: {_certainty(card)}")
    logger.info(f'adapted: {folder}; timm.create_model("local-dir:{folder}", pretrained=True) loads it')
    measured = Measured(**card["measured"]) if card["measured"] else None
    return Adapted(folder, tuple(card["classes"]), card["method"], measured)


def _earlier(export: Path, method: str) -> dict[str, Any] | None:
    """The `adapt.json` of an adapted folder, or None; raises `UserError` if classes cannot be added to it."""
    path = export / CARD_NAME
    if not path.is_file():
        return None
    try:
        card = json.loads(path.read_text())
        made_by, original = card["method"], card["export"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): adapt again with the shots of all classes") from error
    if made_by != "prototypes" or method not in ("auto", "prototypes"):
        wrong = f"was made by {made_by}" if made_by != "prototypes" else f"takes no --method {method}"
        raise UserError(
            f"{export} {wrong}, and classes can be added by prototypes alone: adapt {original} with the shots of all "
            "classes, with --method prototypes if more shall be added later"
        )
    return card


def _listed(folder: Path) -> dict[str, list[Blob]]:
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
    if unlabelled := sum(record.class_name is None for record in records):
        logger.info(f"{unlabelled:,} images without a class are left out")
    return {name: [record.image for record in records if record.class_name == name] for name in names}


def _embedded(exported: Exported, images: dict[str, list[Blob]], *, seed: int, keep_views: bool) -> Shots:
    """The embeddings of all views of the images; raises `UserError` for an image that cannot be read."""
    counts = [len(blobs) for blobs in images.values()]
    embeddings, kept = [], []
    shots = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    with Progress(f"{len(counts)} classes with {shots} shots each", sum(counts)) as progress:
        for index, blob in enumerate(chain.from_iterable(images.values())):
            try:
                image_HWC = decode_image(blob.read())
            except BrokenImage as error:
                raise UserError(f"--shots {blob.url}: {error}; replace or remove the image") from error
            view_VCHW = exported.views(image_HWC, seed=seed, index=index)
            embeddings.append(exported.embed(view_VCHW))
            kept += [view_VCHW.half()] if keep_views else []
            progress.advance()
    if not np.isfinite(embeddings).all():
        raise UserError(f"{exported.folder} gives embeddings that are NaN or infinite: train its network again")
    return Shots(np.repeat(np.arange(len(counts)), counts), np.stack(embeddings), torch.stack(kept) if kept else None)


def _fits(exported: Exported, shots: Shots, *, seed: int) -> dict[str, Fit]:
    """The classifier of each method."""
    label_S, x_SVD, view_SVCHW = shots

    def by_prototypes(learn: Integers) -> tuple[Exported, Head]:
        return exported, balanced_prototypes(x_SVD[learn].mean(1), label_S[learn])

    def by_regression(learn: Integers) -> tuple[Exported, Head]:
        return exported, logistic(x_SVD[learn], label_S[learn])

    def by_tuning(learn: Integers) -> tuple[Exported, Head]:
        assert view_SVCHW is not None, "the fine-tune needs the views"
        start = exported.with_head(by_prototypes(learn)[1].scaled(START_SCALE))
        network = start.fine_tuned(view_SVCHW[learn], label_S[learn], seed=seed)
        return network, network.head()

    return {"prototypes": by_prototypes, "logistic": by_regression, "fine_tune": by_tuning}


def _chosen(exported: Exported, shots: Shots, method: str, *, seed: int) -> tuple[str, Fit, dict[str, Measured]]:
    """The method, its classifier, and what was measured of each method that was tried."""
    label_S, x_SVD, view_SVCHW = shots
    fits, fold_S = _fits(exported, shots, seed=seed), folds(label_S, seed=seed)
    names = list(fits) if method == "auto" else [method]

    def classify(fit: Fit, learn: Integers, left_out: Integers) -> Floats:
        network, head = fit(learn)
        if network is exported or view_SVCHW is None:
            return head.logits(x_SVD[left_out, 0])
        return head.logits(network.embed(view_SVCHW[left_out, 0].float()))

    flops = (MAX_FOLDS + 1) * exported.fine_tune_flops()
    if method == "auto" and (np.bincount(label_S).min() < MIN_SHOTS or flops > MAX_FLOPS):
        names.remove("fine_tune")
        limits = f"{MIN_SHOTS} shots of each class and at most {MAX_FLOPS / 1e12:.0f} TFLOP"
        here = f"{np.bincount(label_S).min()} shots, {flops / 1e12:.1f} TFLOP"
        logger.info(f"  fine_tune  not tried: it needs {limits} (here: {here})")
    tried: dict[str, Measured] = {}
    if fold_S is None:
        return names[0], fits[names[0]], tried
    for name in names:
        tried[name] = measure(out_of_fold(partial(classify, fits[name]), fold_S), label_S)
        logger.info(f"  {name:<11}{_right(tried[name])}")
    name = max(names, key=lambda name: tried[name].correct)  # on a tie the first
    return name, fits[name], tried


Result = tuple[Exported, dict[str, Any], dict[str, NDArray[Any]] | None]
"""The network, the contents of `adapt.json` and those of `shots.safetensors`."""


def _new(exported: Exported, shots: Shots, method: str, *, seed: int) -> Result:
    """The classifier of these classes."""
    label_S, x_SVD, _ = shots
    name, fit, tried = _chosen(exported, shots, method, seed=seed)
    network, head = fit(np.arange(len(label_S)))
    scale, mean_SD = tried[name].scale if tried else 1.0, x_SVD.mean(1)
    centre_D = class_means(mean_SD, label_S).mean(0)
    stored = {"centre": centre_D, "label": label_S, "plain": x_SVD[:, 0].copy(), "mean": mean_SD}
    figures = {each: measured._asdict() for each, measured in tried.items()}
    card = {
        "format_version": 1,
        "export": str(exported.folder),
        "method": name,
        "seed": seed,
        "scale": scale / spread(mean_SD, centre_D) if name == "prototypes" else scale,
        "measured": figures.get(name),
        "tried": figures,
    }
    return network.with_head(head.scaled(scale)), card, stored if name == "prototypes" else None


def _added(exported: Exported, shots: Shots, earlier: dict[str, Any]) -> Result:
    """The earlier classifier with further rows, of the same centre and scale; measured on the shots of all classes."""
    stored = safetensors.numpy.load_file(exported.folder / SHOTS_NAME)
    further = shots.label_S + len(earlier["classes"]), shots.embedding_SVD[:, 0], shots.embedding_SVD.mean(1)
    for name, more in zip(("label", "plain", "mean"), further, strict=True):
        stored[name] = np.concatenate([stored[name], more])
    label_S, by_prototypes = stored["label"], partial(prototypes, centre_D=stored["centre"])
    rows = by_prototypes(further[2], shots.label_S).scaled(earlier["scale"])
    head = Head(*map(np.concatenate, zip(exported.head(), (part.astype(np.float32) for part in rows), strict=True)))

    def classify(learn: Integers, left_out: Integers) -> Floats:
        return by_prototypes(stored["mean"][learn], label_S[learn]).logits(stored["plain"][left_out])

    fold_S = folds(label_S, seed=earlier["seed"])
    figure = None if fold_S is None else measure(out_of_fold(classify, fold_S), label_S)._asdict()
    return exported.with_head(head), earlier | {"measured": figure, "tried": {}}, stored


def _right(measured: Measured) -> str:
    (low, high), share = measured.interval, measured.correct / measured.num_shots
    right = f"{share:.1%} ({measured.correct} of {measured.num_shots} shots, each left out once)"
    return f"{right}, 95 % interval {low:.1%} to {high:.1%}"


def _certainty(card: dict[str, Any]) -> str:
    if card["measured"] is None:
        return "its accuracy is not known, because a class has one shot and none can be left out: give two or more"
    return f"accuracy on new images {_right(Measured(**card['measured']))}"


def _model_card(name: str, card: dict[str, Any]) -> str:
    rows = [["class", "shots"], *([each, str(len(files))] for each, files in card["classes"].items())]
    facts = {"export": card["export"], "method": card["method"], "certainty": _certainty(card)}
    return CARD.format(front_matter=FRONT_MATTER, name=name, table="\n".join(markdown_table(rows)), **facts)
