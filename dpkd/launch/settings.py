"""Settings of the launcher: kind, number, restarts and watchdogs of processes."""

from typing import Literal

from pydantic import Field, model_validator

from dpkd.config import Config
from dpkd.launch.heartbeat import SLOW

START_TIMEOUT_S = 900.0


class LauncherSettings(Config):
    """The processes of a run: on this machine, on the Ray cluster of the submitted job, or those of torchrun."""

    kind: Literal["auto", "local", "ray", "env"] = "auto"
    """`env` uses the processes that torchrun or srun has started, one worker each. `auto` is Ray inside a Ray job,
    `env` under torchrun, and local otherwise."""
    workers: int | None = Field(None, ge=1)
    """Number of training processes; None means one per GPU, or one without a GPU."""
    min_workers: int | None = Field(None, ge=1)
    """Fewest training processes. Training uses the largest number up to `workers` that fits, with the same batches. On
    Ray it uses fewer if nodes are lost, and more if nodes join. None always uses `workers`."""
    grow_after_s: float = Field(60.0, ge=0)
    """Seconds for which more workers must fit before all save and restart with more."""
    pool_workers: int | None = Field(None, ge=1)
    """Number of processes that pack and prepare; None means one per CPU core."""
    max_restarts: int = Field(3, ge=0)
    """Most restarts of the workers after failures; each new checkpoint sets the count to 0."""
    start_timeout_s: float = Field(START_TIMEOUT_S, gt=0)
    """Seconds in which workers must start, even on a busy machine; slower workers are ended and restarted."""
    hang_timeout_s: float | None = Field(600.0, gt=0)
    """Longest step in seconds: a slower worker is ended, and all restart. Other work, such as starting, evaluating and
    saving, or an image in packing and preparing, may take six times as long. None disables the watchdogs."""
    threads: int | None = Field(None, ge=1)
    """CPU threads per training process; None divides the cores equally."""
    stop_grace_s: float = Field(30.0, ge=0)
    """Seconds in which workers must save after a stop request; set more for large networks on slow storage."""

    @property
    def peer_timeout_s(self) -> float:
        """Seconds for which a rank waits for its peers; the watchdog ends ranks that are behind earlier."""
        return max(1800.0, 2 * SLOW * (self.hang_timeout_s or 0.0))

    @model_validator(mode="after")
    def _fewest_first(self) -> "LauncherSettings":
        if self.min_workers is not None and self.workers is None:
            raise ValueError(f"min_workers={self.min_workers} needs the largest number too: set workers")
        if self.min_workers is not None and self.workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        return self
