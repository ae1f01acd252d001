"""Batches of a split; worker processes read and decode them ahead of training.

Only the training process knows the order. It sends each micro-batch as a list of samples; the workers return batches
in that order. Workers hold no permutation, so their number changes only the speed.
Axes: B images of a micro-batch, C channels, H and W pixels, N samples of the split.
"""

import math
import signal
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from dpkd.data.augment import apply_image, apply_map, centre_view, random_views, replace_backgrounds
from dpkd.data.batch import Batch, View
from dpkd.data.decoded import ENLARGE, SHARED, DecodedImages, free_shared
from dpkd.data.images import decode_checked
from dpkd.data.labels import Labels
from dpkd.data.sample import Sample
from dpkd.data.settings import GLOBAL, AugmentSettings, LoaderSettings
from dpkd.data.shards import Split
from dpkd.errors import StorageError, UserError
from dpkd.launch import forking
from dpkd.launch.forking import end_with_parent, one_thread_each
from dpkd.launch.signals import block_stop_signals
from dpkd.log import logger

_GRACE_S = 600
"""Time until a worker ends after a stop signal to the process group: training may still need its batches."""


Maps = dict[str, NDArray[Any]]
"""Prior maps of one sample by name, HWC."""


class MapReader(Protocol):
    """The prior maps of a split; `dpkd.priors` reads them from prior shards. An implementation must pickle."""

    def read(self, i: int, sample: Sample) -> Maps:
        """The maps of sample `i` by name, HWC over the whole image; raises `ValueError` for maps of another sample."""

    @property
    def num_channels(self) -> int:
        """Number of channels of all maps."""

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

    Raises `UserError` with shard and key for an unreadable sample, and if the decoded images that it is to keep exceed
    the shared memory.
    """
    cv2.setNumThreads(1)  # images are small, and OpenCV's threads would slow training
    draws = iter(draws)
    first = list(islice(draws, 1))
    channels = 0 if maps is None else maps.num_channels
    image_bytes = sum(plan.count * (3 * plan.size**2 + 4 * channels * plan.map_size**2) for plan in views.values())
    batch_bytes = image_bytes * sum(len(index_B) for index_B, _ in first)
    needed = loader.workers * (loader.prefetch + 1) * batch_bytes
    if needed > (free := free_shared() if Path(SHARED).is_dir() else math.inf):
        sizes = f"{needed / 1e6:,.1f} MB of shared memory, and {SHARED} has {free / 1e6:,.1f} MB left ({ENLARGE})"
        _log_once(
            f"data.loader.workers needs {sizes}: images are read in the training process, as with data.loader.workers=0"
        )
        loader = loader.model_copy(update={"workers": 0})
    work = (
        _Work(index_B, epoch_B, {name: target_N[index_B].astype(np.int64) for name, target_N in targets.items()})
        for index_B, epoch_B in chain(first, draws)
    )
    method = load_ahead() if loader.workers else None
    cache_bytes = int(loader.cache_gb * 1e9)
    lock = torch.multiprocessing.get_context(method).Lock() if method else nullcontext()
    decoded = DecodedImages(split.num_samples, num_bytes=cache_bytes, lock=lock) if cache_bytes else None
    batches: DataLoader[Batch | UserError] = DataLoader(
        _Reader(split, maps, views, seed, decoded),
        batch_size=None,
        sampler=work,
        num_workers=loader.workers,
        prefetch_factor=loader.prefetch if loader.workers else None,
        worker_init_fn=_start_worker,
        multiprocessing_context=method,
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
        loader=loader.model_copy(update={"workers": min(loader.workers, len(cuts)), "cache_gb": 0}),
    )


class _Work(NamedTuple):
    index_B: NDArray[np.int64]
    epoch_B: NDArray[np.int64]
    targets: dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class _Reader(torch.utils.data.Dataset[Batch | UserError]):
    """Makes one micro-batch of its list of samples, in a worker.

    An error is returned as a value, so that the user sees one line and not a worker's traceback.
    """

    split: Split
    maps: MapReader | None
    views: Mapping[str, ViewPlan]
    seed: int
    decoded: DecodedImages | None

    def __getitem__(self, work: _Work) -> Batch | UserError:
        views: dict[str, View] = {}
        for row, (index, epoch) in enumerate(zip(work.index_B.tolist(), work.epoch_B.tolist(), strict=True)):
            try:
                image_HWC, maps = self._read(index)
                views = views or {name: _allocate(plan, len(work.index_B), maps) for name, plan in self.views.items()}
                self._fill(views, row, image_HWC, maps, {"seed": self.seed, "epoch": epoch, "index": index})
            except (UserError, StorageError) as error:
                return UserError(str(error))
            except RuntimeError as error:
                if "shared memory" not in str(error):
                    raise
                return UserError(f"{SHARED} is full ({str(error)[:200]}): {ENLARGE}, or set data.loader.workers=0")
            except (ValueError, OSError) as error:
                return UserError(f"{self.split.describe(index)}: {error}; restore the shard, or pack the images again")
        for name, plan in self.views.items():
            background = plan.augment.background if plan.augment is not None else None
            if background is not None:
                image_BCHW = views[name].image_BCHW.numpy()
                image_BCHW[:] = replace_backgrounds(
                    image_BCHW,
                    views[name].maps[background.prior].numpy(),
                    settings=background,
                    seed=self.seed,
                    index_B=work.index_B,
                    epoch_B=work.epoch_B,
                )
        return Batch(
            views=views,
            targets={name: torch.from_numpy(target_B) for name, target_B in work.targets.items()},
            index_B=torch.from_numpy(work.index_B.copy()),  # the order may cache and share the array
            epoch_B=torch.from_numpy(work.epoch_B.copy()),
        )

    def _read(self, index: int) -> tuple[NDArray[np.uint8], Maps]:
        """The image and the maps of a sample; one that was kept is neither read nor decoded again."""
        kept_HWC = None if self.decoded is None else self.decoded.get(index)
        if kept_HWC is not None and self.maps is None:
            return kept_HWC, {}
        sample = self.split.read(index)
        image_HWC = decode_checked(sample.image) if kept_HWC is None else kept_HWC
        if self.decoded is not None and kept_HWC is None:
            self.decoded.keep(index, image_HWC)
        return image_HWC, {} if self.maps is None else self.maps.read(index, sample)

    def _fill(
        self, views: dict[str, View], row: int, image_HWC: NDArray[np.uint8], maps: Maps, draw: dict[str, int]
    ) -> None:
        """Writes the views of one sample into its row of each block."""
        size = (image_HWC.shape[0], image_HWC.shape[1])
        augments = [plan.augment for plan in self.views.values() for _ in range(plan.count) if plan.augment is not None]
        random = iter(random_views(augments, size, **draw))
        for name, plan in self.views.items():
            view = views[name]
            for place in range(row, len(view.image_BCHW), len(view.image_BCHW) // plan.count):
                crop = centre_view(size) if plan.augment is None else next(random)
                apply_image(crop, image_HWC, size=plan.size, out_CHW=view.image_BCHW.numpy()[place])
                for key, map_HWC in maps.items():
                    assert self.maps is not None, "maps come from a reader"
                    nearest, flip = self.maps.nearest(key), partial(self.maps.flip, key)
                    out_CHW = view.maps[key].numpy()[place]
                    apply_map(crop, map_HWC, size=plan.map_size, nearest=nearest, flip=flip, out_CHW=out_CHW)


def _allocate(plan: ViewPlan, num_samples: int, maps: Maps) -> View:
    """Memory for one kind of view of all samples; `maps` are those of one sample."""
    num_views, sides = plan.count * num_samples, (plan.map_size, plan.map_size)
    image_BCHW = _empty(num_views, 3, plan.size, plan.size, dtype=torch.uint8)
    shapes = {name: (num_views, map_HWC.shape[2], *sides) for name, map_HWC in maps.items()}
    return View(image_BCHW, {name: _empty(*shape, dtype=torch.float32) for name, shape in shapes.items()})


_log_once = cache(logger.info)


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without values; in a worker, in memory that the training process maps, so that nothing is copied."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # noqa: SLF001 (as torch's collate)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


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
