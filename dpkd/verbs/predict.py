"""`dpkd predict`, `embed` and `neighbours`: classes and embeddings of images by an exported or adapted timm folder.

Each image has a row, in the order of the files; one that cannot be read has its reason in `error`, and no values.

    predict      file, class, confidence, error, and the probability `p_<class>` of each class;
                 with top=K instead of these class_2, confidence_2, … class_K, confidence_K;
                 where an image may have several labels, `labels` (those of probability 0.5 or more, `a|b`) instead of
                 class and confidence
    segment      file, mask, error; each mask is a PNG of the numbers of the classes, and 255 for figure
    embed        file, embedding (D float32, timm's `forward_head(…, pre_logits=True)`), error
    neighbours   query, file, similarity (cosine) of the images nearest to each query; drawn as a contact sheet

Axes: B image of a batch, C channel, H W height and width, N image, K class, D embedding or class, Q query.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dpkd.data.image_headers import BrokenImage
from dpkd.data.images import decode_image, encode_png
from dpkd.data.settings import Window
from dpkd.data.sources.folders import MAP_NAME
from dpkd.data.sources.records import Blob, system_folder
from dpkd.data.text import is_image
from dpkd.errors import UserError
from dpkd.evaluation.exported import Exported, window_of
from dpkd.evaluation.segmenter import Segmenter
from dpkd.io import storage
from dpkd.log import Progress, logger
from dpkd.report.pictures import contact_sheet

Place = str | Path
Places = Place | Iterable[Place]
"""An image, a folder of images at any depth, or several of these."""
BATCH_SIZE, THRESHOLD = 64, 0.5
WEIGHTS = "dpkd.weights"
"""Key of the schema of an embedding file: the SHA-256 of the network's weights."""


def predict(export: Place, photos: Places, *, out: Place | None = None, top: int | None = None) -> pa.Table:
    """The classes of images by a classifier; also written to `out` (.csv, .jsonl or .parquet).

    Probabilities are rounded to 6 decimals. Raises `UserError` before any work for a student without classes, for a
    place without images and another suffix; a broken image raises nothing.
    """
    _refuse(out, (".csv", ".jsonl", ".parquet"), top=top)
    exported = Exported(Path(export))
    if not exported.classes:
        raise UserError(
            f"{export} has no classes: `dpkd adapt {export} --shots FOLDER` makes a classifier of it from a few "
            "labelled images, `dpkd embed` gives its embeddings; if it segments, give a folder for the masks (--out)"
        )
    if exported.multi_label and top is not None:
        raise UserError(f"--top {top}: images may have several labels, each with its own probability: leave it out")
    files, errors, broken_N, logit_NK = _outputs(exported, photos, exported.model)
    logits = torch.from_numpy(logit_NK).double()
    share_NK = (logits.sigmoid() if exported.multi_label else logits.softmax(1)).numpy().round(6)
    columns, name_K = {"file": pa.array(files)}, np.array(exported.classes, object)
    ranked = np.argsort(-logit_NK, axis=1, kind="stable").T[: top or 1]
    if exported.multi_label:
        named, ranked = ["|".join(name_K[share_K >= THRESHOLD]) for share_K in share_NK], ranked[:0]
        columns["labels"] = pa.array(named, pa.string(), mask=broken_N)
    for rank, best_N in enumerate(ranked, start=1):
        ending, best_share_N = f"_{rank}" if rank > 1 else "", share_NK[np.arange(len(files)), best_N]
        columns[f"class{ending}"] = pa.array(name_K[best_N], pa.string(), mask=broken_N)
        columns[f"confidence{ending}"] = pa.array(best_share_N, mask=broken_N)
    columns["error"] = errors
    if top is None:
        columns |= {f"p_{name}": pa.array(share_NK[:, k], mask=broken_N) for k, name in enumerate(name_K)}
    return _written(pa.table(columns), out)


def segment(export: Place, photos: Places, *, out: Place) -> pa.Table:
    """The masks of images of any size by an export that segments, as `<name>.mask.png` in the folder `out`.

    The folder keeps the images' folders below the one that they share. Raises `UserError` as `predict` does, for an
    export without a segmentation head, and for two images of one name.
    """
    if not Path(export, "segmentation.json").is_file():
        raise UserError(
            f"{export} has no segmentation.json, so it makes no masks for the folder {out}: give --out FILE.csv for "
            "its classes, or an export that was trained with data.masks"
        )
    segmenter, window, files = Segmenter(export), window_of(Path(export)), list_images(photos)
    paths = [Path(file).absolute() for file in files]
    root = os.path.commonpath([path.parent for path in paths])
    masks = [Path(out, path.relative_to(root)).with_suffix(".mask.png") for path in paths]
    if len(set(masks)) < len(masks):
        raise UserError(f"{photos} has two images of one name, such as {Counter(masks).most_common(1)[0][0].name}")
    figure = segmenter.settings["classes"] == ["ground", "figure"]
    errors: list[str | None] = []
    with Progress("images", len(files)) as progress:
        for file, path in zip(files, masks, strict=True):
            try:
                mask_HW = segmenter.segment(decode_image(Blob(file).read(), window=window))
                path.parent.mkdir(parents=True, exist_ok=True)
                storage.write_bytes_atomic(path, encode_png(mask_HW * np.uint8(255) if figure else mask_HW))
                errors.append(None)
            except BrokenImage as error:
                logger.info(f"{file}: {error}")
                errors.append(str(error))
            progress.advance(1)
    written = [None if error else str(path) for path, error in zip(masks, errors, strict=True)]
    return pa.table({"file": files, "mask": pa.array(written, pa.string()), "error": pa.array(errors, pa.string())})


def embed(export: Place, photos: Places, *, out: Place | None = None) -> pa.Table:
    """The embeddings of images; also written to `out` (.parquet). Raises `UserError` as `predict` does."""
    _refuse(out, (".parquet",))
    exported = Exported(Path(export))
    files, errors, broken_N, row_ND = _outputs(exported, photos, exported.embedding)
    embedding_N = pa.FixedSizeListArray.from_arrays(row_ND.ravel(), row_ND.shape[1], mask=pa.array(broken_N))
    table = pa.table({"file": files, "embedding": embedding_N, "error": errors})
    return _written(table.replace_schema_metadata({WEIGHTS: _weights(export)}), out)


def neighbours(export: Place, photos: Places, *, of: Places, out: Place | None = None, top: int = 8) -> pa.Table:
    """The `top` images nearest to each image in `of`, which is none of them; `out` is their contact sheet (.png).

    `photos` may be a file that `embed` has written. Raises `UserError` as `predict` does, for a broken query, and for
    embeddings of another network.
    """
    _refuse(out, (".png",), top=top)
    places = [photos] if isinstance(photos, Place) else list(photos)
    if len(places) == 1 and str(places[0]).endswith(".parquet") and Path(places[0]).is_file():
        known = pyarrow.parquet.read_table(places[0])
        if (known.schema.metadata or {}).get(WEIGHTS.encode()) != _weights(export).encode():
            raise UserError(f"{places[0]} was not written by `dpkd embed {export}`: write it again, or give the images")
    else:
        known = embed(export, places)
    known, queries = known.filter(known["error"].is_null()), embed(export, of)
    refuse_broken(queries)
    unit_ND, unit_QD = (
        x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)
        for x in (np.stack(table["embedding"].to_numpy()) for table in (known, queries))
    )
    files, rows, drawn = known["file"].to_pylist(), [], []
    for query, similarity_N in zip(queries["file"].to_pylist(), unit_QD @ unit_ND.T, strict=True):
        ranked, own = np.argsort(-similarity_N, kind="stable").tolist(), os.path.realpath(query)
        order = [k for k in ranked[: top + 1] if os.path.realpath(files[k]) != own][:top]
        rows += [{"query": query, "file": files[k], "similarity": float(similarity_N[k])} for k in order]
        drawn.append([("query", query), *((f"{similarity_N[k]:.2f}", files[k]) for k in order)])
    if out is not None:
        window = window_of(Path(export))
        titled = [[(f"{title} {Path(file).name}", _picture(file, window)) for title, file in cells] for cells in drawn]
        storage.write_bytes_atomic(out, encode_png(contact_sheet(titled)))
        logger.info(f"written: {out}")
    return pa.Table.from_pylist(rows)


def _picture(file: str, window: Window | None) -> NDArray[np.uint8]:
    try:
        return decode_image(Blob(file).read(), window=window)
    except BrokenImage as error:
        raise UserError(f"{file}: {error}; `dpkd embed` again if images have changed") from error


def list_images(places: Places) -> list[str]:
    """The image files of the places, without masks and expert maps; raises `UserError` for a place without images."""
    files: dict[str, None] = {}
    for place in [places] if isinstance(places, Place) else places:
        if not storage.exists(url := str(place)):
            raise UserError(f"{url} does not exist: give images, or folders of images")
        if storage.is_file(url):
            files[url] = None
            continue
        names = [name for name, _ in storage.walk(url) if is_image(name)]
        found = [name for name in names if not system_folder(name) and not MAP_NAME.fullmatch(name)]
        if not found:
            raise UserError(f"{url} has no image (.jpg, .png, .webp, .bmp, .tif): give another folder")
        files |= dict.fromkeys(storage.join(url, name) for name in found)
    return list(files)


def refuse_broken(table: pa.Table) -> None:
    """Raises `UserError` if images were broken; a command ends so after its results are written."""
    if broken := len(table) - table["error"].null_count:
        raise UserError(f"{broken:,} of {len(table):,} images cannot be read, as the column `error` says")


def write_table(table: pa.Table, file: BinaryIO, *, suffix: str) -> None:
    """Writes the table as .csv, .jsonl or .parquet."""
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
        return
    text = io.StringIO()
    if suffix == ".csv":
        lines = csv.DictWriter(text, table.column_names, lineterminator="\n")
        lines.writeheader()
        lines.writerows(table.to_pylist())
    else:
        text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
    file.write(text.getvalue().encode())


def _outputs(
    exported: Exported, photos: Places, compute: Callable[[Tensor], Tensor]
) -> tuple[list[str], pa.Array, NDArray[np.bool_], NDArray[np.floating]]:
    """The files, the reason for each broken one, which are broken, and the outputs ND: 0 for a broken image.

    Threads decode a batch while the network computes the one before. Raises `UserError` for outputs that are NaN.
    """
    files, device = list_images(photos), "cuda" if torch.cuda.is_available() else "cpu"
    layout: Any = {"device": device, "memory_format": torch.channels_last}  # convolutions are twice as fast on a CPU
    exported.to(**layout)

    def load(file: str) -> tuple[Tensor, str | None]:
        try:
            return exported.transform(Image.fromarray(decode_image(Blob(file).read(), window=exported.window))), None
        except BrokenImage as error:
            logger.info(f"{file}: {error}")
            return torch.zeros(3, exported.size, exported.size), str(error)

    parts = [files[start : start + BATCH_SIZE] for start in range(0, len(files), BATCH_SIZE)]
    errors: list[str | None] = []
    rows: list[NDArray[np.floating]] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads, Progress("images", len(files)) as progress:
        loading = threads.map(load, parts[0])
        for part, following in zip(parts, [*parts[1:], []], strict=True):
            images, reasons = zip(*loading, strict=True)
            loading = threads.map(load, following)
            with torch.inference_mode():
                rows.append(compute(torch.stack(images).to(**layout)).cpu().numpy())
            errors += reasons
            progress.advance(len(part))
    row_ND, broken_N = np.concatenate(rows), np.array([error is not None for error in errors])
    row_ND[broken_N] = 0
    if not np.isfinite(row_ND).all():
        raise UserError(f"{exported.folder} gives outputs that are NaN or infinite: train its network again")
    # `\xe9` replaces a byte of a name that is not UTF-8
    shown = [file.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for file in files]
    return shown, pa.array(errors, pa.string()), broken_N, row_ND


def _weights(export: Place) -> str:
    return storage.sha256(Path(export) / "model.safetensors")


def _refuse(out: Place | None, suffixes: tuple[str, ...], *, top: int | None = None) -> None:
    if top is not None and top < 1:
        raise UserError(f"--top {top}: give a number from 1")
    if out is not None and Path(out).suffix not in suffixes:
        raise UserError(f"--out {out}: give a file that ends in {' or '.join(suffixes)}")
    if out is not None and not os.access(Path(out).parent, os.W_OK):
        raise UserError(f"--out {out}: its folder is missing or cannot be written to")


def _written(table: pa.Table, out: Place | None) -> pa.Table:
    if out is not None:
        with storage.open_atomic(out) as file:
            write_table(table, file, suffix=Path(out).suffix)
        logger.info(f"written: {out}")
    return table
