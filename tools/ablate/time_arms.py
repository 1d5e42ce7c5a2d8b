"""The arms of the ablation of time conditionings: an objective of media, and how the network is told t."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import get_args

from jobs import arm_file, load_checked

from matformer.config.schema import MediaObjective, RunConfig, TimeConditioning

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ablation" / "time"
OBJECTIVES: tuple[str, ...] = get_args(MediaObjective)
CONDITIONINGS: tuple[str, ...] = get_args(TimeConditioning)
OF_THE_CODA: tuple[str, ...] = ("none", "add", "adaln_preludio_coda")
"""Under `next_latent` the Coda alone is told t."""
ARMS = (
    *(f"{objective}-{conditioning}" for objective, conditioning in product(OBJECTIVES, CONDITIONINGS)),
    *(f"next_latent-{conditioning}" for conditioning in OF_THE_CODA),
)
REFERENCE = "add"
"""The conditioning that the others of the same objective are held against."""


def config_file(arm: str) -> Path:
    """The run file of an arm. Raises ConfigError if there is none."""
    return arm_file(arm, arms=ARMS, folder=FOLDER)


def load_arm(arm: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked config of an arm. Raises ConfigError."""
    return load_checked(config_file(arm), overrides)
