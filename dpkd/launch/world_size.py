"""How many workers a cluster has room for, and what each can have: decisions that the gangs act on."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """What a node has for workers, held by them or not."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class Sizes:
    """The numbers of workers that a session may have, and when it takes to a larger one."""

    allowed: tuple[int, ...]
    """Ascending."""
    grow_after_s: float = 60.0
    """How long there must be room for more, and how long the present ones must have been up."""

    @property
    def fewest(self) -> int:
        """Without room for these the session waits."""
        return self.allowed[0]

    def above(self, size: int) -> int | None:
        """The next larger number, if there is one."""
        return min((each for each in self.allowed if each > size), default=None)

    def choose(self, rooms: Sequence[Room], *, threads: int | None, use_gpu: bool) -> int:
        """The most workers that the nodes have room for; the fewest where there is room for none.

        Each worker takes `threads` CPUs, or one at least, and a GPU with `use_gpu`.
        """
        least = threads or 1
        fitting = (size for size in self.allowed if cpus_per_worker(rooms, num_workers=size, use_gpu=use_gpu) >= least)
        return max(fitting, default=self.fewest)


def cpus_per_worker(rooms: Sequence[Room], *, num_workers: int, use_gpu: bool = False) -> int:
    """The most CPUs that each of `num_workers` can have at once (beside a GPU with `use_gpu`), 0 without room."""
    for share in range(max((room.cpus for room in rooms), default=0), 0, -1):
        places = (min(room.cpus // share, room.gpus) if use_gpu else room.cpus // share for room in rooms)
        if sum(places) >= num_workers:
            return share
    return 0
