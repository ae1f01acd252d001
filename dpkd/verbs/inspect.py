"""The contents of a packed data set and its prior sets, and a check of every file against its manifest."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from dpkd.data.shards import Dataset, ShardInfo
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.log import Progress, logger, show
from dpkd.priors.store import MANIFEST_NAME, PriorSet, read_manifest, set_url
from dpkd.stages.report import sample_sheet

NUM_NAMED = 20
"""Number of keys or faults in a line; more are counted."""


def inspect_dataset(url: str) -> None:
    """Prints the contents of the data set and its prior sets, and checks every file and every map.

    Raises `UserError` with each damaged shard, and each sample whose maps are missing, damaged or of another image.
    """
    dataset = Dataset.open(url)
    manifest = dataset.manifest
    logger.info(f"{url}: format {manifest.format_version}, {len(manifest.classes)} classes")
    table = Table("split", "samples", "labelled", "classes", "fewest", "most", "shards", "MB")
    for name, split in manifest.splits.items():
        counts = [count for count in split.class_counts if count] or [0]
        size_mb = sum(shard.size_bytes for shard in split.shards) / 1e6
        numbers = [split.num_samples, sum(counts), np.count_nonzero(counts), min(counts), max(counts)]
        table.add_row(name, *(f"{number:,}" for number in (*numbers, len(split.shards))), f"{size_mb:.1f}")
    show(table)
    if given := dataset.given():
        counted = ", ".join(f"{name} of {count:,} samples" for name, count in given.items())
        logger.info(f"given with the images: {counted}")
    set_names = prior_sets(url)
    num_samples = sum(split.num_samples for split in manifest.splits.values())
    for name in set_names:
        priors = read_manifest(set_url(url, name))
        if priors is None or priors.dataset != manifest.fingerprint:
            continue  # `_inspect_priors` raises the fault of the set
        logger.info(f"prior set {name}: {priors.num_flat:,} of {num_samples:,} samples have flat maps")
        lost = [dataset.split(split).keys[i] for split, numbers in priors.unreadable.items() for i in numbers]
        if lost:
            logger.info(f"prior set {name}: {len(lost):,} could not be read and are left out: {_first(lost, ', ')}")
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    _check_shards(url, shards, way_out="pack again, which rewrites damaged shards")
    for name in manifest.splits:
        _ = dataset.split(name).label_N  # raises if its file is damaged
    logger.info("every shard fits its manifest")
    for name in set_names:
        _inspect_priors(dataset, name)


def prior_sets(url: str) -> list[str]:
    """Names of the prior sets beside the data set's shards."""
    folder = storage.join(url, "priors")
    return [name for name in storage.list_names(folder) if storage.exists(storage.join(folder, name, MANIFEST_NAME))]


def draw_samples(url: str, picture: Path, *, set_name: str, keys: Sequence[str] = ()) -> None:
    """Draws samples with all their maps into a PNG file: the samples `keys`, or a few of all splits.

    Raises `UserError` for a key that no split has, and if the data set or the prior set cannot be read.
    """
    if picture.suffix != ".png":
        raise UserError(f"--picture {picture}: the picture is a PNG, so give a path that ends in .png")
    drawn, png = sample_sheet(url, set_name=set_name, keys=keys)
    storage.write_bytes_atomic(picture, png)
    logger.info(f"{len(drawn)} samples with their maps: {picture}")


def _check_shards(url: str, shards: Sequence[ShardInfo], *, way_out: str) -> None:
    """Raises `UserError` with the shards that are missing or differ from the manifest."""
    damaged = []
    with Progress(f"check {url}", len(shards), unit="shards") as progress:
        for shard in shards:
            place = storage.join(url, shard.name)
            if not storage.exists(place):
                damaged.append(f"{shard.name} is missing")
            elif storage.sha256(place) != shard.sha256:
                damaged.append(f"{shard.name} has another sha256 than its manifest says")
            progress.advance()
    if damaged:
        raise UserError(f"{url}: {_first(damaged, '; ')}; {way_out}")


def _inspect_priors(dataset: Dataset, name: str) -> None:
    """Prints the contents of the prior set, and checks that each sample has maps of its image that can be decoded."""
    url, priors = set_url(dataset.url, name), PriorSet.open(dataset.url, name)
    way_out = "run the prepare stage again, which rewrites damaged shards"
    _check_shards(url, [shard for split in priors.manifest.splits.values() for shard in split], way_out=way_out)
    size_bytes, num_cells, damaged = Counter[str](), Counter[str](), list[str]()
    sums_2C: dict[str, npt.NDArray[np.float64]] = {}
    num_samples = sum(split.num_samples for split in dataset.manifest.splits.values())
    with Progress(f"check priors/{name}", num_samples) as progress:
        for split_name in dataset.manifest.splits:
            split, maps, lost = dataset.split(split_name), priors.split(split_name), priors.unreadable(split_name)
            for i in np.delete(np.arange(split.num_samples), lost).tolist():
                try:
                    record = maps.record(i, split.read(i))
                    for map_name, stored in record.maps.items():
                        size_bytes[map_name] += len(stored.data)
                        map_HWC = stored.decode().astype(np.float64)
                        if record.bad is None and not np.isnan(map_HWC).any():
                            num_cells[map_name] += map_HWC[:, :, 0].size
                            sums = np.array([map_HWC.sum((0, 1)), (map_HWC**2).sum((0, 1))])
                            sums_2C[map_name] = sums_2C.get(map_name, 0) + sums
                except (UserError, ValueError) as error:
                    damaged.append(str(error))
                progress.advance()
    table = Table("map", "channels", "bytes a sample", "mean of each channel", "deviation of each channel")
    for prior in priors.manifest.priors:
        cells = ["", ""]
        if not prior.nearest and num_cells[prior.name]:
            mean_C, square_C = sums_2C[prior.name] / num_cells[prior.name]
            statistics = (mean_C, np.sqrt(np.maximum(square_C - mean_C**2, 0)))
            cells = [" ".join(f"{value:.2f}" for value in values_C) for values_C in statistics]
        table.add_row(prior.name, str(prior.channels), f"{size_bytes[prior.name] / num_samples:,.0f}", *cells)
    show(table)
    if damaged:
        raise UserError(f"{url}: {_first(damaged, '; ')}; {way_out}")
    num_maps = len(priors.manifest.priors)
    logger.info(f"every readable sample has its {num_maps} maps, each readable and of its image")


def _first(words: Sequence[str], separator: str) -> str:
    more = f" and {len(words) - NUM_NAMED:,} more" if len(words) > NUM_NAMED else ""
    return separator.join(words[:NUM_NAMED]) + more
