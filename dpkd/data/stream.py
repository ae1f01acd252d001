"""Batches of a split; worker processes read and decode them ahead of training.

Only the training process knows the order. It sends each micro-batch as a list of samples; the workers return batches
in that order. Workers hold no permutation, so their number changes only the speed.
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
from dpkd.data.shards import Labels, Sample, Split
from dpkd.errors import StorageError, UserError
from dpkd.launch import forking
from dpkd.launch.forking import end_with_parent, one_thread_each
from dpkd.launch.signals import block_stop_signals

_GRACE_S = 600
"""Time until a worker ends after a stop signal to the process group: training may still need its batches."""


class MapReader(Protocol):
    """The prior maps of a split; `dpkd.priors` reads them from prior shards. An implementation must pickle."""

    def read(self, i: int, sample: Sample) -> dict[str, NDArray[Any]]:
        """The maps of sample `i` by name, HWC over the whole image; raises `ValueError` for maps of another sample."""

    def nearest(self, name: str) -> bool:
        """True if the values of this map are labels, which must not be averaged."""

    def flip(self, name: str, map_HWC: NDArray[Any]) -> NDArray[Any]:
        """The map of the mirrored image: mirrored, with changed values if they are directions."""


@dataclass(frozen=True)
class ViewPlan:
    """One kind of view to make of each image."""

    size: int
    """Side in pixels."""
    map_size: int
    """Side of the prior maps."""
    augment: AugmentSettings | None
    """None: the largest centred square, as in evaluation."""
    count: int = 1


def load_batches(
    split: Split,
    draws: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]],
    *,
    targets: Mapping[str, Labels],
    maps: MapReader | None,
    views: Mapping[str, ViewPlan],
    seed: int,
    loader: LoaderSettings,
) -> Generator[Batch, None, None]:
    """A micro-batch for each entry of `draws`, in order: (samples [B], numbers of earlier draws [B]).

    `targets` has an array [N] for each target of the batch; random views depend on the seed.

    Raises `UserError` with shard and key for an unreadable sample.
    """
    cv2.setNumThreads(1)  # images are small, and OpenCV's threads would slow training
    work = (
        _Work(index_B, epoch_B, {name: target_N[index_B].astype(np.int64) for name, target_N in targets.items()})
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
        generator=torch.Generator(),  # a loader must not change the random state of training
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
    """The samples `indices` in that order: image centres and labels on disk; the last batch may be smaller.

    Raises `UserError` with shard and key for an unreadable sample.
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


class _SampleView(NamedTuple):
    """One view of one image."""

    image_CHW: NDArray[np.uint8]
    maps: dict[str, NDArray[np.float32]]
    """By name, CHW."""


@dataclass(frozen=True)
class _Reader(torch.utils.data.Dataset[Batch | UserError]):
    """Makes one micro-batch of its list of samples, in a worker.

    An error is returned as a value, so that the user sees one line and not a worker's traceback.
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
                return UserError(f"{self.split.describe(index)}: {error}; restore the shard, or pack the images again")
        views = {}
        for name, plan in self.views.items():
            sample_views = [sample[name][turn] for turn in range(plan.count) for sample in samples]
            maps = {key: _stack([view.maps[key] for view in sample_views]) for key in sample_views[0].maps}
            views[name] = View(_stack([view.image_CHW for view in sample_views]), maps)
        return Batch(
            views=views,
            targets={name: torch.from_numpy(target_B) for name, target_B in work.targets.items()},
            index_B=torch.from_numpy(work.index_B.copy()),  # the order may cache and share the array
            epoch_B=torch.from_numpy(work.epoch_B.copy()),
        )

    def _read(self, index: int, epoch: int) -> dict[str, list[_SampleView]]:
        """The views of one sample by kind."""
        sample = self.split.read(index)
        image_HWC = decode_image(sample.image)
        maps = {} if self.maps is None else self.maps.read(index, sample)
        size = (image_HWC.shape[0], image_HWC.shape[1])
        plans = [(name, plan) for name, plan in self.views.items() for _ in range(plan.count)]
        augments = [plan.augment for _, plan in plans if plan.augment is not None]
        random = iter(random_views(augments, size, seed=self.seed, epoch=epoch, index=index))
        views: dict[str, list[_SampleView]] = {name: [] for name in self.views}
        for name, plan in plans:
            crop = centre_view(size) if plan.augment is None else next(random)
            view = _SampleView(apply_image(crop, image_HWC, size=plan.size).transpose(2, 0, 1), {})
            for key, map_HWC in maps.items():
                assert self.maps is not None, "maps come from a reader"
                nearest, flip = self.maps.nearest(key), partial(self.maps.flip, key)
                view_HWC = apply_map(crop, map_HWC, size=plan.map_size, nearest=nearest, flip=flip)
                view.maps[key] = view_HWC.transpose(2, 0, 1)
            views[name].append(view)
        return views


def _stack(arrays: Sequence[NDArray[Any]]) -> torch.Tensor:
    # without `out`, the stack would keep the memory layout of the transposed arrays
    return torch.from_numpy(np.stack(arrays, out=np.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)))


def _begin(batches: DataLoader[Batch | UserError]) -> Iterator[Batch | UserError]:
    """Starts the workers; they end with the iterator, so no reference (such as a traceback) may keep it."""
    with block_stop_signals(), one_thread_each():  # until the workers have installed their signal handlers
        return iter(batches)


def load_ahead() -> str:
    """Starts the workers' fork server with their modules loaded; returns the workers' start method.

    Workers are never forked from this process: a fork of a process with threads (CUDA, gloo, Ray) may hang.
    """
    with one_thread_each():  # workers inherit the server's environment and loaded libraries
        return forking.load_ahead("__main__", __name__, "dpkd.priors.store")  # the module of their map readers


def _start_worker(worker: int) -> None:  # noqa: ARG001 (torch passes it)
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # other signals stay blocked, as at the start
    end_with_parent()  # torch watches only the fork server, which stays alive
