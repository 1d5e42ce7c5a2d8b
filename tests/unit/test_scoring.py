"""Fast scoring gives the model's own entropies: whatever the model's form, the documents and the memo's size."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from matformer.data import entropy, scoring
from matformer.data.entropy import EntropyModel, EntropySettings, ExactEntropy, entropies, input_symbols
from matformer.data.patching import EntropyPatcher
from matformer.data.scoring import ContextMemo, context_keys, entropies_of_normed, entropy_of
from matformer.parallel.seeds import generator

LOOKUPS = EntropySettings(width=16, ngrams=(2, 3, 4), ngram_rows=64)
FORMS = {
    "lookups": LOOKUPS,
    "seven symbols": replace(LOOKUPS, ngrams=(2, 7)),
    "too many symbols for a key": replace(LOOKUPS, ngrams=(2, 9)),
    "no n-grams": replace(LOOKUPS, ngrams=()),
    "attention": replace(LOOKUPS, heads=2, ffn_width=24, layers=2, window=6),
}
WORDS = generator(0, "scoring").integers(0, 256, size=(30, 5), dtype=np.uint8)


def made(settings: EntropySettings, *, head: float = 0.7) -> EntropyModel:
    """Weights drawn so that entropies differ from symbol to symbol."""
    model, draws = EntropyModel(settings), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=draws) * 0.7
    model.head.weight.data *= head / 0.7
    return model.eval().requires_grad_(False)


def documents() -> list[bytes]:
    """Of 0, 1 and many symbols, with contexts that come again, NULs, and bytes that are no UTF-8."""
    draws = generator(1, "scoring")
    texts = [WORDS[draws.integers(0, 30, size=count)].tobytes() for count in draws.integers(0, 40, size=60)]
    return [b"", b"a", b"\0" * 30, b"\xff\xc3\x80\x80\xf5", b"abcd" * 9, *texts, texts[7], b"", b"\0a\0\0"]


def own(model: EntropyModel, data: bytes) -> np.ndarray:
    """The plain way: the model's forward over this document alone, in float64."""
    double = EntropyModel(model.settings).double()
    double.load_state_dict(model.state_dict())
    symbol_U = torch.from_numpy(input_symbols(data))
    place_U = torch.arange(len(symbol_U))
    with torch.no_grad():
        return entropy_of(double(symbol_U, torch.zeros_like(place_U), place_U)).numpy()


@pytest.mark.parametrize("row", [1 << 14, 64, 13])
@pytest.mark.parametrize("form", FORMS)
def test_scores_are_those_of_the_models_forward(form: str, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(FORMS[form])
    monkeypatch.setattr(entropy, "ROW_SYMBOLS", row)
    monkeypatch.setattr(entropy, "LOOKUP_ROW_SYMBOLS", row)
    for data, nats in zip(documents(), entropies(model, documents()), strict=True):
        assert nats.dtype == np.float32 and nats.shape == (len(data) + 1,)
        np.testing.assert_allclose(nats, own(model, data), atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_document_alone_scores_as_among_others(form: str) -> None:
    model = made(FORMS[form])
    for data, nats in zip(documents(), entropies(model, documents()), strict=True):
        np.testing.assert_allclose(entropies(model, [data])[0], nats, atol=1e-5)


def test_a_model_in_float64_is_scored_in_it() -> None:
    model = made(LOOKUPS).double()
    for data, nats in zip(documents(), entropies(model, documents()), strict=True):
        assert nats.dtype == np.float64
        np.testing.assert_allclose(nats, own(model, data), atol=1e-12)


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_a_memo_that_forgets_is_still_right(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(LOOKUPS)
    monkeypatch.setattr(scoring, "MOST_SLOTS", slots)
    monkeypatch.setattr(entropy, "LOOKUP_ROW_SYMBOLS", 40)
    for data, nats in zip(documents(), entropies(model, documents()), strict=True):
        np.testing.assert_allclose(nats, own(model, data), atol=1e-4)


def test_a_context_is_scored_once() -> None:
    memo, asked = ContextMemo(1000, torch.float64), []

    def score(chosen: np.ndarray) -> np.ndarray:
        asked.append(len(chosen))
        return keys[chosen] / 2

    for keys in (np.array([5, 9, 5, 5]), np.array([9, 7, 5]), np.array([7, 7])):
        assert memo(keys, score).tolist() == (keys / 2).tolist()
    assert asked == [2, 1, 0]


def test_the_memo_does_not_grow_with_the_text() -> None:
    sizes = [
        sum(table.nbytes for table in vars(ContextMemo(count, torch.float32)).values() if isinstance(table, np.ndarray))
        for count in (10**6, 10**10)
    ]
    assert sizes[0] == sizes[1] < 20e6


@pytest.mark.parametrize("monotonic", [False, True])
def test_patches_of_all_documents_are_counted_at_once(monotonic: bool) -> None:
    patcher = EntropyPatcher(made(LOOKUPS), threshold=0.2, max_patch_bytes=3, monotonic=monotonic)
    found = entropies(patcher.model, documents())
    patcher.threshold = 0.2 if monotonic else float(np.median(np.concatenate(found)))
    firsts = np.cumsum([0] + [len(nats) for nats in found[:-1]])
    patches = sum(len(patcher.lengths_of(data, nats=nats)) for data, nats in zip(documents(), found, strict=True))
    assert patcher.rough_count(np.concatenate(found), firsts=firsts) == pytest.approx(patches, abs=3)


def test_exact_entropies_are_asked_for_once_wherever_their_context_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, asked = ExactEntropy(made(LOOKUPS)), []
    forward = EntropyModel.forward
    monkeypatch.setattr(EntropyModel, "forward", lambda *rest: asked.append(1) or forward(*rest))
    found = [exact(input_symbols(data)) for data in (b"zzabcd", b"zzzzabcd", b"abcd", b"bcd")]
    assert found[0] == found[1] == found[2] != found[3]
    assert len(asked) == 2


def test_contexts_have_one_key_exactly_if_they_are_one() -> None:
    inputs = [input_symbols(data) for data in documents()]
    symbols, places = np.concatenate(inputs), np.concatenate([np.arange(len(one)) for one in inputs])
    before = [tuple(one[max(0, i - 3) : i + 1].tolist()) for one in inputs for i in range(len(one))]
    keys = context_keys(symbols, places, length=4)
    assert len(set(before)) == len(set(keys.tolist())) == len(set(zip(before, keys.tolist(), strict=True)))


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 300.0])
def test_entropies_in_one_pass_are_the_plain_ones(scale: float) -> None:
    draws = torch.Generator().manual_seed(0)
    normed = torch.nn.functional.normalize(torch.randn(scoring.CHUNK + 3, 8, generator=draws)) * math.sqrt(8)
    head = torch.randn(257, 8, generator=draws) * scale + 5
    found = entropies_of_normed(normed, head)
    torch.testing.assert_close(found.double(), entropy_of(normed.double() @ head.double().T), atol=1e-4, rtol=0)
    assert entropies_of_normed(normed[:0], head).shape == (0,)
