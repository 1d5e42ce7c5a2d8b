"""Learning-rate schedules."""

from __future__ import annotations

import math

from matformer.config.schema import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then a cosine to min_lr_ratio, or wsd: constant, then 1 - sqrt.

    Source of wsd and its square-root decay: Hägele et al. 2024, "Scaling laws beyond fixed training durations".
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "cosine":
        done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
        shape = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    else:
        decay_steps = max(1, round(train.decay_fraction * train.steps))
        done = (step - (train.steps - decay_steps)) / decay_steps
        shape = 1.0 - math.sqrt(min(1.0, max(0.0, done)))
    return train.lr * (train.min_lr_ratio + (1.0 - train.min_lr_ratio) * shape)
