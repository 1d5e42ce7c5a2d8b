"""No training step leaves Python objects behind (on torch from 2.12 AdamW foreach over FSDP2's DTensors is said to)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))  # tools are scripts, not a package

import growth as bench

from matformer.engine.step import optimizer_step
from tests.benches import run_bench
from tests.made import mixed_documents, one_a_row, plain_host, tiny_run
from tests.ranks import growth
from tests.ranks.launcher import Ranks

FEW = 1.0  # objects a step: a cache that fills once is none


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hosted_steps_leave_no_objects_behind(dtype: str) -> None:
    with Ranks(1) as ranks:
        (found,) = ranks.run(growth.grown_in_training, dtype)
    assert found["objects"] < FEW


def test_plain_steps_leave_no_objects_behind() -> None:
    config = tiny_run(train={"global_batch": 4}, host="plain")
    host, documents = plain_host(config), mixed_documents()
    batches = [one_a_row(documents[:2]), one_a_row(documents[2:4])]
    found = bench.grown(lambda: optimizer_step(host, batches, config=config, step=0), steps=20)
    assert found["objects"] < FEW


@pytest.mark.parametrize("kind", bench.KINDS)
def test_adamw_leaves_no_objects_behind(kind: str) -> None:
    found = bench.measure("plain tensors", kind, tensors=8, steps=20)
    assert found["objects"] < FEW


def test_a_row_for_each_optimizer(project: Path) -> None:
    """The script, in a process of its own, as DTensors join a world."""
    _, found = run_bench("growth", "--steps", "10", "--tensors", "2", project=project)
    rows = found["cases"]
    assert [(row["on"], row["optimizer"]) for row in rows] == [
        (on, kind) for on in bench.PLACES for kind in bench.KINDS
    ]


def test_a_leak_would_be_seen() -> None:
    kept: list[list[int]] = []
    found = bench.grown(lambda: kept.extend([[], []]), steps=20)
    assert found["objects"] >= 2
