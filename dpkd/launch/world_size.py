"""The number of workers that fit on the nodes of a cluster, and the CPUs of each worker."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class NodeResources:
    """The resources of a node for workers: all of them, or the free ones."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class WorldSizeRange:
    """The allowed numbers of workers of a session, and the time before it changes to a larger number."""

    allowed: tuple[int, ...]
    """Ascending."""
    grow_after_s: float = 60.0
    """Seconds for which more workers must have fitted."""

    @property
    def fewest(self) -> int:
        """The smallest number; the session waits until so many workers fit."""
        return self.allowed[0]

    def above(self, size: int) -> int | None:
        """The next larger number; None if `size` is the largest."""
        return min((larger for larger in self.allowed if larger > size), default=None)

    def choose(self, nodes: Sequence[NodeResources], *, threads: int | None, use_gpu: bool) -> int:
        """The largest number of workers that fits on the nodes, or `fewest` if none fits.

        Each worker uses `threads` CPUs, or at least one, and a GPU with `use_gpu`.
        """
        least = threads or 1
        fitting = (size for size in self.allowed if cpus_per_worker(nodes, num_workers=size, use_gpu=use_gpu) >= least)
        return max(fitting, default=self.fewest)


def cpus_per_worker(nodes: Sequence[NodeResources], *, num_workers: int, use_gpu: bool = False) -> int:
    """The most CPUs that all of `num_workers` can have (and a GPU each with `use_gpu`); 0 if the workers do not fit."""
    for share in range(max((node.cpus for node in nodes), default=0), 0, -1):
        places = (min(node.cpus // share, node.gpus) if use_gpu else node.cpus // share for node in nodes)
        if sum(places) >= num_workers:
            return share
    return 0
