"""The bench of one GPU: its whole path on a CPU with a small model; what it says without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))  # tools are scripts, not a package

import gpu
import synthetic

from matformer.data.counts import counts_of
from matformer.parcels import Kind
from tests.benches import run_bench
from tests.made import MODEL


def test_every_measurement_runs(project: Path) -> None:
    """In a process of its own, as the host joins a world."""
    asked = ["--small", "--device", "cpu", "--microbatches", "2", "--steps", "1"]
    _, found = run_bench("gpu", *asked, project=project)
    steps, parts = found["steps"], {row["part"]: row for row in found["parts"]}
    assert [row["mixture"] for row in steps] == ["mixed", "text"]
    assert all(row["flops"] == found["expected"][row["mixture"]]["flops"] for row in steps)
    media = {f"{part}/{name}" for part in ("preludio", "coda") for name in ("text", "image", "audio")}
    assert media | {"atto", "mask and positions", "all Code, router and loss", "optimizer"} == set(parts)
    assert all(parts[name]["flops"] > 0 and parts[name]["seconds"] > 0 for name in media | {"atto"})
    trunks = {row["trunk"]: row["flops"] for row in found["trunks"]}
    assert {"ours, mixed", "ours, text", "megatron-core's GPT, torch's attention"} <= set(trunks)
    assert trunks["ours, text"] <= trunks["megatron-core's GPT, torch's attention"], "documents do not see each other"
    assert not found["meets_the_bar"] and found["matmul_tflops"] > 0


def test_without_a_gpu_it_says_what_would_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--json", "--latents", "2048", "--microbatches", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert not found["ran"] and "nothing ran" in "".join(lines)
    mixed = found["expected"]["mixed"]
    assert 1.2e9 < mixed["parameters"] < 1.4e9 and mixed["memory_bytes"] > 16 * mixed["parameters"]
    assert mixed["flops"] == sum(mixed["flops_by_part"].values()) > 6 * 2048 * 1.1e9
    assert gpu.main(["--device", "cuda"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_rows_are_full_and_hold_every_modality() -> None:
    rows = synthetic.packed_rows(MODEL, rows=3, length=512, seed=1)
    batch = synthetic.batch_of(MODEL, rows, length=512, step=0)
    assert (batch.grid.kind_BS != Kind.PAD).all()
    counts = counts_of(batch, MODEL)
    assert counts.text.symbols and all(one.noised and one.clean for one in counts.media.values())
    text = synthetic.batch_of(
        MODEL, synthetic.packed_rows(MODEL, rows=1, length=512, mixture="text"), length=512, step=0
    )
    assert set(text.grid.kind_BS.unique().tolist()) == {Kind.START, Kind.TEXT}
