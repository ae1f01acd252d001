"""What a packed data set holds, and whether every file is as its manifest says."""

from rich.console import Console
from rich.table import Table

from dpkd import storage
from dpkd.data.shards import Dataset
from dpkd.errors import UserError
from dpkd.report.progress import Progress, say


def inspect_dataset(url: str) -> None:
    """Prints classes and counts by split and checks every shard; raises `UserError` that names each damaged one."""
    dataset = Dataset.open(url)
    manifest = dataset.manifest
    say(f"{url}: format {manifest.format_version}, {len(manifest.classes)} classes")
    table = Table("split", "samples", "labelled", "classes", "fewest", "most", "shards", "MB")
    for name, split in manifest.splits.items():
        counts = [count for count in split.class_counts if count]
        size_mb = sum(shard.size_bytes for shard in split.shards) / 1e6
        fewest, most = (min(counts), max(counts)) if counts else (0, 0)
        cells = (split.num_samples, sum(counts), len(counts), fewest, most, len(split.shards), f"{size_mb:.1f}")
        table.add_row(name, *(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells))
    Console().print(table)
    _check_shards(dataset)


def _check_shards(dataset: Dataset) -> None:
    shards = [shard for split in dataset.manifest.splits.values() for shard in split.shards]
    damaged = []
    with Progress("check", len(shards), unit="shards") as progress:
        for shard in shards:
            url = storage.join(dataset.url, shard.name)
            if not storage.exists(url):
                damaged.append(f"{shard.name} is missing")
            elif storage.digest(storage.read_bytes(url)) != shard.sha256:
                damaged.append(f"{shard.name} has another sha256 than dataset.json says")
            progress.advance()
    if damaged:
        raise UserError(f"{dataset.url}: {'; '.join(damaged)}; pack again, which makes the damaged ones anew")
    say("every shard is as its manifest says")
