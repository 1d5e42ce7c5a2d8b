"""Tables of results: rows, means and spreads over seeds, and on which side of a reference an arm stands."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

from matformer.engine.baselines import ratio

CLEAR = 2.0
"""Standard errors from which a difference is called one, if every seed has its sign and the error is over documents."""
SIDES = ("below", "above", "not clearly apart from")


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


def loss_a_unit(run: Mapping[str, Any]) -> float:
    """Of all documents of a run's columns."""
    return sum(run["losses"]) / sum(run["sizes"])


def clear_over_seeds(seeds: int) -> float:
    """Standard errors from which a difference is called one where the error itself comes from a few seeds.

    Student's t, two sides, 5 %: 4.30 of three seeds, where 2 would call 18 % of nothing a difference.
    """
    return float(student.ppf(0.975, seeds - 1)) if seeds > 1 else math.inf


def difference_by_seed(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Mean above the reference, seed against seed; its standard error over seeds, None of a single one."""
    by_seed = [one - other for one, other in zip(values, reference, strict=True)]
    stderr = spread(by_seed) / len(by_seed) ** 0.5 if len(by_seed) > 1 else None
    limit = clear_over_seeds(len(by_seed))
    return {"value": statistics.fmean(by_seed), "stderr": stderr, "by_seed": by_seed, "limit": limit}


def difference_by_document(
    runs: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], *, loss: str, size: str
) -> dict[str, Any]:
    """Loss a unit above the reference's on the same documents, seed against seed; stderr over documents and seeds.

    A run is columns: `keys`, and under the names `loss` and `size` a number a document.
    """
    assert all(one["keys"] == reference[0]["keys"] and one[size] == reference[0][size] for one in (*runs, *reference))
    sizes = np.array(reference[0][size])
    above_ED = np.array([one[loss] for one in runs]) - np.array([one[loss] for one in reference])
    found = ratio(above_ED.mean(0), sizes)
    by_seed = above_ED.sum(1) / sizes.sum()
    of_seeds = float(by_seed.std(ddof=1)) / len(by_seed) ** 0.5 if len(by_seed) > 1 else 0.0
    stderr = float(np.hypot(found.stderr, of_seeds)) if np.isfinite(found.stderr) else None
    return {"value": found.value, "stderr": stderr, "stderr_of_seeds": of_seeds, "by_seed": by_seed.tolist()}


def difference_cell(paired: Mapping[str, Any] | None) -> str:
    """A difference and its standard error; empty where there is none."""
    if paired is None:
        return ""
    stderr = "" if paired["stderr"] is None else f" ({paired['stderr']:.3f})"
    return f"{paired['value']:+.3f}{stderr}"


def signs_cell(paired: Mapping[str, Any] | None) -> str:
    """How many seeds are above and below the reference; empty where there is none."""
    if paired is None:
        return ""
    above = sum(one > 0 for one in paired["by_seed"])
    return f"{above} / {len(paired['by_seed']) - above}"


def verdict(paired: Mapping[str, Any]) -> str:
    """On which side of the reference an arm stands: one of SIDES."""
    value, stderr, seeds = paired["value"], paired["stderr"], paired["by_seed"]
    limit = paired.get("limit", CLEAR)
    clear = stderr is not None and abs(value) > limit * stderr and all(one * value > 0 for one in seeds)
    return SIDES[2] if not clear else SIDES[0] if value < 0 else SIDES[1]


def sorted_out(paired: Mapping[str, Mapping[str, Any]], *, reference: str) -> str:
    """In words: which arms are below the reference, which above, which not clearly either."""
    sides: dict[str, list[str]] = {side: [] for side in SIDES}
    for arm, one in paired.items():
        sides[verdict(one)].append(f"`{arm}`")
    joined = "; ".join(f"{side} `{reference}`: {', '.join(arms)}" for side, arms in sides.items() if arms)
    return f"{joined[:1].upper()}{joined[1:]}"
