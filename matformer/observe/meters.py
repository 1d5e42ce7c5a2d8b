"""Running sums with units: means of losses, rates of bytes and latents, totals that survive a resume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Mean:
    """Sum over count since the last reset, in `unit`."""

    unit: str
    total: float = 0.0
    count: float = 0.0

    def add(self, total: float, *, count: float = 1.0) -> None:
        """Add a sum and how many terms it has."""
        self.total += total
        self.count += count

    @property
    def value(self) -> float:
        """The mean; nan while nothing was counted."""
        return self.total / self.count if self.count else math.nan

    def reset(self) -> None:
        """Begin anew."""
        self.total = self.count = 0.0


class Means:
    """Named means, one row at a time: `row()` gives those that counted something, and begins anew."""

    def __init__(self, units: Mapping[str, str]) -> None:
        self._means = {name: Mean(unit) for name, unit in units.items()}

    def __getitem__(self, name: str) -> Mean:
        """The mean `name`."""
        return self._means[name]

    def add(self, name: str, total: float, *, count: float = 1.0) -> None:
        """Add to the mean `name`, which the constructor named."""
        self._means[name].add(total, count=count)

    def row(self) -> dict[str, float]:
        """Means since the last row."""
        row = {name: mean.value for name, mean in self._means.items() if mean.count}
        for mean in self._means.values():
            mean.reset()
        return row


@dataclass
class Throughput:
    """Bytes and latents over seconds, a step at a time and in all; the totals go into checkpoints."""

    seconds: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)

    def step(self, seconds: float, **amounts: float) -> dict[str, float]:
        """The row of one step that took `seconds`: seconds, <name>_per_second and <name>_seen of every amount."""
        self.seconds += seconds
        row = {"seconds": self.seconds}
        for name, amount in amounts.items():
            self.totals[name] = self.totals.get(name, 0.0) + amount
            row[f"{name}_per_second"] = amount / seconds if seconds > 0 else math.nan
            row[f"{name}_seen"] = self.totals[name]
        return row

    def state(self) -> dict[str, float]:
        """Totals so far, fit for json."""
        return {"seconds": self.seconds, **self.totals}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from `state`."""
        self.seconds = state["seconds"]
        self.totals = {name: value for name, value in state.items() if name != "seconds"}
