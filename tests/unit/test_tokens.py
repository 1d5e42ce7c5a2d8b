"""The tokenised control: pieces of a vocabulary, a latent each, beside the same documents in bytes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from matformer.config.check import check
from matformer.config.schema import PatcherConfig, RunConfig
from matformer.data.packing import Piece, Place, build_batch, draw_zeros, pack_batch
from matformer.data.patching import TokenPatcher, build_patcher, text_symbols
from matformer.data.pieces import train_pieces
from matformer.data.sources import Document, merge_spans, text_span
from matformer.engine.step import metrics_row, optimizer_step
from matformer.errors import ConfigError
from matformer.model import Matformer
from matformer.shapes import END
from tests.made import as_tokens, audio, image, plain_host, tiny_run

TEXTS = [b"aa aaa ab abc the cat sat on the mat " * 20, "Größe, naïve, 雪".encode() * 20]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pieces") / "pieces.model"
    path.write_bytes(train_pieces(TEXTS, vocabulary=290, longest=6).model)
    return path


@pytest.fixture(scope="module")
def patcher(file: Path) -> TokenPatcher:
    built = build_patcher(patcher_config(file), vocabulary=290)
    assert isinstance(built, TokenPatcher)
    return built


def patcher_config(file: Path, **more: object) -> PatcherConfig:
    return PatcherConfig.model_validate({"kind": "tokens", "sentencepiece": str(file)} | more)


def token_run() -> RunConfig:
    run = tiny_run()
    return run.model_copy(update={"model": as_tokens(run.model, 290)})


def model_of(run: RunConfig) -> Matformer:
    model = plain_host(run).model
    assert isinstance(model, Matformer)
    return model.double().requires_grad_(False)


def test_every_byte_string_has_numbers_that_give_it_back(patcher: TokenPatcher) -> None:
    dice = np.random.default_rng(0)
    for data in [b"", b"x", b"the cat", *TEXTS, *(dice.bytes(int(dice.integers(1, 60))) for _ in range(200))]:
        lengths = patcher.lengths(text_symbols(data))
        tokens = patcher.tokens(data, lengths)
        assert tokens[-1] == 290 and len(tokens) == len(lengths)
        assert patcher.pieces.decode(tokens[:-1].tolist()) == data
        assert tokens[:-1].tolist() == patcher.pieces.ids(data)
        assert len(patcher.tokens(data, lengths[:-1])) == len(lengths) - 1  # a span that is not ended


def test_a_batch_holds_the_numbers_of_its_patches_also_of_a_cut_document(patcher: TokenPatcher) -> None:
    whole = Document("a", (text_span(b"the cat sat on the mat", patcher),))
    span = whole.spans[0]
    assert span.tokens is not None
    for pieces in ([Piece(whole, Place(), Place(1))], [Piece(whole, Place(0, 3), Place(1))]):
        batch = pack_batch([pieces], [draw_zeros], model=token_run().model, sequence_latents=40)
        first = pieces[0].first.patch
        assert batch.text.token_P.tolist() == span.tokens[first:].tolist()
        assert batch.counts()["text"] == len(span.tokens) - first
        assert batch.num_bytes == int((batch.text.symbol_U != END).sum())


def test_the_loss_is_the_cross_entropy_of_the_next_piece_by_document(patcher: TokenPatcher) -> None:
    run = token_run()
    model = model_of(run)
    documents = [
        Document("a", merge_spans((b"the cat ", image(1), b"sat"), patcher)),
        Document("b", merge_spans((audio(2, role="given"), b"on the mat"), patcher)),
    ]
    batch = build_batch(documents, model=run.model, sequence_latents=48)
    sums = model(batch)
    assert isinstance(sums, dict)
    latents = model.latents(batch)
    head = model.code["text"].head.weight
    for row, one in enumerate(documents):
        slots = batch.text.slot_P[(batch.text.slot_P // 48) == row] - 48 * row
        tokens = np.concatenate([span.tokens for span in one.spans if hasattr(span, "tokens")])
        logits = latents[row, slots - 1] @ head.T
        expected = F.cross_entropy(logits, torch.from_numpy(tokens), reduction="sum")
        assert float(sums["text"][row]) == pytest.approx(float(expected), rel=1e-9)


def test_the_first_loss_is_the_log_of_the_vocabulary_and_the_divisor_is_bytes(patcher: TokenPatcher) -> None:
    run = token_run()
    text = b"the cat sat on the mat " * 3
    batch = build_batch(
        [Document(str(i), (text_span(text, patcher),)) for i in range(4)], model=run.model, sequence_latents=80
    )
    row = metrics_row(optimizer_step(plain_host(run, stirred=False), [batch], config=run, step=0), run)
    assert row["text/nats_per_symbol"] == pytest.approx(math.log(291), rel=0.02)
    pieces = 4 * len(patcher.lengths(text_symbols(text)))
    assert row["text/bits_per_byte"] == pytest.approx(
        row["text/nats_per_symbol"] * pieces / (math.log(2) * 4 * len(text)), rel=1e-6
    )


def test_a_later_piece_does_not_change_an_earlier_prediction(patcher: TokenPatcher) -> None:
    run = token_run()
    model = model_of(run)

    def logits(data: bytes) -> torch.Tensor:
        batch = build_batch([Document("a", (text_span(data, patcher),))], model=run.model, sequence_latents=48)
        return model.text_logits(model.latents(batch).flatten(0, 1), batch.text)

    one, other = b"x y z q x y", b"x y w q x y"
    lengths = patcher.lengths(text_symbols(one)).tolist()
    assert lengths == patcher.lengths(text_symbols(other)).tolist()
    place = np.searchsorted(np.cumsum(lengths), 4, side="right")  # the patch of the byte that differs
    first, second = logits(one), logits(other)
    assert torch.equal(first[: place + 1], second[: place + 1])
    assert not torch.equal(first[place + 1], second[place + 1])


def test_what_does_not_fit_is_one_sentence_with_its_key(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.text.vocabulary must be .* 290, got 300"):
        build_patcher(patcher_config(file), vocabulary=300)
    with pytest.raises(ConfigError, match="data.patcher.max_patch_bytes"):
        build_patcher(patcher_config(file, max_patch_bytes=2))
    run = token_run()
    good = run.model_copy(update={"data": run.data.model_copy(update={"patcher": patcher_config(file)})})
    check(good)
    with pytest.raises(ConfigError, match="model.text.vocabulary"):
        check(run)  # of the static patcher
    without = good.model_copy(update={"model": tiny_run().model})
    with pytest.raises(ConfigError, match="model.text.vocabulary"):
        check(without)
