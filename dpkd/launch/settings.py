"""Settings of the launcher: which processes run, how many, and how they are watched."""

from typing import Literal

from pydantic import Field, model_validator

from dpkd.config import Config

START_TIMEOUT_S = 900.0


class LauncherSettings(Config):
    """Where processes run: on this machine, or on the Ray cluster that the command was submitted to."""

    kind: Literal["auto", "local", "ray"] = "auto"
    """`auto` is Ray inside a Ray job and local otherwise."""
    workers: int | None = Field(None, ge=1)
    """Training processes; none takes one a GPU, or one."""
    min_workers: int | None = Field(None, ge=1)
    """As few will do: training has as many as there is room for, from here to `workers`, with the same batches. On Ray
    it goes on with fewer when nodes are lost, and with more when some join. None insists on `workers`."""
    grow_after_s: float = Field(60.0, ge=0)
    """How long there must be room for more workers before all save and start again with more."""
    pool_workers: int | None = Field(None, ge=1)
    """Processes that pack and prepare; none takes one a CPU core."""
    max_restarts: int = Field(3, ge=0)
    """How often workers start again after a failure; counts from 0 again after each later checkpoint."""
    start_timeout_s: float = Field(START_TIMEOUT_S, gt=0)
    """Time that workers have to start, on a busy machine too; then they are ended and start again."""
    hang_timeout_s: float | None = Field(600.0, gt=0)
    """A worker whose step takes longer is ended, and all start again; six times as long for anything else, such as
    starting, evaluating and saving, or an image in packing and preparing. None watches nothing."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of one training process; none shares the cores out."""
    stop_grace_s: float = Field(30.0, ge=0)
    """Time that workers have to save when the run is asked to stop; more for large networks on slow storage."""

    @model_validator(mode="after")
    def _fewest_first(self) -> "LauncherSettings":
        if self.min_workers is not None and self.workers is None:
            raise ValueError(f"min_workers={self.min_workers} needs the largest number too: set workers")
        if self.min_workers is not None and self.workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        return self
