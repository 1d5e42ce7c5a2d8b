"""Text by filling in masks: what stands where, who sees whom, what is counted, and how it is drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli

from matformer.atto import masks, trunk
from matformer.atto.masks import Positions
from matformer.config.check import check
from matformer.config.schema import ModelConfig, RunConfig
from matformer.data.continued import with_before
from matformer.data.loader import pack_documents
from matformer.data.packing import (
    Piece,
    Place,
    cut,
    document_positions,
    draw_no_masks,
    draw_training_masks,
    draw_zeros,
    ended,
    pack_batch,
    with_noise,
)
from matformer.data.patching import StaticPatcher
from matformer.data.sources import Document, MediaSpan, TextSpan, merge_spans
from matformer.data.text_layout import patches_that_fit, text_positions
from matformer.data.text_rows import mask_at, with_masks
from matformer.engine.draws import Draws, Row
from matformer.engine.evaluate import MASK_DRAWS, _diffused_pieces, length_bits
from matformer.engine.unmask import _Sheet, fill_texts
from matformer.errors import ConfigError, ParcelError
from matformer.losses.text import symbol_nats
from matformer.model import Matformer
from matformer.parallel.seeds import generator
from matformer.parcels import Batch, Kind
from matformer.shapes import END, MASK, NUM_TARGETS
from tests.made import as_diffused, image, plain_host, tiny_run
from tests.tolerances import SAME_SUM

START, HEADER, NOISED, CLEAN, CLOSING = (
    int(kind) for kind in (Kind.START, Kind.HEADER, Kind.NOISED, Kind.CLEAN, Kind.CLOSING)
)
OBJECTIVES = ("masked_diffusion", "block_diffusion")
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def run_of(objective: str) -> RunConfig:
    """The tiny run with patches of 3 and blocks of 2 patches."""
    run = tiny_run()
    return run.model_copy(update={"model": as_diffused(run.model, objective)})


def document(key: str, *spans: bytes | MediaSpan) -> Document:
    return Document(key, merge_spans(spans, StaticPatcher(3)))


def packed(rows: Sequence[Sequence[Document]], *, model: ModelConfig, length: int) -> Batch:
    """Whole documents, several a row; noise and masks drawn from their keys."""
    pieces = [[Piece(one, Place(), Place(len(one.spans))) for one in row] for row in rows]
    batch = pack_batch(pieces, [draw_zeros] * len(rows), model=model, sequence_latents=length)
    return with_masks(with_noise(batch, time=0.4, seed=0, index=0), number=7, draws=MASK_DRAWS, seed=0)


def model_of(run: RunConfig, dtype: torch.dtype = torch.float64) -> Matformer:
    model = plain_host(run).model
    assert isinstance(model, Matformer)
    return model.to(dtype).requires_grad_(False)


# What stands where


def test_a_masked_text_is_laid_out_like_a_media_span() -> None:
    model = run_of("masked_diffusion").model
    batch = packed([[document("a", b"abcd", image(1), b"xy")]], model=model, length=24)
    kinds = [START, HEADER, NOISED, NOISED, CLEAN, CLEAN, CLOSING, HEADER, *[NOISED] * 4, *[CLEAN] * 4, CLOSING]
    kinds += [HEADER, NOISED, CLOSING, *[0] * 4]
    assert batch.grid.kind_BS.tolist() == [kinds]
    clock = [0, 1, 2, 3, 2, 3, 4, 5, *[6] * 8, 7, 8, 9, 10]
    assert batch.grid.axes_BSX[0, :20, 0].tolist() == clock
    spans = batch.grid.span_BS[0]
    assert len({int(spans[at]) for at in (2, 4, 8, 12, 18)}) == 5 and spans[2] == spans[3]
    a, b, c, d, x, y = b"abcdxy"
    text, read = batch.text, batch.read
    assert text.symbol_U.tolist() == [a, b, c, d, END, END, x, y, END]
    assert text.scored_U.tolist() == [True] * 5 + [False] + [True] * 3
    assert text.slot_P.tolist() == [2, 3, 18]
    assert text.header_slot_J.tolist() == [1, 17] and text.closing_slot_J.tolist() == [6, 19]
    # the Preludio reads the noised copies as they are seen, and after them the clean ones
    assert read.symbol_U[:9].tolist() == text.coda_input_U.tolist()
    assert read.symbol_U[9:].tolist() == [a, b, c, d, END, END] and read.slot_P[3:].tolist() == [4, 5]
    assert batch.num_bytes == 6 and batch.counts()["text"] == 8


def test_blocks_alternate_noised_and_clean_and_the_last_is_clean_only_if_followed() -> None:
    model = run_of("block_diffusion").model
    batch = packed([[document("a", b"abcdefgh")]], model=model, length=12)  # 9 symbols, 3 patches, 2 blocks of 2
    kinds = [START, HEADER, NOISED, NOISED, CLEAN, CLEAN, NOISED, NOISED, CLOSING]
    assert batch.grid.kind_BS.tolist() == [[*kinds, 0, 0, 0]]
    assert batch.grid.axes_BSX[0, :9, 0].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 6]
    assert batch.text.piece_U.tolist() == [0] * 6 + [1] * 6
    assert batch.text.scored_U.tolist() == [True] * 9 + [False] * 3
    assert batch.text.symbol_U.tolist() == [*b"abcdefgh", END, END, END, END]
    followed = packed([[document("a", b"ab", image(1))]], model=model, length=16)
    assert followed.grid.kind_BS[0, :7].tolist() == [START, HEADER, NOISED, NOISED, CLEAN, CLEAN, CLOSING]


def test_the_router_is_asked_at_start_and_closing() -> None:
    for objective in OBJECTIVES:
        batch = packed([[document("a", b"abcdefgh", image(1))]], model=run_of(objective).model, length=40)
        closing = int(batch.text.closing_slot_J[0])
        assert batch.route.slot_R.tolist() == [0, closing, int(batch.media["image"].closing_slot_J[0])]
        assert batch.route.target_R.tolist() == [0, 1, 3]
        assert not batch.route.legal_RM[1, 0]  # no text after text


@each_objective
def test_a_text_is_cut_where_its_pieces_fit_and_nothing_is_lost(objective: str) -> None:
    model = run_of(objective).model
    whole = document("a", bytes(range(97, 97 + 26)) * 3, image(1), b"end")
    data = b"".join(span.data for span in whole.spans if isinstance(span, TextSpan))
    for room in (*range(12, 40), document_positions(whole, model=model)):
        place, seen, pieces = Place(), b"", 0
        while True:
            taken = cut(whole, place, room=room, model=model)
            assert taken is not None, (room, place)
            piece, used = taken
            batch = pack_batch([[piece]], [draw_zeros], model=model, sequence_latents=room)
            assert int((batch.grid.kind_BS != Kind.PAD).sum()) == used <= room
            text = batch.text
            seen += bytes(text.symbol_U[text.scored_U & (text.symbol_U != END)].tolist())
            pieces += 1
            if ended(piece):
                break
            assert place != piece.last
            place = piece.last
        assert seen == data
        assert pieces > 1 or room >= document_positions(whole, model=model)


@each_objective
def test_what_fits_is_the_most_that_fits(objective: str) -> None:
    text = run_of(objective).model.text
    step = 1 if objective == "masked_diffusion" else text.block_patches
    positions = partial(text_positions, text=text, given=0, followed=False)
    for room in range(30):
        most = patches_that_fit(room, text, patches=100)
        assert most % step == 0
        assert most == 0 or positions(most) <= room
        assert positions(most + step) > room


# Who sees whom


def assert_no_leak(model: Matformer, batch: Batch, *, objective: str) -> None:
    """A masked byte changes no logit of its block; under blocks, only clean copies reach later ones."""
    text = batch.text

    def logits(changed: Batch) -> Tensor:
        return model.text_logits(model.latents(changed).flatten(0, 1), changed.text)

    before = logits(batch)
    size = len(text.symbol_U)
    clean = batch.read.symbol_U[size:]
    for place in range(len(clean)):
        other = batch.read.symbol_U.clone()
        other[size + place] = (other[size + place] + 1) % 256
        moved = (logits(replace(batch, read=replace(batch.read, symbol_U=other))) != before).any(1)
        block = int(text.piece_U[place]) if objective == "block_diffusion" else int(text.piece_U[-1])
        assert not moved[text.piece_U <= block].any(), f"clean byte {place} reaches its own block or one before"
        assert moved[text.piece_U > block].all() or block == int(text.piece_U[-1])
    for place in range(size):
        other = text.coda_input_U.clone()
        other[place] = (other[place] + 1) % 256
        read = torch.cat((other, clean))
        seen = replace(batch, text=replace(text, coda_input_U=other), read=replace(batch.read, symbol_U=read))
        moved = (logits(seen) != before).any(1)
        assert not moved[text.piece_U != text.piece_U[place]].any(), f"noised byte {place} reaches another block"
        assert moved[text.piece_U == text.piece_U[place]].all(), "inside its block it is seen both ways"


def test_blocks_see_the_clean_ones_before_them_and_nothing_else() -> None:
    run = run_of("block_diffusion")
    batch = packed([[document("a", bytes(range(65, 65 + 16)))]], model=run.model, length=24)
    assert_no_leak(model_of(run), batch, objective="block_diffusion")


def test_a_masked_span_is_seen_both_ways_and_by_nobody_else() -> None:
    run = run_of("masked_diffusion")
    batch = packed([[document("a", b"abcdefg", image(1), b"xyz")]], model=run.model, length=40)
    model, size = model_of(run), len(batch.text.symbol_U)
    before = model.text_logits(model.latents(batch).flatten(0, 1), batch.text)
    other = batch.read.symbol_U.clone()
    other[size + 1] += 1  # of the clean copy
    changed = replace(batch, read=replace(batch.read, symbol_U=other))
    moved = (model.text_logits(model.latents(changed).flatten(0, 1), batch.text) != before).any(1)
    assert not moved[batch.text.piece_U == 0].any() and moved[batch.text.piece_U == 1].all()


def everything_before(query: Positions, key: Positions) -> Tensor:
    """A planted fault: noised blocks also see the clean copy of their own block."""
    return masks.sees(query, key) | ((query.span // 2 == key.span // 2) & (query.span >= 0))


def test_a_mask_that_shows_the_clean_copy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("block_diffusion")
    batch = packed([[document("a", bytes(range(65, 65 + 16)))]], model=run.model, length=24)
    monkeypatch.setattr(trunk, "sees", everything_before)
    with pytest.raises(AssertionError, match="reaches its own block"):
        assert_no_leak(model_of(run), batch, objective="block_diffusion")


@each_objective
def test_padding_behind_the_end_is_never_seen(objective: str) -> None:
    """Shown, it would tell the end for nothing; the true bound pays for the first `<end>` alone."""
    batch = packed([[document("a", b"abcde")], [document("b", b"xyzxyzx")]], model=run_of(objective).model, length=12)
    for number in range(MASK_DRAWS):
        text = with_masks(batch, number=number, draws=MASK_DRAWS, seed=1).text
        assert (text.coda_input_U[~text.scored_U] == MASK).all()
        assert not text.weight_U[~text.scored_U].any()


# What is counted


@each_objective
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_of_a_document_are_its_own(objective: str, dtype: torch.dtype) -> None:
    """Alone = packed in any order = padded = in any batch."""
    run = run_of(objective)
    model = model_of(run, dtype)
    documents = [
        document("a", b"abcdefgh", image(1), b"z"),
        document("b", b"only text, quite long"),
        document("c", b"\xff\x00"),
        document("d", image(2, role="given"), b"what is this"),
    ]

    def sums(rows: Sequence[Sequence[Document]], length: int) -> dict[str, dict[str, float]]:
        batch = packed(rows, model=run.model, length=length)
        found = model(batch)
        assert isinstance(found, dict)
        return {key: {part: float(found[part][i]) for part in found} for i, key in enumerate(batch.document_keys)}

    alone: dict[str, dict[str, float]] = {}
    for one in documents:
        alone |= sums([[one]], document_positions(one, model=run.model))
    assert all(alone[key]["text"] > 0 for key in "abd")  # of two bytes none may be masked
    ways = [([documents], 120), ([documents[::-1]], 130), ([[one] for one in documents], 60), ([documents[:2]], 90)]
    for rows, length in ways:
        for key, parts in sums(rows, length).items():
            for part, value in parts.items():
                assert abs(value - alone[key][part]) <= SAME_SUM[dtype] * max(1.0, abs(alone[key][part])), (key, part)


@each_objective
def test_the_loss_is_that_of_the_paper(objective: str) -> None:
    """Sum over what is masked of CE / p, written out; its count is all symbols that are scored."""
    run = run_of(objective)
    model, batch = model_of(run), packed([[document("a", b"abcdefghij")]], model=run.model, length=24)
    text = batch.text
    logits = model.text_logits(model.latents(batch).flatten(0, 1), text)[:, :NUM_TARGETS]
    total = 0.0
    for place in range(len(text.symbol_U)):
        if text.coda_input_U[place] == MASK and text.scored_U[place]:
            block = int(text.piece_U[place])  # of its document too: there is one
            time = (7 + generator(0, "heldout mask", "a", block, 7).random()) / MASK_DRAWS
            probability = logits[place].softmax(0)[text.symbol_U[place]]
            total += float(-probability.log()) / ((1 - 1e-3) * time + 1e-3)
    sums = model(batch)
    assert isinstance(sums, dict) and total > 0
    assert float(sums["text"].sum()) == pytest.approx(total, rel=1e-6)
    assert batch.counts()["text"] == 11
    nats = symbol_nats(logits, text.symbol_U)
    assert float((nats * text.weight_U).sum()) == pytest.approx(total, rel=1e-6)


@each_objective
def test_the_bound_is_exact_where_the_guess_does_not_depend_on_what_is_seen(objective: str) -> None:
    """Closed form: E over t and masks of masked / p is 1 for every scored symbol, so the bound is the exact nats."""
    model = run_of(objective).model
    documents = [document(str(i), b"what stands here matters not at all " * 2) for i in range(6)]
    batch = packed([documents], model=model, length=400)
    weights = [
        with_masks(batch, number=k, draws=MASK_DRAWS, seed=seed).text.weight_U for seed in range(30) for k in range(16)
    ]
    mean = torch.stack(weights).double()[:, batch.text.scored_U].mean()
    # Var of masked / p is E 1/p - 1, about ln(1000) - 1; symbols of a block share their t
    blocks = int(batch.text.piece_U.max()) + 1
    assert abs(float(mean) - 1.0) < 5 * math.sqrt(6.0 / (30 * 16 * blocks))
    assert torch.stack(weights).max() > 3


@pytest.mark.parametrize(
    ("objective", "patch", "block", "sizes"),
    [
        ("masked_diffusion", 4, 1, range(4, 8)),
        ("block_diffusion", 4, 1, range(4, 8)),
        ("block_diffusion", 2, 4, range(8, 16)),
    ],
)
def test_the_bound_holds_for_every_predictor(objective: str, patch: int, block: int, sizes: range) -> None:
    """Texts that differ in their length alone, and the best predictor for exactly them, as a table over what is seen.

    Bits of a code for N texts keep sum 2^-bits <= 1 (Kraft). Without paying for the length they would not.
    """
    text = run_of(objective).model.text.model_dump() | {"patch_bytes": patch, "block_patches": block}
    model = ModelConfig.model_validate(run_of(objective).model.model_dump() | {"text": text})
    run = run_of(objective)
    run = run.model_copy(update={"model": model, "data": run.data.model_copy(update={"sequence_latents": 20})})
    documents = [Document(str(n), merge_spans((b"a" * n,), StaticPatcher(patch))) for n in sizes]
    pieces = [[Piece(one, Place(), Place(1))] for one in documents]
    batch = pack_batch(pieces, [draw_zeros] * len(pieces), model=model, sequence_latents=20)
    weights: dict[tuple[object, ...], dict[tuple[int, int], float]] = {}
    draws = 40
    for seed, number in itertools.product(range(draws), range(MASK_DRAWS)):
        units = with_masks(batch, number=number, draws=MASK_DRAWS, seed=seed).text
        for piece in range(int(units.piece_U.max()) + 1):
            here = units.piece_U == piece
            document = int(units.document_U[here][0])
            block_of = piece - int(units.piece_U[units.document_U == document].min())
            seen = tuple(units.coda_input_U[here].tolist())
            for place, (weight, symbol) in enumerate(
                zip(units.weight_U[here].tolist(), units.symbol_U[here].tolist(), strict=True)
            ):
                if weight:
                    told = weights.setdefault((block_of, seen, place), {})
                    told[document, symbol] = told.get((document, symbol), 0.0) + weight
    bits = np.zeros(len(documents))
    for told in weights.values():
        of_symbol = {s: sum(w for (_, symbol), w in told.items() if symbol == s) for _, s in told}
        total = sum(of_symbol.values())
        for (document, symbol), weight in told.items():
            bits[document] -= weight * math.log2(of_symbol[symbol] / total) / (draws * MASK_DRAWS)
    assert (2.0**-bits).sum() > 1.2, "the fault that the code for the length mends"
    assert (2.0 ** -(bits + length_bits(run))).sum() <= 1.0


def test_each_piece_pays_for_its_length_once_a_draw() -> None:
    for objective in OBJECTIVES:
        run = run_of(objective)
        documents = [document("a", b"abcdefghijkl", image(1), b"xy"), document("b", b"a")]
        batch = packed([documents], model=run.model, length=90)
        pieces, ones = _diffused_pieces(batch)
        assert pieces.tolist() == [0, 0, 1] and ones.tolist() == [1, 1, 1]


def test_masks_have_the_law_of_their_time() -> None:
    hidden = [draw_training_masks(seed=0, step=s, lane=0, lanes=1)("k", 0, 400).hidden_U for s in range(400)]
    shares = np.array([one.mean() for one in hidden])
    # p is uniform on (0.001, 1): quarters of the shares are at the quarters
    assert np.quantile(shares, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.08)
    mask = draw_training_masks(seed=0, step=3, lane=0, lanes=1)("k", 0, 4000)
    expected = Bernoulli(probs=torch.tensor(1.0 / mask.weight))
    assert abs(mask.hidden_U.mean() - float(expected.mean)) < 5 * float(expected.stddev) / math.sqrt(4000)


@each_objective
def test_heldout_masks_do_not_depend_on_where_batches_end(objective: str) -> None:
    """Of a document that is cut between rows; one that is whole has the masks of its key and its first block."""
    run = run_of(objective)
    documents = [document("whole", b"once"), document("cut", bytes(range(97, 123)) * 24), document("w", b"more")]
    weights = []
    for rows in (1, 2, 3, 20):
        batches = pack_documents(
            documents, config=run.model_copy(update={"train": run.train.model_copy(update={"micro_batch": rows})})
        )
        masked = [
            with_masks(one, number=3, draws=MASK_DRAWS, seed=0, before=before) for one, before in with_before(batches)
        ]
        assert len(masked) > 1 or rows == 20
        weights.append(torch.cat([one.text.weight_U for one in masked]))
    assert all(torch.equal(one, weights[0]) for one in weights[1:])
    dice = generator(0, "heldout mask", "whole", 0, 3)
    hidden, weight = mask_at((3 + dice.random()) / MASK_DRAWS, dice.random(6))
    assert weights[0][:5].tolist() == [np.float32(weight) if one else 0.0 for one in hidden[:5]]


def test_training_masks_depend_on_step_lane_and_span_alone_and_times_are_spread() -> None:
    def draw(step: int, lane: int, span: int, seed: int = 0) -> tuple[list[bool], float]:
        mask = draw_training_masks(seed=seed, step=step, lane=lane, lanes=4)("any", span, 32)
        return mask.hidden_U.tolist(), mask.weight

    assert draw(1, 2, 3) == draw(1, 2, 3)
    others = [draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(1, 2, 3, seed=1)]
    assert all(other != draw(1, 2, 3) for other in others)
    times = sorted(1.0 / draw(5, lane, 0)[1] for lane in range(4))
    assert np.diff(times) == pytest.approx([0.25] * 3, abs=1e-3)  # evenly over the lanes of a global batch


@each_objective
def test_the_first_loss_is_the_log_of_the_alphabet(objective: str) -> None:
    run = run_of(objective)
    model = plain_host(run, stirred=False).model
    documents = [document(str(i), bytes(np.random.default_rng(i).integers(0, 256, 40).tolist())) for i in range(8)]
    batch = packed([[one] for one in documents], model=run.model, length=40)
    with torch.no_grad():
        sums = model(batch)
    assert float(sums["text"].sum() / batch.text.weight_U.sum()) == pytest.approx(math.log(257), rel=0.02)


# What the config refuses


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"kind": "space"}, "data.patcher.kind"),
        ({"kind": "entropy", "threshold": 1.0, "entropy_model": "x"}, "data.patcher.kind"),
        ({"kind": "static", "patch_bytes": 5}, "model.text.patch_bytes"),
    ],
)
@each_objective
def test_patchers_that_would_tell_what_is_masked_are_refused(
    objective: str, change: dict[str, object], key: str
) -> None:
    run = run_of(objective)
    patcher = run.data.patcher.model_validate({"kind": "static", "patch_bytes": 3})
    good = run.model_copy(update={"data": run.data.model_copy(update={"patcher": patcher})})
    check(good)
    other = good.data.patcher.model_validate(change)
    with pytest.raises(ConfigError, match=key):
        check(good.model_copy(update={"data": good.data.model_copy(update={"patcher": other})}))


# How it is drawn


def sampling_run(objective: str, *, latents: int = 48) -> RunConfig:
    run = run_of(objective)
    patcher = run.data.patcher.model_validate({"kind": "static", "patch_bytes": 3})
    data = run.data.model_copy(update={"patcher": patcher, "sequence_latents": latents})
    return run.model_copy(update={"data": data})


@each_objective
def test_a_text_holds_its_prompt_and_is_a_function_of_its_seed(objective: str) -> None:
    run = sampling_run(objective)
    model = model_of(run, torch.float32).eval()
    rows = [Row(0, prompt=b"abcdefghijk"), Row(1), Row(2, spans=(image(1, role="given"),), prompt=b"z")]
    draws = Draws(seed=5, max_bytes=20, steps=5, temperature=1.0, top_p=1.0)
    spans = fill_texts(model, rows, config=run, draws=draws)
    for row, span in zip(rows, spans, strict=True):
        assert span.data.startswith(row.prompt) and 0 < len(span.data) <= len(row.prompt) + 20
        assert span.patch_lengths.sum() == len(span.data) + span.ended
    assert [one.data for one in fill_texts(model, rows, config=run, draws=draws)] == [one.data for one in spans]
    for steps in (5, 50):  # fewer and more than a block has symbols
        these = replace(draws, steps=steps)
        alone = [fill_texts(model, [row], config=run, draws=these)[0].data for row in rows]
        assert alone == [one.data for one in fill_texts(model, rows, config=run, draws=these)]
    other = fill_texts(model, rows, config=run, draws=replace(draws, seed=6))
    assert [one.data for one in other] != [one.data for one in spans]


def test_an_equal_share_of_what_was_hidden_is_filled_in_each_step() -> None:
    for known, steps in ((0, 6), (7, 6), (0, 50), (9, 3)):
        symbols = np.full(24, MASK, np.int64)
        symbols[:known] = 97
        sheet = _Sheet((), symbols, 24, 0, 24, np.random.default_rng(0))
        sheet.begin()
        logits = np.zeros((24, NUM_TARGETS))
        logits[:, END] = -np.inf
        left = []
        for step in range(50):
            sheet.fill(logits.copy(), step=step, draws=Draws(steps=steps, temperature=1.0))
            left.append(len(sheet.hidden()))
        taken = -np.diff([24 - known, *left])
        used = min(steps, 24 - known)
        assert left[used - 1] == 0 and taken[:used].max() - taken[:used].min() <= 1, (known, steps, taken)


def test_a_text_filled_in_whole_is_as_long_as_it_is_drawn() -> None:
    run = sampling_run("masked_diffusion")
    model = model_of(run, torch.float32)
    model.code["text"] = Says(lambda place: 97)
    rows = [Row(number, prompt=b"xyzw") for number in range(40)]
    sizes = [len(one.data) for one in fill_texts(model, rows, config=run, draws=Draws(max_bytes=26, steps=2))]
    assert min(sizes) == 6 and max(sizes) == 30 and len(set(sizes)) > 6


class Says(torch.nn.Module):
    """Logits that know the text: `say(symbol index in the row of all symbols)`."""

    def __init__(self, say: Callable[[int], int]) -> None:
        super().__init__()
        self.say = say

    def forward(self, latent_LH: Tensor, units: object, input_UD: Tensor | None = None) -> Tensor:
        places = units.place_U.tolist()  # pyright: ignore
        logits = torch.zeros(len(places), NUM_TARGETS)
        for row, place in enumerate(places):
            logits[row, self.say(place)] = 20.0
        return logits


@each_objective
def test_the_first_end_ends_a_text(objective: str) -> None:
    run = sampling_run(objective)
    model = model_of(run, torch.float32)
    model.code["text"] = Says(lambda place: END if place >= 4 else 97 + place)
    rows, heard = [Row(0), Row(1, prompt=b"xy")], []
    draws = Draws(max_bytes=30, steps=3)
    spans = fill_texts(model, rows, config=run, draws=draws, on_step=lambda *step: heard.append(step))
    assert len({of for _, of in heard}) == 1 and all(2 < done <= of for done, of in heard)
    wanted = [(b"abcd", True), (b"xycd", True)]
    if objective == "block_diffusion":
        assert [(span.data, span.ended) for span in spans] == wanted
    else:  # where the length that was drawn is shorter, the text is cut before its end
        assert all(
            full.startswith(span.data) and span.ended == (span.data == full)
            for span, (full, _) in zip(spans, wanted, strict=True)
        )
    model.code["text"] = Says(lambda place: 97)
    [full] = fill_texts(model, [Row(0, prompt=b"b")], config=run, draws=Draws(max_bytes=10, steps=3))
    assert full.data == b"b" + b"a" * (len(full.data) - 1) and not full.ended
    assert len(full.data) == 11 or objective == "masked_diffusion"


@each_objective
def test_a_prompt_without_room_is_refused(objective: str) -> None:
    with pytest.raises(ParcelError, match="shorten it"):
        run = sampling_run(objective, latents=12)
        fill_texts(model_of(run, torch.float32), [Row(0, prompt=b"a" * 60)], config=run, draws=Draws())


def test_the_logits_of_a_block_in_sampling_are_those_of_training() -> None:
    """Blocks before it given clean alone, it alone noised: the same numbers as among all copies."""
    run = run_of("block_diffusion")
    model = model_of(run)
    data = b"abcdefghijklmnopq"  # 17 symbols and the end: 3 blocks of 6
    whole = document("a", data)
    pieces = [Piece(whole, Place(), Place(1))]
    trained = with_masks(
        pack_batch([pieces], [draw_zeros], model=run.model, sequence_latents=32), number=9, draws=MASK_DRAWS, seed=0
    )
    expected = model.text_logits(model.latents(trained).flatten(0, 1), trained.text)
    for block in range(3):
        lengths = StaticPatcher(3).lengths(np.zeros(6 * block + 6))
        given = TextSpan(data[: 6 * block + 6], lengths, ended=False, given=2 * block)
        one = Document("a", (given,))
        batch = pack_batch(
            [[Piece(one, Place(), Place(1))]],
            [draw_zeros],
            masks=[draw_no_masks],
            model=run.model,
            sequence_latents=document_positions(one, model=run.model),
        )
        here = trained.text.piece_U == block
        seen = trained.text.coda_input_U[here]
        read = torch.cat((seen, batch.read.symbol_U[6:]))
        batch = replace(batch, text=replace(batch.text, coda_input_U=seen), read=replace(batch.read, symbol_U=read))
        found = model.text_logits(model.latents(batch).flatten(0, 1), batch.text)
        torch.testing.assert_close(found, expected[here], rtol=1e-9, atol=1e-9)
