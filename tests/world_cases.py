"""Asks a world of two processes everything it answers, and keeps the answers by rank."""

import sys
from pathlib import Path

import torch

from dpkd.engine.world import join


def main() -> None:
    world = join()
    found = {
        "any of (true, false), (false, false)": world.any_of(world.rank == 0, False),
        "broadcast": world.broadcast({"from": world.rank}),
        "gather": world.gather(f"rank {world.rank}"),
        "mean": world.mean_(torch.tensor([1.0, 2.0]) * (1 + world.rank)),
        "place": (world.rank, world.size, world.local_rank, str(world.device)),
    }
    world.barrier()
    again = join()  # as under Ray Train, which starts the process group itself
    again.leave()
    found["a world that found a group left it alone"] = torch.distributed.is_initialized()
    world.leave()
    found["left"] = not torch.distributed.is_initialized()
    torch.save(found, Path(sys.argv[1]) / f"{world.rank}.pt")
