"""Settings of the evaluation."""

from typing import Literal

from pydantic import Field

from dpkd.config import Config


class EpisodeSettings(Config):
    """N-way K-shot episodes, equal for all models."""

    way: int = Field(5, ge=2)
    shots: tuple[int, ...] = (1, 5)
    queries: int = Field(15, ge=1)
    episodes: int = Field(2000, ge=2)
    classifier: Literal["nearest_centroid", "logistic"] = "nearest_centroid"
    transform: Literal["l2", "centred_l2", "power_l2"] = "power_l2"
    """Transform of an embedding before comparison; `centred_l2` subtracts the training split's mean."""


class ProbeSettings(Config):
    """kNN and linear probe (scikit-learn), fitted and tested on parts of one split."""

    neighbours: int = Field(20, ge=1)
    linear: bool = True
    train_fraction: float = Field(0.5, gt=0, lt=1)
    max_samples: int = Field(10_000, ge=4)
    """Maximum number of samples of a split, drawn at random."""
