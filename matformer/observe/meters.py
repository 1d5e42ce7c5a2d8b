"""Rates of bytes and latents, and totals that survive a resume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


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
