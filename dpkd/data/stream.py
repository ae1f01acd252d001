"""Batches of a split, read and decoded ahead of training by other processes.

The training process alone knows the order: it hands out micro-batches as lists of samples, and the loader's workers
return them in that order. So workers hold no permutation, and their number changes nothing but the speed.
Axes: B images of a micro-batch, C channels, H and W pixels, N samples of the split.
"""

import signal
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from dpkd.data.augment import apply_image, apply_map, centre_view, random_views
from dpkd.data.batch import Batch, View
from dpkd.data.images import decode_image
from dpkd.data.settings import GLOBAL, AugmentSettings, LoaderSettings
from dpkd.data.shards import Sample, Split
from dpkd.errors import StorageError, UserError
from dpkd.launch import forking
from dpkd.launch.forking import end_with_parent, one_thread_each
from dpkd.launch.signals import block_stop_signals

_GRACE_S = 600
"""How long a worker outlives a request to stop that the whole process group got: training may need its batches."""


class MapReader(Protocol):
    """The prior maps of a split; `dpkd.priors` has the one that reads prior shards. Must pickle."""

    def read(self, i: int, sample: Sample) -> dict[str, NDArray[Any]]:
        """The maps of sample `i` by name, HWC over the whole image; raises `ValueError` if they are not its own."""

    def nearest(self, name: str) -> bool:
        """Whether the values of this map are labels, which must not be mixed."""

    def flip(self, name: str, map_HWC: NDArray[Any]) -> NDArray[Any]:
        """The map of the mirrored image: mirrored, its values changed where they name directions."""


@dataclass(frozen=True)
class ViewPlan:
    """One kind of view to make of each image."""

    size: int
    """Side in pixels."""
    map_size: int
    """Side of the prior maps."""
    augment: AugmentSettings | None
    """None takes the largest centred square, as in evaluation."""
    count: int = 1


def load_batches(
    split: Split,
    draws: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]],
    *,
    targets: Mapping[str, NDArray[np.int64]],
    maps: MapReader | None,
    views: Mapping[str, ViewPlan],
    seed: int,
    loader: LoaderSettings,
) -> Generator[Batch, None, None]:
    """A micro-batch for each of `draws`, in order: samples [B], and how often each was drawn before [B].

    `targets` holds an array [N] for each target of the batch; random views are drawn from the seed.

    Raises `UserError` that names shard and key for a sample that cannot be read.
    """
    cv2.setNumThreads(1)  # images are small, and its threads would take the cores from training
    work = (
        _Work(index_B, epoch_B, {name: target_N[index_B] for name, target_N in targets.items()})
        for index_B, epoch_B in draws
    )
    batches: DataLoader[Batch | UserError] = DataLoader(
        _Reader(split, maps, views, seed),
        batch_size=None,
        sampler=work,
        num_workers=loader.workers,
        prefetch_factor=loader.prefetch if loader.workers else None,
        worker_init_fn=_start_worker,
        multiprocessing_context=load_ahead() if loader.workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: a loader must not move the random state of training
    )
    for batch in _begin(batches):
        if isinstance(batch, UserError):
            raise batch
        yield batch


def evaluation_batches(
    split: Split,
    *,
    indices: NDArray[np.int64],
    maps: MapReader | None,
    image_size: int,
    map_size: int,
    batch_size: int,
    loader: LoaderSettings,
) -> Generator[Batch, None, None]:
    """The samples `indices` in that order: the centre of each image, the labels on disk; the last batch may be smaller.

    Raises `UserError` that names shard and key for a sample that cannot be read.
    """
    cuts = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return load_batches(
        split,
        ((cut, np.zeros_like(cut)) for cut in cuts),
        targets={"class": split.label_N},
        maps=maps,
        views={GLOBAL: ViewPlan(image_size, map_size, augment=None)},
        seed=0,
        loader=loader.model_copy(update={"workers": min(loader.workers, len(cuts))}),
    )


class _Work(NamedTuple):
    index_B: NDArray[np.int64]
    epoch_B: NDArray[np.int64]
    targets: dict[str, NDArray[np.int64]]


class _Seen(NamedTuple):
    """One view of one image."""

    image_CHW: NDArray[np.uint8]
    maps: dict[str, NDArray[np.float32]]
    """By name, CHW."""


@dataclass(frozen=True)
class _Reader(torch.utils.data.Dataset[Batch | UserError]):
    """What a worker does: one micro-batch from its list of samples.

    An error comes back as a value, so that the user sees one line and not a worker's traceback.
    """

    split: Split
    maps: MapReader | None
    views: Mapping[str, ViewPlan]
    seed: int

    def __getitem__(self, work: _Work) -> Batch | UserError:
        samples = []
        for index, epoch in zip(work.index_B.tolist(), work.epoch_B.tolist(), strict=True):
            try:
                samples.append(self._read(index, epoch))
            except (UserError, StorageError) as error:
                return UserError(str(error))
            except (ValueError, OSError) as error:
                place = self.split.describe(index)
                return UserError(f"{place}: {error}; restore the shard, or pack the images again")
        views = {}
        for name, plan in self.views.items():
            seen = [sample[name][turn] for turn in range(plan.count) for sample in samples]
            maps = {key: _stack([view.maps[key] for view in seen]) for key in seen[0].maps}
            views[name] = View(_stack([view.image_CHW for view in seen]), maps)
        return Batch(
            views=views,
            targets={name: torch.from_numpy(target_B) for name, target_B in work.targets.items()},
            index_B=torch.from_numpy(work.index_B.copy()),  # the order may keep and share it
            epoch_B=torch.from_numpy(work.epoch_B.copy()),
        )

    def _read(self, index: int, epoch: int) -> dict[str, list[_Seen]]:
        """The views of one sample, by their kind."""
        sample = self.split.read(index)
        image_HWC = decode_image(sample.image)
        maps = {} if self.maps is None else self.maps.read(index, sample)
        size = (image_HWC.shape[0], image_HWC.shape[1])
        plans = [(name, plan) for name, plan in self.views.items() for _ in range(plan.count)]
        augments = [plan.augment for _, plan in plans if plan.augment is not None]
        random = iter(random_views(augments, size, seed=self.seed, epoch=epoch, index=index))
        views: dict[str, list[_Seen]] = {name: [] for name in self.views}
        for name, plan in plans:
            crop = centre_view(size) if plan.augment is None else next(random)
            seen = _Seen(apply_image(crop, image_HWC, size=plan.size).transpose(2, 0, 1), {})
            for key, map_HWC in maps.items():
                assert self.maps is not None, "maps come from a reader"
                nearest, flip = self.maps.nearest(key), partial(self.maps.flip, key)
                seen_HWC = apply_map(crop, map_HWC, size=plan.map_size, nearest=nearest, flip=flip)
                seen.maps[key] = seen_HWC.transpose(2, 0, 1)
            views[name].append(seen)
        return views


def _stack(arrays: Sequence[NDArray[Any]]) -> torch.Tensor:
    # without `out` the stack would have the memory layout of the arrays, which are transposed
    return torch.from_numpy(np.stack(arrays, out=np.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)))


def _begin(batches: DataLoader[Batch | UserError]) -> Iterator[Batch | UserError]:
    """Starts the workers; they end with the iterator, so nothing (such as a traceback) may keep it."""
    with block_stop_signals(), one_thread_each():  # until the workers are up and have set how they take a signal
        return iter(batches)


def load_ahead() -> str:
    """Starts the fork server of the loader's workers, which loads what they need; returns how they are to start.

    They are never forked from this process: with threads (CUDA, gloo, Ray) that may hang.
    """
    with one_thread_each():  # workers inherit its environment and the libraries that it has loaded
        return forking.load_ahead("__main__", __name__)


def _start_worker(worker: int) -> None:  # noqa: ARG001 (the face torch asks for)
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the others stay held, as it was started
    end_with_parent()  # torch's own watch looks at the fork server, which stays
