"""`dpkd inspect`: what a packed data set and its prior sets hold, a check of every file and map, and a picture."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from dpkd.data.shards import Dataset, ShardInfo
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.log import Progress, logger, show
from dpkd.priors.store import MANIFEST_NAME, PriorSet, set_url
from dpkd.stages.report import sample_sheet

NUM_NAMED = 20
"""Number of keys or faults in a line; more are counted."""


def inspect(dataset: str, *, picture: Path | None = None, set_name: str = "default", keys: Sequence[str] = ()) -> None:
    """Prints the contents of the data set at a path or URL and of its prior sets, and checks every file and every map.

    With `picture` it draws samples with all their maps into a PNG file instead: those of `keys`, or a few of all
    splits. Raises `UserError` with each damaged shard, with each sample whose maps are missing, damaged or of another
    image, and for a key that no split has.
    """
    if picture is None:
        _inspect_dataset(Dataset.open(dataset))
        return
    if picture.suffix != ".png":
        raise UserError(f"--picture {picture}: the picture is a PNG, so give a path that ends in .png")
    drawn, png = sample_sheet(dataset, set_name=set_name, keys=keys)
    storage.write_bytes_atomic(picture, png)
    logger.info(f"{len(drawn)} samples with their maps: {picture}")


def _inspect_dataset(dataset: Dataset) -> None:
    url, manifest = dataset.url, dataset.manifest
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
    folder = storage.join(url, "priors")
    set_names = [
        each for each in storage.list_names(folder) if storage.exists(storage.join(folder, each, MANIFEST_NAME))
    ]
    num_samples = sum(split.num_samples for split in manifest.splits.values())
    sets = {name: PriorSet.open(url, name) for name in set_names}
    for name, priors in sets.items():
        logger.info(f"prior set {name}: {priors.manifest.num_flat:,} of {num_samples:,} samples have flat maps")
        unreadable = priors.manifest.unreadable.items()
        if lost := [dataset.split(split).keys[i] for split, numbers in unreadable for i in numbers]:
            logger.info(f"prior set {name}: {len(lost):,} could not be read and are left out: {_first(lost, ', ')}")
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    _check_shards(url, shards, way_out="pack again, which rewrites damaged shards")
    for name in manifest.splits:
        _ = dataset.split(name).label_N  # raises if its file is damaged
    logger.info("every shard fits its manifest")
    for name, priors in sets.items():
        _inspect_priors(dataset, priors, name)


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


def _inspect_priors(dataset: Dataset, priors: PriorSet, name: str) -> None:
    """Prints the contents of the prior set, and checks that each sample has maps of its image that can be decoded."""
    url, way_out = set_url(dataset.url, name), "run the prepare stage again, which rewrites damaged shards"
    _check_shards(url, [shard for split in priors.manifest.splits.values() for shard in split], way_out=way_out)
    size_bytes, damaged = Counter[str](), list[str]()
    num_samples = sum(split.num_samples for split in dataset.manifest.splits.values())
    with Progress(f"check priors/{name}", num_samples) as progress:
        for split_name in dataset.manifest.splits:
            split, maps, lost = dataset.split(split_name), priors.split(split_name), priors.unreadable(split_name)
            for i in np.delete(np.arange(split.num_samples), lost).tolist():
                try:
                    for map_name, stored in maps.record(i, split.read(i)).maps.items():
                        size_bytes[map_name] += len(stored.data)
                        stored.decode()
                except (UserError, ValueError) as error:
                    damaged.append(str(error))
                progress.advance()
    table = Table("map", "channels", "bytes a sample")
    for prior in priors.manifest.priors:
        table.add_row(prior.name, str(prior.channels), f"{size_bytes[prior.name] / num_samples:,.0f}")
    show(table)
    if damaged:
        raise UserError(f"{url}: {_first(damaged, '; ')}; {way_out}")
    num_maps = len(priors.manifest.priors)
    logger.info(f"every readable sample has its {num_maps} maps, each readable and of its image")


def _first(words: Sequence[str], separator: str) -> str:
    more = f" and {len(words) - NUM_NAMED:,} more" if len(words) > NUM_NAMED else ""
    return separator.join(words[:NUM_NAMED]) + more
