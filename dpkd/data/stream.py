"""Batches of a split, read and decoded ahead of training by other processes.

The training process alone knows the order: it hands out micro-batches as lists of samples, and the loader's workers
return them in that order. So workers hold no permutation, and their number changes nothing but the speed.
Axes: B images of a micro-batch, C channels, H and W pixels, N samples of the split.
"""

import multiprocessing
import signal
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import forkserver
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from dpkd.data.augment import View, apply_image, apply_map, centre_view, random_view
from dpkd.data.images import decode_image
from dpkd.data.order import SampleOrder, dealt
from dpkd.data.settings import AugmentSettings, LoaderSettings
from dpkd.data.shards import Sample, Split
from dpkd.errors import StorageError, UserError
from dpkd.launch.forking import end_with_parent, one_thread_each
from dpkd.launch.signals import block_stop_signals

_GRACE_S = 600
"""How long a worker outlives a request to stop that the whole process group got: training may need its batches."""


class MapReader(Protocol):
    """The prior maps of a split; `dpkd.priors` has the one that reads prior shards. Must pickle."""

    def read(self, i: int, sample: Sample) -> dict[str, NDArray[Any]]:
        """The maps of sample `i` by name, HWC over the whole image; raises `ValueError` if they are not its own."""

    def only(self, names: Iterable[str]) -> "MapReader":
        """The same reader for these maps alone."""

    def nearest(self, name: str) -> bool:
        """Whether the values of this map are labels, which must not be mixed."""

    def flip(self, name: str, map_HWC: NDArray[Any]) -> NDArray[Any]:
        """The map of the mirrored image: mirrored, its values changed where they name directions."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    image_BCHW: torch.Tensor
    """uint8 RGB; `augment.normalise` makes it the network's input."""
    label_B: torch.Tensor
    """int64 class, -1 without a visible label."""
    index_B: torch.Tensor
    """int64 sample of the split."""
    epoch_B: torch.Tensor
    """int64 number of times the sample was drawn before; 0 in evaluation."""
    priors: dict[str, torch.Tensor] = field(default_factory=dict)
    """float32 BCHW maps at the map size, labels included."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU run beside the computation."""
        return self._each(torch.Tensor.pin_memory)

    def first(self, count: int) -> "Batch":
        """The first samples of the batch; fewer where it has fewer."""
        return self._each(lambda tensor: tensor[:count])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(
            image_BCHW=change(self.image_BCHW),
            label_B=change(self.label_B),
            index_B=change(self.index_B),
            epoch_B=change(self.epoch_B),
            priors={name: change(prior_BCHW) for name, prior_BCHW in self.priors.items()},
        )


def training_batches(
    split: Split,
    *,
    order: SampleOrder,
    label_N: NDArray[np.int64],
    maps: MapReader | None,
    augment: AugmentSettings,
    seed: int,
    image_size: int,
    map_size: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    start_step: int,
    stop_step: int,
    skipped: Collection[int] = (),
    loader: LoaderSettings,
) -> Generator[Batch, None, None]:
    """The micro-batches of this rank from `start_step` up to but not including `stop_step`, in order, randomly viewed.

    Steps in `skipped` have none.

    Raises `UserError` that names shard and key for a sample that cannot be read.
    """
    steps = (step for step in range(start_step, stop_step) if step not in skipped)
    own = dealt(order, steps, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
    work = (_Work(index_B, epoch_B, label_N[index_B]) for index_B, epoch_B in own)
    view = partial(random_view, augment, seed=seed)
    return _load(
        _Reader(split, maps, view, image_size, map_size), work, workers=loader.workers, prefetch=loader.prefetch
    )


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
    work = (_Work(cut, np.zeros_like(cut), split.label_N[cut]) for cut in cuts)
    workers = min(loader.workers, len(cuts))
    return _load(_Reader(split, maps, _centre, image_size, map_size), work, workers=workers, prefetch=loader.prefetch)


class _Work(NamedTuple):
    index_B: NDArray[np.int64]
    epoch_B: NDArray[np.int64]
    label_B: NDArray[np.int64]


@dataclass(frozen=True)
class _Failure:
    """Why a sample could not be read: a value, so that the user sees one line and not a worker's traceback."""

    message: str


class _ViewOf(Protocol):
    def __call__(self, image_size: tuple[int, int], *, epoch: int, index: int) -> View: ...


def _centre(image_size: tuple[int, int], *, epoch: int, index: int) -> View:  # noqa: ARG001 (the face of random_view)
    return centre_view(image_size)


@dataclass(frozen=True)
class _Reader(torch.utils.data.Dataset[Batch | _Failure]):
    """What a worker does: one micro-batch from its list of samples."""

    split: Split
    maps: MapReader | None
    view: _ViewOf
    image_size: int
    map_size: int

    def __getitem__(self, work: _Work) -> Batch | _Failure:
        image_BCHW = np.empty((len(work.index_B), 3, self.image_size, self.image_size), np.uint8)
        priors: dict[str, NDArray[np.float32]] = {}
        for row, (index, epoch) in enumerate(zip(work.index_B.tolist(), work.epoch_B.tolist(), strict=True)):
            try:
                seen_HWC, maps = self._sample(index, epoch)
            except (UserError, StorageError) as error:  # says where and what to do already
                return _Failure(str(error))
            except (ValueError, OSError) as error:
                return _Failure(f"{self._place(index)}: {error}; restore the shard, or pack the images again")
            image_BCHW[row] = seen_HWC.transpose(2, 0, 1)
            for name, map_HWC in maps.items():
                if row == 0:
                    size_CHW = (map_HWC.shape[2], self.map_size, self.map_size)
                    priors[name] = np.empty((len(image_BCHW), *size_CHW), np.float32)
                priors[name][row] = map_HWC.transpose(2, 0, 1)
        return Batch(
            image_BCHW=torch.from_numpy(image_BCHW),
            label_B=torch.from_numpy(work.label_B),
            index_B=torch.from_numpy(work.index_B.copy()),  # the order may keep and share it
            epoch_B=torch.from_numpy(work.epoch_B.copy()),
            priors={name: torch.from_numpy(prior_BCHW) for name, prior_BCHW in priors.items()},
        )

    def _sample(self, index: int, epoch: int) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.float32]]]:
        sample = self.split.read(index)
        image_HWC = decode_image(sample.image)
        view = self.view(image_HWC.shape[:2], epoch=epoch, index=index)
        seen_HWC = apply_image(view, image_HWC, size=self.image_size)
        if self.maps is None:
            return seen_HWC, {}
        maps = self.maps
        return seen_HWC, {
            name: apply_map(
                view, map_HWC, size=self.map_size, nearest=maps.nearest(name), flip=partial(maps.flip, name)
            )
            for name, map_HWC in maps.read(index, sample).items()
        }

    def _place(self, index: int) -> str:
        shard, row = self.split.locate(index)
        return f"{self.split.url}/{self.split.info.shards[shard].name}, sample {self.split.index(shard).keys[row]!r}"


def _load(reader: _Reader, work: Iterable[_Work], *, workers: int, prefetch: int) -> Generator[Batch, None, None]:
    cv2.setNumThreads(1)  # images are small, and its threads would take the cores from training
    batches = DataLoader(
        reader,
        batch_size=None,
        sampler=work,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_start_worker,
        multiprocessing_context=_processes() if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: a loader must not move the random state of training
    )
    for batch in _begun(batches):
        if isinstance(batch, _Failure):
            raise UserError(batch.message)
        yield batch


def _begun(batches: DataLoader[Batch | _Failure]) -> Iterator[Batch | _Failure]:
    """The loader at work; whoever keeps it (a traceback, say) keeps its workers."""
    if not batches.num_workers:
        return iter(batches)
    with block_stop_signals(), one_thread_each():  # until they are up, and say how they take a signal
        return iter(batches)


def load_ahead() -> None:
    """Starts the process that workers are forked from, which loads what they need while this one goes on."""
    if _processes().get_start_method() == "forkserver":
        with (
            block_stop_signals(),
            one_thread_each(),
        ):  # workers inherit its environment, and the libraries that it has loaded
            forkserver.ensure_running()


def _processes() -> multiprocessing.context.BaseContext:
    """How workers start: from a clean server, because a fork of a process with threads (CUDA, gloo, Ray) may hang."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _start_worker(worker: int) -> None:  # noqa: ARG001 (the face torch asks for)
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the others stay held, as it was started
    end_with_parent()  # torch's own watch looks at the fork server, which stays
