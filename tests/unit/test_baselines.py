"""Baselines: counts give the numbers of hand and theory, and what is scored is what evaluation scores."""

from __future__ import annotations

import io
import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest

from matformer.config.schema import RunConfig
from matformer.data.shards import ShardWriter
from matformer.engine.baselines import TIMES, ByteCounts, compute_baselines, gaussian_flow_loss, xz_bits_per_byte

CORPUS = [b"abab", b"ba", b"abc"]


def fitted(documents: list[bytes]):
    counts = ByteCounts()
    counts.add(b"".join(documents), np.cumsum([0, *map(len, documents)]))
    return counts.fit()


def by_hand(document: bytes, corpus: list[bytes], *, order: int) -> float:
    """Bits of one document by the recursion of the docstring, with dicts."""

    def history(symbols: list[int], i: int) -> tuple[int, ...]:
        return tuple(([-1] * order + symbols)[i : i + order])

    def probability(symbol: int, seen: tuple[int, ...]) -> float:
        followers = [s[i] for s in texts for i in range(len(s)) if history(s, i)[order - len(seen) :] == seen]
        count = followers.count(symbol)
        if not seen:
            return (count + 0.5) / (len(followers) + 0.5 * 257)
        different = len(set(followers))
        below = probability(symbol, seen[1:])
        return (count + different * below) / (len(followers) + different) if followers else below

    texts = [[*text, 256] for text in corpus]
    symbols = [*document, 256]
    return -sum(math.log2(probability(symbol, history(symbols, i))) for i, symbol in enumerate(symbols))


@pytest.mark.parametrize("order", [0, 2])
def test_byte_models_are_the_formula_of_their_docstring(order: int) -> None:
    held = [b"abz", b"b"]
    expected = sum(by_hand(document, CORPUS, order=order) for document in held) / 4
    assert fitted(CORPUS).score(held)[f"order{order}"].value == pytest.approx(expected, rel=1e-6)


def test_every_context_is_a_distribution() -> None:
    bits = fitted(CORPUS).order2_bits.reshape(257, 257, 257)
    for context in ((256, 256), (256, 97), (97, 98), (7, 9)):
        assert np.exp2(-bits[context]).sum() == pytest.approx(1.0, abs=1e-5)


def test_a_document_does_not_see_the_one_before() -> None:
    models = fitted(CORPUS)
    one, two = models.score([b"ab"])["order2"].value, models.score([b"ba"])["order2"].value
    assert models.score([b"ab", b"ba"])["order2"].value == pytest.approx((one + two) / 2)


def test_blocks_add_up_to_their_whole() -> None:
    parts = ByteCounts()
    for document in CORPUS:
        parts.add(document, np.array([0, len(document)]))
    assert (parts.fit().order2_bits == fitted(CORPUS).order2_bits).all()


def test_xz_counts_the_whole_file() -> None:
    data = [b"to be ", b"or not to be " * 20]
    size = len(lzma.compress(b"".join(data), preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits_per_byte(data) == 8 * size / 266


@pytest.mark.parametrize("covariance", ["full", "channel"])
@pytest.mark.parametrize("s", [0.25, 4.0])
def test_gaussian_error_is_the_theorys(covariance, s: float) -> None:
    draws = np.random.default_rng(0)
    train, held = (draws.normal(3.0, math.sqrt(s), (40_000, 1)) for _ in range(2))
    score = gaussian_flow_loss(train, held, covariance=covariance)
    expected = np.mean([s / ((1 - t) ** 2 * s + t**2) for t in TIMES])
    assert score.value == pytest.approx(expected, abs=5 * score.stderr)
    assert score.stderr < 0.02 * expected


def test_full_covariance_uses_what_channels_share() -> None:
    draws = np.random.default_rng(1)
    mixing = draws.normal(size=(2, 6))
    train, held = (draws.normal(size=(4000, 2)) @ mixing for _ in range(2))
    full = gaussian_flow_loss(train, held, covariance="full").value
    assert full < 0.7 * gaussian_flow_loss(train, held, covariance="channel").value
    variance = np.maximum(np.linalg.eigvalsh(mixing.T @ mixing), 0)
    expected = np.mean([variance / ((1 - t) ** 2 * variance + t**2) for t in TIMES])
    assert full == pytest.approx(expected, rel=0.05)


def test_fewer_samples_than_dims_are_shrunk_to_something_finite() -> None:
    draws = np.random.default_rng(2)
    train, held = draws.normal(size=(8, 64)), draws.normal(size=(32, 64))
    ideal = np.mean([1 / ((1 - t) ** 2 + t**2) for t in TIMES])
    assert ideal < gaussian_flow_loss(train, held).value < 1.5 * ideal


def test_cells_of_a_span_are_one_sample() -> None:
    draws = np.random.default_rng(3)
    held = np.repeat(draws.normal(size=(50, 4)), 20, axis=0)
    alone = gaussian_flow_loss(held, held, covariance="channel")
    grouped = gaussian_flow_loss(held, held, covariance="channel", sample=np.repeat(np.arange(50), 20))
    assert grouped.value == pytest.approx(alone.value)
    assert grouped.stderr > 2 * alone.stderr


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_text(folder: Path, documents: list[bytes]) -> None:
    members = {
        "bytes": b"".join(documents),
        "docs.npy": npy(np.cumsum([0, *map(len, documents)], dtype=np.int64)),
        "json": json.dumps([{} for _ in documents]).encode(),
    }
    with ShardWriter(folder, form="text") as writer:
        writer.add("block", members)


def write_images(folder: Path, *, count: int, seed: int) -> None:
    draws = np.random.default_rng(seed)
    facts = {"modality": "image", "texts": [{"lang": "en", "text": "a dot"}]}
    with ShardWriter(folder, form="pairs", extra={"latents": {"shift": [3.0, -1.0], "scale": 0.5}}) as writer:
        for i in range(count):
            latent = draws.normal(size=(2, 2, 2)) * 2 + np.array([3.0, -1.0])[:, None, None]
            members = {"moments.npy": npy(latent.astype(np.float32)), "json": json.dumps(facts).encode()}
            writer.add(f"i{i}", members)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    write_text(tmp_path / "text" / "train", CORPUS)
    write_text(tmp_path / "text" / "heldout", [b"abz", b"b"])
    write_images(tmp_path / "images" / "train", count=3000, seed=0)
    write_images(tmp_path / "images" / "heldout", count=200, seed=1)
    image = {"channels": 2, "rank": 2, "patch": 1, "buckets": [[2, 2]], "coda_width": 8}
    atto = {"width": 8, "layers": 1, "heads": 1, "kv_heads": 1, "ffn_width": 8, "rotary_pairs": [4, 0, 0, 0]}
    text = {"width": 8, "heads": 1, "ffn_width": 8, "preludio_layers": 0, "coda_layers": 1}
    sources = {
        "text": {"path": "text", "form": "text", "weight": 1.0},
        "images": {"path": "images", "form": "pairs", "modality": "image", "weight": 1.0},
    }
    return RunConfig.model_validate(
        {
            "name": "x",
            "model": {"atto": atto, "text": text, "media": {"image": image}},
            "data": {"root": str(tmp_path), "lanes": 1, "sequence_latents": 64, "sources": sources},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1, "lr": 1e-3},
        }
    )


def test_baselines_of_a_data_set_are_those_of_its_parts(config: RunConfig) -> None:
    baselines = compute_baselines(config, text_bytes=1000, media_spans=200)
    found = baselines.numbers
    expected = sum(by_hand(document, CORPUS, order=2) for document in (b"abz", b"b")) / 4
    assert found["text/order2"] == pytest.approx(expected, rel=1e-6)
    white = np.mean([1 / ((1 - t) ** 2 + t**2) for t in TIMES])  # normalised: variance 1 in every direction
    for name in ("image/gaussian", "image/gaussian_channel"):
        assert found[name] == pytest.approx(white, abs=5 * found[f"{name}_stderr"])
        assert sum(baselines.totals[name].values()) / (200 * 8) == pytest.approx(found[name])
    assert baselines.totals["text/order2"] == pytest.approx(
        {f"text/block-{i}": by_hand(document, CORPUS, order=2) for i, document in enumerate((b"abz", b"b"))}
    )


def test_baselines_are_kept_until_what_is_scored_changes(config: RunConfig) -> None:
    root = Path(config.data.root)
    first = compute_baselines(config, text_bytes=1000, media_spans=20)
    (kept,) = root.glob("baselines-*.json")
    kept.write_text(json.dumps({"numbers": {**first.numbers, "text/xz": -1.0}, "totals": first.totals}))
    again = compute_baselines(config, text_bytes=1000, media_spans=20)
    assert again.numbers["text/xz"] == -1.0 and again.totals == first.totals
    write_text(root / "text" / "heldout", [b"abba"])
    assert compute_baselines(config, text_bytes=1000, media_spans=20).numbers["text/xz"] > 0
