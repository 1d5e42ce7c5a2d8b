"""The bench of torch.compile: the same numbers in plain operations, graphs by shape, buckets. No compiler is called."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))  # tools are scripts, not a package

import compile as bench

from tests.benches import run_bench
from tests.made import plain_host, tiny_run, with_both, with_images

BATCHES = [with_both(0), with_images(1), with_both(0)]


@pytest.fixture
def units() -> dict[str, Any]:
    config = tiny_run(host="plain")
    return bench.units_of(plain_host(config).model)


def test_plain_operations_give_the_same_numbers(units: dict[str, Any]) -> None:
    assert list(units) == ["preludio/text", "coda/text", "atto layer", "coda/image"]
    for unit in units.values():
        inputs = unit.inputs(BATCHES[0])
        expected = bench.step(unit, unit.module, inputs)
        with bench.plain_operations():
            found = bench.step(unit, unit.module, unit.inputs(BATCHES[0]))
        assert len(found) == len(expected) > 1
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_new_shape_is_a_new_graph(project: Path) -> None:
    """In a process of its own: here every shape is checked, and dynamo would trace the checks."""
    asked = ["--made", "--backend", "eager", "--units", "coda/image", "atto layer", "--batches", "3", "--rounds", "1"]
    _, found = run_bench("compile", *asked, "--ways", "plain operations", project=project)
    coda, layer = found["units"]
    assert coda["graphs"] == coda["buckets"][0]["shapes"] > 1 == coda["graphs_first"] == layer["graphs"]
    assert coda["graph_breaks"] == layer["graph_breaks"] == 0
    assert coda["eager_cpu_s"] > 0 and coda["compiled_cpu_s"] > 0


def test_buckets() -> None:
    assert [bench.rounded_up(size, steps=1) for size in (0, 1, 2, 3, 64, 65)] == [0, 1, 2, 4, 64, 128]
    assert [bench.rounded_up(size, steps=2) for size in (64, 65, 80, 90, 92)] == [64, 91, 91, 91, 128]
    assert bench.bucketed([(100, 5), (120, 7), (128, 5)], steps=1) == {
        "steps": 1,
        "shapes": 1,
        "waste": pytest.approx(3 * 128 / 348 - 1),
    }
    assert bench.bucketed([(100, 5), (120, 7)], steps=0) == {"steps": 0, "shapes": 2, "waste": 0.0}


def test_a_missing_compiler_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(bench, "settle", lambda threads: None)
    assert bench.main([]) == 2
    assert "apt-get install g++" in capsys.readouterr().err


def test_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(name: str, unit: Any, batches: Any, *, way: str, **_: object) -> dict[str, Any]:
        numbers = dict.fromkeys(("eager_cpu_s", "compiled_cpu_s", "ratio", "ratio_min", "ratio_max"), 1.0)
        counts = dict.fromkeys(("graphs_first", "graphs", "graphs_when_dynamic", "graph_breaks"), 1)
        buckets = [bench.bucketed([unit.sizes(one) for one in batches], steps=steps) for steps in (0, 8, 4, 2)]
        row = {"unit": name, "way": way, "compile_cpu_s": 2.0, "steps_to_pay": None, "buckets": buckets}
        return row | numbers | counts

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "settle", lambda threads: None)
    monkeypatch.setattr(bench, "require_a_compiler", lambda: None)
    monkeypatch.setattr(bench, "real_batches", lambda config, count: BATCHES)
    assert bench.main(["--json", "--wide"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["unit"] for row in found["units"][::2]] == ["preludio/text", "coda/text", "atto layer", "coda/image"]
    assert {row["way"] for row in found["units"]} == {"as it is", "plain operations"}
