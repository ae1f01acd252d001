"""Settings of training: optimizer, schedule, engine, and the length and cadence of a stage."""

from typing import Literal

from pydantic import Field, model_validator

from dpkd.config import Config
from dpkd.engine.imbalance import Imbalance, Sampling


class OptimizerSettings(Config):
    """AdamW or SGD; biases and norms have no weight decay; `layer_decay` reduces the rate towards the input."""

    kind: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = Field(0.9, ge=0, lt=1)
    layer_decay: float = Field(1.0, gt=0, le=1)
    clip: float | None = Field(1.0, gt=0)
    """Largest gradient norm; None means no clipping."""


class ScheduleSettings(Config):
    """Linear warm-up over a share of the steps, then cosine to `final` times the rate."""

    warmup: float = Field(0.05, ge=0, lt=1)
    final: float = Field(0.01, ge=0, le=1)


class EngineSettings(Config):
    """The engine of one network; `auto` uses DeepSpeed on several GPUs, else plain PyTorch, and logs its choice."""

    kind: Literal["auto", "torch", "deepspeed"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 1
    """The ZeRO stage, by which DeepSpeed shards state over workers; 3 also shards weights, frozen teachers included."""
    compile: bool = False
    activation_checkpointing: bool = False
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights; if set, the average is evaluated and exported."""

    @model_validator(mode="after")
    def _stage_has_an_engine(self) -> "EngineSettings":
        if self.kind == "torch" and self.zero_stage > 1:
            raise ValueError(
                f"kind torch shards nothing, so zero_stage {self.zero_stage} has no effect: set kind: deepspeed"
            )
        return self


class TrainingSettings(Config):
    """The length of a stage, its batch, and how often it is evaluated and saved (in steps)."""

    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(128, ge=1)
    """Images in one step over all workers, for any number of workers."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Images in one forward pass of one worker, and in one batch norm; None means `batch_size / workers`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    imbalance: Imbalance = "none"
    """The recipe for rare classes; `auto` chooses by the counts of the visible labels, and logs what and why.

    `deferred` weighs labels by the inverse effective number of samples in the last fifth of the steps.
    """
    sampling: Sampling = "auto"
    """`auto`: as `imbalance` says, which is uniform without it."""
    labelled_share: float | None = Field(None, gt=0, le=1)
    """Share of labelled samples in each batch, with `data.masks` of those with a mask; None: as in the split."""
    log_every: int = Field(10, ge=1)
    evaluate_every: int | None = Field(None, ge=1)
    panels_every: int | None = Field(None, ge=1)
    checkpoint_every: int = Field(200, ge=1)
    max_skipped_steps: int = Field(3, ge=0)
    """Most steps that a stage may skip because they spoilt a network; it then returns to the last checkpoint."""
    spike: float | None = Field(1000.0, gt=1)
    """A step spoils a network if its gradient norm is above this factor times the larger of 1 and the last median.

    None checks only for nan and inf.
    """
    keep_checkpoints: int = Field(2, ge=1)
    peak_tflops: float | None = Field(None, gt=0)
    """Peak TFLOP/s of one device, for the model FLOPs utilisation; None: a table of GPUs (engine/peak.py)."""

    @model_validator(mode="after")
    def _has_one_length_and_whole_batches(self) -> "TrainingSettings":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs: the length of the stage")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}")
        return self

    def num_steps(self, num_samples: int) -> int:
        """The number of steps of the whole stage over a split of `num_samples`."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * num_samples / self.batch_size))

    def divides(self, workers: int) -> bool:
        """Whether `workers` workers share the batch equally, in whole micro-batches."""
        return self.batch_size % ((self.micro_batch_size or 1) * workers) == 0
