"""The bench against other libraries: equal units and parameters, a row for each way, a sentence for a missing peer."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from matformer.data.packing import document_positions
from matformer.data.patching import StaticPatcher
from matformer.data.sources import MediaSpan, TextSpan

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))  # tools are scripts, not a package

import peers
import train_step_vs_peers as bench

PARAMETERS = {"transfusion-pytorch": 10_193_232, "vibevoice": 7_592_450}


@pytest.mark.parametrize("peer", PARAMETERS)
@pytest.mark.parametrize("way", bench.WAYS)
def test_ours_has_the_parameters_of_the_peer(peer: str, way: str) -> None:
    built = bench.ours(bench.WAYS[way], peer, parameters=PARAMETERS[peer])
    assert abs(bench.count(built.model) / PARAMETERS[peer] - 1) < 0.05
    tables = sum(p.numel() for name, p in built.model.named_parameters() if "ngram" in name)
    assert (tables > 0) == bench.WAYS[way].tables


@pytest.mark.parametrize(("way", "positions"), [("ours", 85), ("patches of 1", 261)])
def test_a_row_holds_the_units_of_theirs(way: str, positions: int) -> None:
    settings = bench.WAYS[way]
    config = bench.model_config(settings, "transfusion-pytorch", parameters=PARAMETERS["transfusion-pytorch"])
    found = bench.document(0, config, patcher=StaticPatcher(settings.patch), texts=2)
    before, media, after = found.spans
    assert isinstance(before, TextSpan) and isinstance(media, MediaSpan) and isinstance(after, TextSpan)
    assert (len(before.data), media.latent.shape, len(after.data)) == (96, (16, 64), 96)
    # start, text, header, copies, closing, text: a text has its end symbol beside its 96 bytes
    text, copies = -(-97 // settings.patch), 2 if settings.media_context == "clean_copy" else 1
    assert positions == 1 + text + 1 + copies * 64 // settings.patch + 1 + text
    assert positions == document_positions(found, model=config)


@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_a_row_for_each_way(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [package for package in peers.PEERS[peer].needs if find_spec(package) is None]
    if missing:
        pytest.skip(f"{missing} not installed: pip install -e '.[bench]'")
    monkeypatch.setattr(bench, "WARM_UP", 0)
    monkeypatch.setattr(bench, "WAYS", {"ours": bench.WAYS["ours"]})
    (row,) = bench.measure(peer, "float32", 1)
    assert abs(row["ours_parameters"] / row["theirs_parameters"] - 1) < 0.05
    assert row["theirs_parameters"] == PARAMETERS[peer.removesuffix("-one-noise")]
    assert row["theirs_positions"] >= bench.TEXT * peers.PEERS[peer].texts + bench.LATENTS
    assert row["ours_cpu_s"] > 0 and row["theirs_cpu_s"] > 0 and row["ratio_min"] <= row["ratio"] <= row["ratio_max"]


def test_four_noises_cost_more_than_one() -> None:
    if find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed: pip install -e '.[dev]'")
    four, one = (
        bench.arm(peers.PEERS[name].build("float32"), "float32") for name in ("vibevoice", "vibevoice-one-noise")
    )
    assert one.flops < four.flops and one.positions == four.positions == 160


def test_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"ratio": 0.5, "ratio_min": 0.4, "ratio_max": 0.6} | dict.fromkeys(
        ("ours_cpu_s", "theirs_cpu_s", "ours_parameters", "theirs_parameters", "ours_positions", "theirs_positions"), 1
    )
    row |= dict.fromkeys(("ours_gflop", "theirs_gflop", "ours_gflops", "theirs_gflops", "matmul_gflops"), 1.0)

    def measure(name: str, dtype: str, steps: int) -> list[dict[str, object]]:
        return [{"peer": name, "ours": way, "dtype": dtype, **row} for way in bench.WAYS]

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "require", lambda name: None)
    monkeypatch.setattr(bench, "settle", lambda threads: None)
    assert bench.main(["--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [case["peer"] for case in result["cases"]] == ["transfusion-pytorch", "vibevoice"]
    assert {"peer", "dtype", "ours_cpu_s", "theirs_cpu_s", "ratio"} <= set(result["cases"][0])
    assert len(result["controls"]) == 3 * len(bench.WAYS) - 2


def test_a_missing_peer_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    absent = replace(peers.PEERS["transfusion-pytorch"], needs=("no_such_package",))
    monkeypatch.setitem(peers.PEERS, "transfusion-pytorch", absent)
    assert bench.main(["--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "no_such_package" in printed.err and len(printed.err.splitlines()) == 1
