"""The exponential moving average of the weights, stored like the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from matformer.hosts.base import Host, Reader, swapped


class Average:
    """decay = min(d, (1 + n) / (10 + n)) after n steps. Source: SEMANTICS, Losses and numbers."""

    def __init__(self, host: Host, *, decay: float) -> None:
        self.host, self.decay = host, decay
        self.values: dict[str, Tensor] = {name: weight.float().clone() for name, weight in host.local_weights()}

    @torch.no_grad()
    def update(self, num_steps: int) -> None:
        """Move towards the weights of step `num_steps` (counted from 1)."""
        share = 1.0 - min(self.decay, (1 + num_steps) / (10 + num_steps))
        weights = dict(self.host.local_weights())
        averages = [self.values[name] for name in weights]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            averages, [weight.float() for weight in weights.values()], share
        )

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model's weights are the average."""
        with torch.no_grad(), swapped(self.host, self.values):
            yield

    def state(self) -> dict[str, Tensor]:
        """Global tensors. Collective."""
        return self.host.gather_stored(self.values)

    def load(self, read: Reader) -> None:
        """Take the average of a checkpoint."""
        self.values = {name: value.float() for name, value in self.host.scatter_stored(read, "ema").items()}
