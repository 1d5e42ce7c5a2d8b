"""What every bench does: take turns, hold pairs against each other, print a table and a line of JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def in_turn(arms: Mapping[str, Callable[[int], float]], rounds: int, *, warm_up: int) -> dict[str, list[float]]:
    """Seconds of every arm, called with the number of the round: A B, B A, A B, ...; warm-up rounds are dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(warm_up + rounds):
        for name in list(arms) if number % 2 else reversed(list(arms)):
            taken = arms[name](number)
            if number >= warm_up:
                seconds[name].append(taken)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The median of above / below, pair by pair, and its range."""
    found = [one / other for one, other in zip(above, below, strict=True)]
    return {"ratio": statistics.median(found), "ratio_min": min(found), "ratio_max": max(found)}


def shown(result: Mapping[str, Any]) -> str:
    """A ratio with its range."""
    return f"{result['ratio']:.3f} ({result['ratio_min']:.3f} … {result['ratio_max']:.3f})"


def finish(table: Table, result: Mapping[str, Any], *, as_json: bool, width: int | None = None) -> int:
    """Print the table, and if asked one JSON line last; the exit code."""
    Console(width=width).print(table)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0
