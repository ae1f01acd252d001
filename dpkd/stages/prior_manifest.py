"""The manifest of a prior set: withdrawn before it becomes untrue, written once every shard stands."""

from itertools import accumulate

from dpkd.data.shard_index import index_name
from dpkd.data.shards import Dataset
from dpkd.io import storage
from dpkd.priors import Prior
from dpkd.priors.shards import (
    MANIFEST_NAME,
    ChannelStatistics,
    PriorIndex,
    PriorManifest,
    fingerprints,
    read_manifest,
)
from dpkd.priors.statistics import Moments


def withdraw_other_manifest(url: str, dataset: Dataset, priors: tuple[Prior, ...]) -> None:
    """Removes a manifest that is about to become untrue, before the first shard changes under it."""
    manifest = read_manifest(url)
    if manifest is None or (manifest.dataset, manifest.fingerprints) != (
        dataset.manifest.fingerprint,
        fingerprints(priors),
    ):
        _remove(storage.join(url, MANIFEST_NAME))


def make_manifest(dataset: Dataset, priors: tuple[Prior, ...], indexes: list[PriorIndex]) -> PriorManifest:
    """The manifest of the set whose shards have these indexes, in the order of the data set's."""
    shards = iter(indexes)
    return PriorManifest(
        dataset=dataset.manifest.fingerprint,
        priors=priors,
        fingerprints=fingerprints(priors),
        statistics=_statistics(priors, indexes),
        splits={name: tuple(next(shards).shard for _ in info.shards) for name, info in dataset.manifest.splits.items()},
        unreadable=_unreadable(dataset, indexes),
        num_flat=sum(len(index.bad) - len(index.unreadable) for index in indexes),
    )


def _unreadable(dataset: Dataset, indexes: list[PriorIndex]) -> dict[str, tuple[int, ...]]:
    """The samples of each split that cannot be read, by their numbers in the split."""
    shards = iter(indexes)
    numbers: dict[str, tuple[int, ...]] = {}
    for name, info in dataset.manifest.splits.items():
        held = [next(shards) for _ in info.shards]
        ends = accumulate(index.shard.num_samples for index in held)
        numbers[name] = tuple(
            end - index.shard.num_samples + row
            for end, index in zip(ends, held, strict=True)
            for row in index.unreadable
        )
    return numbers


def _statistics(priors: tuple[Prior, ...], indexes: list[PriorIndex]) -> dict[str, ChannelStatistics]:
    totals = {
        prior.name: sum((index.moments[prior.name] for index in indexes), Moments.zero(prior.channels))
        for prior in priors
        if not prior.nearest
    }
    return {
        name: ChannelStatistics(mean=tuple(total.mean_C.tolist()), deviation=tuple(total.deviation_C.tolist()))
        for name, total in totals.items()
        if total.count
    }


def remove_unlisted(url: str, manifest: PriorManifest) -> None:
    """Removes shards of an earlier, larger set, which a reader of all tars in the folder would take for its own."""
    listed = {shard.name for shards in manifest.splits.values() for shard in shards}
    listed |= {index_name(name) for name in listed}
    for name in storage.list_names(url):
        if name.endswith((".tar", ".index.msgpack")) and name not in listed:
            _remove(storage.join(url, name))


def _remove(place: str) -> None:
    if storage.exists(place):
        with storage.write_errors(place):
            storage.remove(place)
