"""Settings of the stages, each composed of the parts it uses."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dpkd.data.settings import (
    AllLabels,
    AugmentSettings,
    GivenSplits,
    LoaderSettings,
    Source,
    Splits,
    VisibleLabels,
)
from dpkd.evaluation.settings import EpisodeSettings, ProbeSettings
from dpkd.models.settings import ModelSettings
from dpkd.objectives.settings import LogitDistillation, StudentObjective, Supervised, TeacherObjective
from dpkd.priors import DEFAULT_PRIORS, Prior
from dpkd.priors.extractor import sealed
from dpkd.section import Section
from dpkd.train.settings import EngineSettings, OptimizerSettings, ScheduleSettings, TrainingSettings


class DataSettings(Section):
    """The images: where they come from, how they are split and packed, and at what size networks see them."""

    source: Source | None = None
    """None uses the shards that stand at `shards` already."""
    shards: str | None = None
    """Where the packed data set stands, local or any fsspec URL; none puts it into the run folder."""
    splits: Splits = GivenSplits()
    group_pattern: str | None = None
    """Regular expression whose first group, found in a sample's path, names its group (patient, sign, tile)."""
    samples_per_shard: int = Field(1024, ge=1)
    bad_limit: float = Field(0.01, ge=0, le=1)
    """Largest share of samples that may be quarantined before the run stops."""
    image_size: int = Field(64, ge=16)
    map_size: int | None = Field(None, ge=4)
    """Side of the prior maps in a batch; none takes a quarter of the image size."""
    train: str = "train"
    """Split that networks are trained on."""
    val: str = "val"
    """Split for choices, evaluated during training."""
    test: str = "test"
    """Split for the report, evaluated at the end."""
    labels: VisibleLabels = AllLabels()
    attributes: str | None = None
    """Table of what experts say of the classes, `.yaml` or `.csv` (`dpkd/data/attributes.py` draws it)."""
    loader: LoaderSettings = LoaderSettings()

    @field_validator("source", mode="before")
    @classmethod
    def _source_from_path(cls, value: object) -> object:
        """A plain path or URL stands for the source that its ending shows."""
        if not isinstance(value, str):
            return value
        if re.search(r"\.(csv|tsv|jsonl|parquet)(\?.*)?$", value):
            return {"kind": "table", "path": value}
        return {"kind": "shards" if value.endswith(".tar") else "folder", "path": value}


class PrepareSettings(Section):
    """The prior maps computed once for every sample."""

    name: str = Field("default", pattern=r"^\w[\w.-]*$")
    """Name of the prior set: `<shards>/priors/<name>`."""
    priors: tuple[Prior, ...] = DEFAULT_PRIORS

    def sealed(self) -> "PrepareSettings":
        """The same, with the priors bound to the weights they name; raises `UserError` that names weights missing."""
        return self.model_copy(update={"priors": sealed(self.priors)})


class TeachSettings(Section):
    """The teacher and how it is trained."""

    model: ModelSettings
    objectives: tuple[TeacherObjective, ...] = (Supervised(),)
    augment: AugmentSettings = AugmentSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    engine: EngineSettings = EngineSettings()
    training: TrainingSettings = TrainingSettings(epochs=100)


class StudentSettings(Section):
    """One student: its network, losses, optimizer, schedule and engine."""

    model: ModelSettings
    losses: tuple[StudentObjective, ...] = (Supervised(), LogitDistillation())
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    engine: EngineSettings = EngineSettings()
    baseline: bool = False
    """Also train the same network on labels alone: same images and steps, mean pooling; see `baselines`."""


class DistillSettings(Section):
    """Online distillation: one forward of the teacher serves every student."""

    teacher: Literal["frozen", "live"] = "frozen"
    """`live` goes on learning the teacher's own objectives in the same steps."""
    students: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], StudentSettings] = Field(min_length=1)
    augment: AugmentSettings = AugmentSettings()
    training: TrainingSettings = TrainingSettings(epochs=100)


class EvaluateSettings(Section):
    """What is measured on the validation and test splits, for teacher, students and baselines alike."""

    episodes: EpisodeSettings = EpisodeSettings()
    episodes_while_training: int = Field(400, ge=2)
    probes: ProbeSettings | None = ProbeSettings()


class ExportSettings(Section):
    """The forms in which students leave."""

    onnx: bool = True
    tolerance: float = Field(1e-3, gt=0)
    """Largest difference between ONNX and PyTorch embeddings, relative to the largest of them."""


class LauncherSettings(Section):
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
    """How often workers start again after a failure; counted anew whenever a later checkpoint stands."""
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


class RunSettings(Section):
    """The run folder and the seed that everything random is drawn from."""

    dir: str = "runs/default"
    """A path that every worker sees."""
    checkpoints: str | None = None
    """Where checkpoints stand: a path, or any fsspec URL of a place that is this run's alone; none puts them into the
    run folder."""
    seed: int = Field(0, ge=0)

    @field_validator("dir")
    @classmethod
    def _is_a_path(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(
                f"{value!r} is a URL, and a run folder is a path: give one on a disk that all workers see; "
                "data.source, data.shards and run.checkpoints may be URLs"
            )
        return value
