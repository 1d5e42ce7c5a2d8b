"""Tables of results: rows, means and spreads over seeds, and on which side of a reference an arm stands."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CLEAR = 2.0
"""Standard errors from which a difference is called one, if every seed has its sign."""
SIDES = ("below", "above", "not clearly apart from")
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563")
MUTED, GRID = "#6b7280", "#e5e7eb"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is words and whose others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def with_spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.fmean(values):.{digits}f} ± {spread(values):.{digits}f}"


def difference_by_seed(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Mean above the reference, seed against seed; its standard error over seeds, None of a single one."""
    by_seed = [one - other for one, other in zip(values, reference, strict=True)]
    stderr = spread(by_seed) / len(by_seed) ** 0.5 if len(by_seed) > 1 else None
    return {"value": statistics.fmean(by_seed), "stderr": stderr, "by_seed": by_seed}


def verdict(paired: Mapping[str, Any]) -> str:
    """On which side of the reference an arm stands: one of SIDES."""
    value, stderr, seeds = paired["value"], paired["stderr"], paired["by_seed"]
    clear = stderr is not None and abs(value) > CLEAR * stderr and all(one * value > 0 for one in seeds)
    return SIDES[2] if not clear else SIDES[0] if value < 0 else SIDES[1]


def sorted_out(paired: Mapping[str, Mapping[str, Any]], *, reference: str) -> str:
    """In words: which arms are below the reference, which above, which not clearly either."""
    sides: dict[str, list[str]] = {side: [] for side in SIDES}
    for arm, one in paired.items():
        sides[verdict(one)].append(f"`{arm}`")
    joined = "; ".join(f"{side} `{reference}`: {', '.join(arms)}" for side, arms in sides.items() if arms)
    return f"{joined[:1].upper()}{joined[1:]}"
