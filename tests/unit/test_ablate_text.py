"""The ablation of text front ends: arms that run, FLOPs counted right, a document that says what is there."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from matformer.config.load import save_resolved
from matformer.config.schema import RunConfig
from matformer.data.packing import build_batch
from matformer.errors import ConfigError
from matformer.layers.local_attention import Folded, local_view
from matformer.parcels import Batch
from tests.made import document, plain_host, tiny_run

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "ablate"))  # tools are scripts, not a package

import arms
import cost
import document as paper
import jobs
import text_frontends

TEXTS = (b"a text of some words, longer than a window", b"\xc3\xa9 and another", b"third")


def text_run(*, layers: int = 2, coda_layers: int = 2) -> RunConfig:
    """The tiny model without media, on the plain host."""
    config = tiny_run(layers=layers, host="plain")
    text = config.model.text.model_copy(update={"coda_layers": coda_layers})
    return config.model_copy(update={"model": config.model.model_copy(update={"media": {}, "text": text})})


def text_batch(config: RunConfig, texts: Sequence[bytes] = TEXTS, *, length: int = 20) -> Batch:
    documents = [document(str(i), text) for i, text in enumerate(texts)]
    return build_batch(documents, model=config.model, sequence_latents=length)


def counted(config: RunConfig, batch: Batch) -> cost.StepFlops:
    host = plain_host(config)
    return cost.step_flops(host, host.model, [batch], config=config, step=0)


def products_of_atto(config: RunConfig, batch: Batch) -> int:
    """Multiplications of one forward of the trunk."""
    atto, (rows, length) = config.model.atto, batch.grid.kind_BS.shape
    H, shared = atto.width, atto.width * atto.kv_heads // atto.heads
    matrices = rows * length * (2 * H * H + 2 * H * shared + 3 * H * atto.ffn_width)
    return atto.layers * (matrices + 2 * rows * length * length * H)


def products_outside(config: RunConfig, batch: Batch) -> int:
    """Of Preludio, Coda, head and router."""
    text, H = config.model.text, config.model.atto.width
    D, slots = text.width, H // text.width
    U, P = batch.text.symbol_U.numel(), batch.text.slot_P.numel()
    view = local_view(batch.text.piece_U, batch.text.place_U, window=text.window, head_size=D // text.heads, tiled=True)
    assert not isinstance(view.seen, Folded)
    seen = sum(tile.bias_QT.numel() for tile in view.seen)
    local = U * (4 * D * D + 3 * D * text.ffn_width) + 2 * seen * D
    pool = 2 * U * D * D + 2 * P * slots * D * D
    reader = 2 * U * D * D + 2 * P * slots * D * D
    heads = U * D * 257 + batch.route.slot_R.numel() * H * 3
    return text.preludio_layers * local + pool + text.coda_layers * (local + reader) + heads


@pytest.mark.parametrize(("layers", "coda_layers"), [(1, 1), (2, 2), (4, 3)])
def test_flops_are_those_of_the_closed_form(layers: int, coda_layers: int) -> None:
    """A multiplication and an addition a product, once forward and twice backward."""
    config = text_run(layers=layers, coda_layers=coda_layers)
    batch = text_batch(config)
    found = counted(config, batch)
    assert found.atto == 6 * products_of_atto(config, batch)
    assert found.rest == 6 * products_outside(config, batch)
    assert found.unseen == 12 * batch.text.symbol_U.numel() * config.model.atto.width * (1 + coda_layers)


def test_flops_outside_the_atto_go_with_the_bytes_and_those_inside_with_the_positions() -> None:
    config = text_run()
    one, two = text_batch(config, TEXTS[:1] * 20), text_batch(config, TEXTS[:1] * 40)
    few, many = counted(config, one), counted(config, two)
    assert many.atto == 2 * few.atto
    assert many.rest == pytest.approx(2 * few.rest, rel=0.05)  # tiles are of even size
    longer = counted(config, text_batch(config, TEXTS[:1] * 20, length=40))
    assert longer.atto > 2 * few.atto and longer.rest == few.rest


@pytest.mark.parametrize("arm", arms.ARMS)
def test_an_arm_is_a_config_that_can_run(arm: str) -> None:
    config, reference = arms.load_arm(arm), arms.load_arm(arms.REFERENCE)
    assert config.name == arm
    assert config.model.atto == reference.model.atto
    assert config.train == reference.train
    assert config.eval == reference.eval and config.data.sources == reference.data.sources


def test_every_config_is_an_arm_or_their_base() -> None:
    assert {file.stem for file in arms.FOLDER.glob("*.yaml")} == {*arms.ARMS, "base"}


def test_patches_of_another_length_are_refused_unless_they_come_as_they_are() -> None:
    arms.require_matched({"static": 4.1, "space": 5.4})
    with pytest.raises(ConfigError, match="the patches of bpe must hold 4 symbols within 5%"):
        arms.require_matched({"static": 4.0, "bpe": 3.7})


def a_cost(**numbers: float) -> cost.Cost:
    values = dict.fromkeys(cost.Cost.__dataclass_fields__, 1.0) | {"bytes_a_sequence": 1000.0} | numbers
    return cost.Cost(**values)  # pyright: ignore[reportArgumentType]


def test_steps_see_the_same_bytes_or_spend_what_the_reference_does() -> None:
    costs = {
        "static": a_cost(bytes_a_step=4000.0, flops_a_step=10.0),
        "dear": a_cost(bytes_a_step=4000.0, flops_a_step=20.0),
        "wide": a_cost(bytes_a_step=8000.0, flops_a_step=10.0),
    }
    assert text_frontends.steps_for(costs, num_bytes=400_000) == {
        "bytes": {"static": 100, "dear": 100, "wide": 50},
        "flops": {"static": 100, "dear": 50, "wide": 100},
    }


def test_another_context_is_refused() -> None:
    text_frontends.require_same_context({"static": a_cost(), "space": a_cost(bytes_a_sequence=1040.0)})
    with pytest.raises(ConfigError, match="a sequence of space must hold 1000 bytes within 5%"):
        text_frontends.require_same_context({"static": a_cost(), "space": a_cost(bytes_a_sequence=1100.0)})


def test_a_difference_is_taken_document_by_document() -> None:
    reference = [
        {"bits": [20.0, 60.0], "bytes": [10, 20], "keys": ["a", "b"]},
        {"bits": [22.0, 62.0], "bytes": [10, 20], "keys": ["a", "b"]},
    ]
    better = [
        {"bits": [19.0, 58.0], "bytes": [10, 20], "keys": ["a", "b"]},
        {"bits": [21.0, 60.0], "bytes": [10, 20], "keys": ["a", "b"]},
    ]
    found = text_frontends.difference(better, reference)
    assert found["value"] == pytest.approx(-0.1) and found["by_seed"] == pytest.approx([-0.1, -0.1])
    assert found["stderr"] == pytest.approx(0.0, abs=1e-12)  # a tenth of a bit a byte on each, whatever they are like


def test_a_run_is_done_when_it_finished_under_the_same_config(tmp_path: Path) -> None:
    job = jobs.Job("static", 1, 12, arms.config_file("static"), tmp_path)
    assert job.folder == tmp_path / "static-seed1-steps12" and not jobs.finished(job)
    job.folder.mkdir()
    save_resolved(arms.load_arm("static", job.keys), job.folder / "config.yaml")
    assert not jobs.finished(job)
    (job.folder / "finished").touch()
    assert jobs.finished(job)
    other = jobs.Job("static", 1, 12, arms.config_file("static"), tmp_path, overrides=("train.lr=1e-3",))
    assert not jobs.finished(other)


def results(*, num_bytes: int = 400_000) -> dict[str, Any]:
    """Two arms, two seeds, both tables."""

    def own(*, steps: int, bits: Sequence[float]) -> list[dict[str, Any]]:
        run = {"steps": steps, "bytes": 4e5, "flops": 4e12}
        return [
            {"seed": seed, **run, "bits_per_byte": value, "curve": [[2e5, value + 1], [4e5, value]]}
            for seed, value in enumerate(bits)
        ]

    facts = {"symbols_a_latent": 3.98, "parameters": 5e6, "flops_a_byte": 9.7e6, "atto_share": 0.55} | {
        "unseen_share": 0.001,
        "bytes_a_sequence": 1000.0,
        "cpu_seconds_a_mb": 200.0,
    }
    worse = {"value": 0.2, "stderr": 0.01, "by_seed": [0.1, 0.3]}
    unclear = {"value": -0.2, "stderr": 0.01, "by_seed": [0.1, -0.5]}
    return {
        "made": {
            "command": "python it",
            "date": "2026-11-26",
            "machine": "2 cores",
            "torch": "2",
            "bytes": num_bytes,
            "seeds": [0, 1],
            "heldout_documents": 500,
            "heldout_bytes": 200_000,
            "curve_bytes": 10_000,
            "vocabulary": 30_000,
            "thresholds": {"entropy": 2.5},
        },
        "reference": "static",
        "arms": {"static": facts, "bpe": facts | {"symbols_a_latent": 4.05}},
        "baselines": {"order-0 bytes": 4.9, "order-2 bytes": 3.3},
        "tables": {
            "bytes": {"static": own(steps=100, bits=(4.0, 4.2)), "bpe": own(steps=98, bits=(4.2, 4.4))},
            "flops": {"static": own(steps=100, bits=(4.0, 4.2)), "bpe": own(steps=80, bits=(3.8, 4.0))},
        },
        "paired": {"bytes": {"bpe": worse}, "flops": {"bpe": unclear}},
    }


def test_the_document_says_what_is_there() -> None:
    text = paper.render(results(), picture="it.png")
    by_bytes, by_flops = text.split("## Equal FLOPs")
    rows = [line for line in by_bytes.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["static", "bpe"]  # best first
    assert "| 100 | 0.400 | 4.00 | 4.100 ± 0.141 |  |  | 200 |" in rows[0]
    assert "| 98 | 0.400 | 4.00 | 4.300 ± 0.141 | +0.200 (0.010) | 2 / 0 | 200 |" in rows[1]
    assert "Lowest: `static`, 4.100 bits per byte. Above `static`: `bpe`" in by_bytes
    assert "Without a model, lower than every arm: order-2 bytes." in by_bytes
    assert "Not clearly apart from `static`: `bpe`" in by_flops  # the seeds do not agree
    assert "| *order-2 bytes* |  |  |  |  |  |  | 3.300 |  |  |  |" in text
    assert "![Held-out bits per byte](it.png)" in text and "30,000" in text and "`entropy` 2.5 nats" in text


def test_every_row_has_as_many_cells_as_the_head() -> None:
    lines = [line for line in paper.render(results(), picture="it.png").splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(paper.HEAD) + 1}


def test_a_short_run_is_called_one() -> None:
    assert "**These are short runs**: 0.4 MB of text in 100 steps" in paper.render(results(), picture="it.png")
    assert "short runs" not in paper.render(results(num_bytes=200_000_000), picture="it.png")


def test_one_seed_has_no_spread_and_is_written_all_the_same(tmp_path: Path) -> None:
    alone = copy.deepcopy(results())
    for table in alone["tables"].values():
        for arm in table:
            del table[arm][1:]
    for paired in alone["paired"].values():
        paired["bpe"] |= {"stderr": None, "by_seed": [0.1]}
    paper.write(alone, tmp_path / "docs" / "it.md")
    assert "4.000 ± 0.000" in (tmp_path / "docs" / "it.md").read_text()
    assert (tmp_path / "docs" / "it.png").stat().st_size > 1000
