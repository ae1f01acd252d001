"""Settings of the run folder."""

from pydantic import ConfigDict, Field, field_validator

from dpkd.config import Config, PathText


class RunSettings(Config):
    """The run folder, the place of checkpoints, the run to start from, and the seed of all random draws."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)
    dir: PathText = "runs/default"
    """A path that every worker sees."""
    from_: PathText | None = Field(None, alias="from")
    """Folder of another run, whose images, prior maps and trained teachers this run uses, if settings are equal."""
    checkpoints: PathText | None = None
    """A path or any fsspec URL that only this run uses; None means a folder in the run folder."""
    seed: int = Field(0, ge=0)

    @field_validator("dir")
    @classmethod
    def _is_a_path(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(f"{value!r} is a URL: give a path on a disk that all workers see")
        return value
