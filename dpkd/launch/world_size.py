"""How many workers fit on the nodes of a cluster, and how many CPUs each can have."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class NodeResources:
    """What a node has for workers, free or taken."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class WorldSizeRange:
    """The numbers of workers that a session may have, and when it changes to a larger one."""

    allowed: tuple[int, ...]
    """Ascending."""
    grow_after_s: float = 60.0
    """Seconds for which more must have fitted."""

    @property
    def fewest(self) -> int:
        """The session waits until these fit."""
        return self.allowed[0]

    def above(self, size: int) -> int | None:
        """The next larger number, if there is one."""
        return min((larger for larger in self.allowed if larger > size), default=None)

    def choose(self, nodes: Sequence[NodeResources], *, threads: int | None, use_gpu: bool) -> int:
        """The most workers that fit on the nodes; the fewest if even these do not.

        Each worker takes `threads` CPUs, or one at least, and a GPU with `use_gpu`.
        """
        least = threads or 1
        fitting = (size for size in self.allowed if cpus_per_worker(nodes, num_workers=size, use_gpu=use_gpu) >= least)
        return max(fitting, default=self.fewest)


def cpus_per_worker(nodes: Sequence[NodeResources], *, num_workers: int, use_gpu: bool = False) -> int:
    """The most CPUs that each of `num_workers` can have at once (beside a GPU with `use_gpu`), 0 if they do not fit."""
    for share in range(max((node.cpus for node in nodes), default=0), 0, -1):
        places = (min(node.cpus // share, node.gpus) if use_gpu else node.cpus // share for node in nodes)
        if sum(places) >= num_workers:
            return share
    return 0
