"""The bench of the hosted trunk against the plain one: in a process of its own, as a host joins a world."""

from __future__ import annotations

from pathlib import Path

from tests.benches import run_bench


def test_a_row_for_each_shape(project: Path) -> None:
    asked = ["--shapes", "64x48", "128x64", "--layers", "1", "--steps", "1"]
    printed, found = run_bench("trunk_tax", *asked, project=project)
    rows = found["cases"]
    assert [(row["width"], row["latents"]) for row in rows] == [(64, 48), (128, 64)]
    assert all(row["hosted_cpu_s"] > 0 and row["plain_cpu_s"] > 0 and row["ratio"] > 0 for row in rows)
    assert "µs a layer" in printed
