"""The entropy model and its patchers: free of neighbours, equal online and offline, and BLT's own rule."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.blt.modeling_blt import BltPatcher

from matformer.config.schema import PatcherConfig
from matformer.data import entropy
from matformer.data.entropy import EntropyModel, EntropySettings, ExactEntropy, entropies, input_symbols
from matformer.data.patching import EntropyPatcher, build_patcher, text_symbols
from matformer.errors import DataError
from matformer.parallel.seeds import generator

DOCUMENTS = [
    b"",
    b"a",
    b"one two,  three\n\n4",
    "né 你好".encode(),
    b"\xff\xc3\x80\x80",
    b"x" * 40,
    b"abcabcabcabc" * 9,
]


def made(*, window: int = 6, layers: int = 2) -> EntropyModel:
    """Weights drawn so that entropies differ from symbol to symbol."""
    model = EntropyModel(EntropySettings(width=16, heads=2, ffn_width=24, layers=layers, window=window, ngram_rows=64))
    draws = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=draws) * (0.7 if weight.dim() > 1 else 1.0)
    return model.eval().requires_grad_(False)


MODEL = made()


def noise(number: int) -> bytes:
    draws = generator(0, "entropy", number)
    return draws.integers(0, 256, size=int(draws.integers(0, 90)), dtype=np.uint8).tobytes()


def median(model: EntropyModel) -> float:
    return float(np.median(np.concatenate(entropies(model, [noise(i) for i in range(20)]))))


def test_an_entropy_stands_before_every_symbol_and_before_the_end() -> None:
    for data, nats in zip(DOCUMENTS, entropies(MODEL, DOCUMENTS), strict=True):
        assert nats.shape == (len(data) + 1,) and nats.dtype == np.float32
        assert ((nats > 0) & (nats <= np.log(257) + 1e-5)).all()


def test_documents_do_not_influence_each_other() -> None:
    together = entropies(MODEL, DOCUMENTS)
    backwards = entropies(MODEL, DOCUMENTS[::-1])[::-1]
    for data, one, other in zip(DOCUMENTS, together, backwards, strict=True):
        np.testing.assert_allclose(one, entropies(MODEL, [data])[0], atol=1e-5)
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_an_entropy_depends_on_the_bytes_before_it_alone() -> None:
    whole = entropies(MODEL, [DOCUMENTS[-1]])[0]
    for length in (0, 1, 7, 50):
        np.testing.assert_allclose(entropies(MODEL, [DOCUMENTS[-1][:length]])[0], whole[: length + 1], atol=1e-5)


def test_a_long_document_is_scored_in_pieces_as_if_it_were_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = entropies(MODEL, [DOCUMENTS[-1], DOCUMENTS[2]])
    monkeypatch.setattr(entropy, "ROW_SYMBOLS", 13)
    for cut, one in zip(entropies(MODEL, [DOCUMENTS[-1], DOCUMENTS[2]]), whole, strict=True):
        np.testing.assert_allclose(cut, one, atol=1e-5)


def test_the_exact_entropy_is_that_of_the_whole_document_and_of_its_tail() -> None:
    exact, data = ExactEntropy(MODEL), DOCUMENTS[-1]
    inputs = input_symbols(data)
    double = EntropyModel(MODEL.settings).double()
    double.load_state_dict(MODEL.state_dict())
    expected = entropies(double, [data])[0]
    for i in (0, 1, 5, 30, len(data)):
        assert exact(inputs[: i + 1]) == pytest.approx(expected[i], abs=1e-12)
        tail = inputs[max(0, i - MODEL.settings.sight) : i + 1]
        assert exact(tail) == pytest.approx(expected[i], abs=1e-12)


def between(nats: np.ndarray) -> float:
    """In the widest gap near the median: their rule goes by float32, which on a value itself is not trusted."""
    middle = np.sort(nats.astype(np.float64))[int(0.45 * len(nats)) : int(0.55 * len(nats))]
    widest = int(np.diff(middle).argmax())
    assert middle[widest + 1] - middle[widest] > 2e-5
    return float(middle[widest : widest + 2].mean())


def test_blts_rule_over_bos_and_bytes_is_ours() -> None:
    documents = [data for data in (noise(i) for i in range(1000)) if data]
    found = entropies(MODEL, documents)
    threshold = between(np.concatenate(found))
    patcher = EntropyPatcher(MODEL, threshold=threshold, max_patch_bytes=10**6)
    for data, nats in zip(documents, found, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = BltPatcher.patch_lengths_from_entropies(
                torch.from_numpy(nats)[None], sequence_length=len(nats), threshold=threshold
            )[0]
        begins = (torch.cumsum(theirs, 0) - theirs)[1:] - 1  # BOS is their first patch, our `start`
        lengths = patcher.lengths_of(data, nats=nats)
        assert lengths.sum() == len(data) + 1
        assert (np.cumsum(lengths) - lengths).tolist() == begins.tolist()


@pytest.mark.parametrize("monotonic", [False, True])
@pytest.mark.parametrize("longest", [5, 64])
def test_boundaries_are_the_same_on_every_prefix_and_incrementally(monotonic: bool, longest: int) -> None:
    threshold = 0.05 if monotonic else median(MODEL)
    patcher = EntropyPatcher(MODEL, threshold=threshold, max_patch_bytes=longest, monotonic=monotonic)
    for data in (*DOCUMENTS[:5], noise(3)[:40]):
        symbols = text_symbols(data)
        lengths = patcher.lengths(symbols)
        ends = set(np.cumsum(lengths).tolist())
        assert lengths.dtype == np.int32 and 0 < lengths.min() and lengths.max() <= longest
        boundary = patcher.boundary()
        assert {i + 1 for i, symbol in enumerate(symbols) if boundary.push(int(symbol))} == ends
        for length in range(1, len(symbols)):
            prefix = np.cumsum(patcher.lengths(symbols[:length]))
            assert set(prefix.tolist()) == {end for end in ends if end < length} | {length}


def test_near_the_threshold_the_exact_entropy_decides() -> None:
    data = DOCUMENTS[2]
    exact = ExactEntropy(MODEL)(input_symbols(data)[:8])  # of symbol 7
    nats = entropies(MODEL, [data])[0]
    for side in (-1, 1):  # the rounding of float32 put on either side of it must not matter
        tilted = nats + side * 5e-5
        below = EntropyPatcher(MODEL, threshold=exact - 1e-9, max_patch_bytes=99).lengths_of(data, nats=tilted)
        above = EntropyPatcher(MODEL, threshold=exact + 1e-9, max_patch_bytes=99).lengths_of(data, nats=tilted)
        assert 7 in np.cumsum(below) and 7 not in np.cumsum(above)


def test_a_saved_model_cuts_alike_and_tells_who_it_is(tmp_path: Path) -> None:
    MODEL.save(tmp_path / "model")
    config = PatcherConfig(kind="entropy", threshold=median(MODEL), entropy_model=str(tmp_path / "model"))
    ours = EntropyPatcher(MODEL, threshold=median(MODEL), max_patch_bytes=16)
    theirs = build_patcher(config)
    assert theirs.identity() == ours.identity()
    symbols = text_symbols(noise(5))
    assert np.array_equal(theirs.lengths(symbols), ours.lengths(symbols))
    assert EntropyPatcher(made(window=7), threshold=1.0, max_patch_bytes=16).identity()["model"] != MODEL.fingerprint


def test_a_model_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    config = PatcherConfig(kind="entropy", threshold=1.0, entropy_model=str(tmp_path / "none"))
    with pytest.raises(DataError, match="must hold an entropy model .* set data.patcher.entropy_model"):
        build_patcher(config)
