"""Noised copies in trees: where they stand, how trees are predicted and drawn, and what may flow."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from matformer.config.schema import ModelConfig, RunConfig
from matformer.data.counts import counts_of
from matformer.data.packing import Piece, Place, build_batch, document_positions, draw_zeros, largest_span, pack_batch
from matformer.data.packing import with_noise as noised
from matformer.data.sources import Document, MediaSpan, Role, media_span, merge_spans
from matformer.engine.denoiser import draw_media
from matformer.engine.draws import Draws, Row
from matformer.engine.trees import draw_trees
from matformer.layers.quad_tree import asked_blocks, budgeted_levels, drawn_levels, leaf_numbers, num_leaves
from matformer.losses.route import split_nats
from matformer.model import Matformer
from matformer.parallel.expected import Guess, expected_counts
from matformer.parcels import Batch, Kind
from tests.made import (
    PATCHER,
    assert_same_sums,
    gradient_by_pictures,
    plain_host,
    sums_by_document,
    tiny_model,
    tiny_run,
)

BUDGET = {"share": 0.5, "levels": 2, "noised_tree": "own"}


def in_trees(model: ModelConfig) -> ModelConfig:
    """The same sizes, a patch a cell, every modality's copies in trees of half the patches."""
    media = {name: media.model_dump() | {"patch": 1, "budget": BUDGET} for name, media in model.media.items()}
    return ModelConfig.model_validate(model.model_dump() | {"media": media})


MODEL = in_trees(tiny_model())


def image(seed: int, *, role: Role = "generate") -> MediaSpan:
    latent = np.random.default_rng(seed).standard_normal((2, 4, 4), dtype=np.float32)
    return media_span(latent, "image", media=MODEL.media["image"], role=role)


def audio(seed: int, *, role: Role = "generate") -> MediaSpan:
    latent = np.random.default_rng(seed).standard_normal((3, 8), dtype=np.float32)
    return media_span(latent, "audio", media=MODEL.media["audio"], role=role)


def document(key: str, *spans: bytes | MediaSpan) -> Document:
    return Document(key, merge_spans(spans, PATCHER))


def documents() -> list[Document]:
    return [
        document("a", b"red", image(1), b" on grass"),
        document("b", audio(2), b"they say"),
        document("c", b"last", image(5)),
        document("d", image(6, role="given"), b"seen"),
    ]


def packed(*rows: list[Document], length: int = 100) -> Batch:
    pieces = [[Piece(one, Place(), Place(len(one.spans))) for one in row] for row in rows]
    batch = pack_batch(pieces, [draw_zeros] * len(rows), model=MODEL, sequence_latents=length)
    return noised(batch, time=0.4, seed=0, index=0)


def made() -> Matformer:
    """Stirred, in float64."""
    found = plain_host(tiny_run().model_copy(update={"model": MODEL})).model
    assert isinstance(found, Matformer)
    return found.double()


def test_both_copies_take_the_budget_and_every_scalar_is_still_scored() -> None:
    batch = packed([documents()[0]])
    kinds = batch.grid.kind_BS[0].tolist()
    assert (kinds.count(Kind.NOISED), kinds.count(Kind.CLEAN)) == (7, 7)
    assert document_positions(documents()[0], model=MODEL) == sum(kind != Kind.PAD for kind in kinds)
    assert largest_span(MODEL) == 3 + 2 * 14
    assert batch.counts()["image"] == 16 * 2 and batch.counts()["router"] == len(batch.route.slot_R)
    units, span = batch.media["image"], image(1)
    assert span.noised_tree is not None and units.noised_level_Q.tolist() == span.noised_tree.tolist()
    first = int((batch.grid.kind_BS[0] == Kind.NOISED).nonzero()[0])
    assert units.noised_slot_Q.tolist() == (first + leaf_numbers(span.noised_tree, grid=(4, 4))[0]).tolist()


def test_answers_to_asked_blocks_are_the_tree() -> None:
    for grid in [(4, 4), (8, 8), (3, 5), (8,), (4, 2, 4)]:
        patches = np.random.default_rng(0).standard_normal((math.prod(grid), 2)).astype(np.float32)
        every, _, _ = asked_blocks(np.zeros(math.prod(grid), np.int64), grid=grid, levels=2)
        for share in (0.75, 1.0):
            tree = budgeted_levels(patches, grid=grid, share=share, levels=2)
            levels, corners, splits = asked_blocks(tree, grid=grid, levels=2)
            assert len(levels) <= len(every) and splits.sum() < len(every) + 1
            # a block that is asked and not split is a leaf: its patches have its level
            for level, corner, split in zip(levels, corners, splits, strict=True):
                block = tuple(slice(at, at + 2**level) for at in corner)
                inside = tree.reshape(grid)[block]
                assert (inside < level).all() if split else (inside == level).all()
            # as scores of all blocks they give it back
            answers = dict(zip(map(tuple, np.c_[levels, corners].tolist()), splits, strict=True))
            asked, places, _ = asked_blocks(np.zeros(math.prod(grid), np.int64), grid=grid, levels=2)
            scores = [answers.get((int(k), *place), False) for k, place in zip(asked, places.tolist(), strict=True)]
            again = drawn_levels(np.array(scores, float), grid=grid, share=share, levels=2)
            assert (again == tree).all()


def test_the_routers_loss_holds_the_nats_of_each_tree_at_its_header() -> None:
    model, batch = made(), packed([documents()[0]])
    trees = batch.trees["image"]
    assert trees.slot_J.tolist() == batch.media["image"].header_slot_J.tolist()
    without = replace(batch, trees={})
    with torch.no_grad():
        logits = model.router.tree_head["image"](model.latents(batch).flatten(0, 1), trees)
        expected = split_nats(logits, trees.split_K).sum()
        added = model(batch)["router"] - model(without)["router"]
    assert expected > 0
    torch.testing.assert_close(added[0], expected)
    assert int(trees.split_K.sum()) == 2 and int((trees.level_K == 2).sum()) == 1  # root, and four below it


def test_packed_in_any_order_is_alone() -> None:
    model, every = made(), documents()
    expected: dict[str, dict[str, float]] = {}
    for one in every:
        expected |= sums_by_document(model, packed([one], length=document_positions(one, model=MODEL)))
    assert expected["a"]["router"] > expected["d"]["router"]
    for rows in ([every], [every[::-1]], [every[2:], every[:2]]):
        assert_same_sums(sums_by_document(model, packed(*rows)), expected)


def test_nothing_but_its_own_loss_depends_on_a_noised_copy() -> None:
    batch = packed(documents())
    for part in ("text", "router", "audio"):
        assert not gradient_by_pictures(made(), part, batch, by="noise_QF").any(), part
    assert gradient_by_pictures(made(), "image", batch, by="noise_QF").any()


def test_a_tree_is_predicted_before_anything_of_its_span_is_seen() -> None:
    """The header's logits are the same for another picture, tree and noise behind the same words."""
    model = made()
    logits = []
    for seed in (1, 2):
        one = image(seed)
        batch = noised(packed([document("a", b"red", one)]), time=0.1 * seed, seed=seed, index=0)
        every = packed([document("a", b"red", replace(one, noised_tree=np.zeros(16, np.int64)))]).trees["image"]
        with torch.no_grad():
            logits.append(model.router.tree_head["image"](model.latents(batch).flatten(0, 1), every))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-12, atol=1e-12)


def test_every_weight_has_a_gradient_whatever_stands_in_the_batch() -> None:
    model = made()
    for row in (documents(), [document("t", b"text alone")]):
        batch = packed(row)
        sum(part.sum() for part in model(batch).values()).backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
        head = model.router.tree_head["image"].header.weight.grad
        assert bool(head.any()) == (len(row) > 1)
        model.zero_grad()


def test_trees_are_drawn_by_seed_and_row_within_the_budget_and_follow_the_logits() -> None:
    run = tiny_run().model_copy(update={"model": MODEL})
    model = plain_host(run).model
    rows = [Row(number, merge_spans([b"words %d" % number], PATCHER)) for number in range(3)]

    def drawn(*, seed: int, temperature: float) -> list[list[int]]:
        draws = Draws(seed=seed, temperature=temperature)
        trees = draw_trees(model, rows, modality="image", buckets=[0, 0, 1], config=run, draws=draws)
        assert [num_leaves(tree, rank=2) for tree in trees] == [7, 7, 14]
        return [tree.tolist() for tree in trees]

    assert drawn(seed=1, temperature=1.0) == drawn(seed=1, temperature=1.0)
    assert any(drawn(seed=1, temperature=1.0) != drawn(seed=seed, temperature=1.0) for seed in range(2, 8))
    assert drawn(seed=1, temperature=0.0) == drawn(seed=2, temperature=0.0)
    head = model.router.tree_head["image"]
    with torch.no_grad():  # one unit alone speaks, for what lies in the lower half
        head.head.weight.zero_()[0, 0] = 50.0
        head.place.axes["embedding_y"].weight[:, 0] = torch.tensor([0.0, 0.0, 50.0, 50.0])
    for tree in drawn(seed=3, temperature=1.0)[:2]:
        assert (np.array(tree).reshape(4, 4)[:2] == 1).all()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_sampling_draws_a_tree_and_denoises_in_it(guidance: float) -> None:
    run = tiny_run().model_copy(update={"model": MODEL})
    model = plain_host(run).model
    rows = [Row(number, merge_spans([b"words"], PATCHER)) for number in range(2)]
    draws = Draws(steps=3, guidance=guidance)
    spans = draw_media(model, rows, modality="image", buckets=[0, 1], config=run, draws=draws)
    assert [span.latent.shape for span in spans] == [(2, 4, 4), (2, 4, 8)]
    again = draw_media(model, rows, modality="image", buckets=[0, 1], config=run, draws=draws)
    for one, other in zip(spans, again, strict=True):
        assert np.isfinite(one.latent).all() and (one.latent == other.latent).all()
        assert one.noised_tree is not None and other.noised_tree is not None
        assert (one.noised_tree == other.noised_tree).all()
    followed = build_batch([document("g", replace(spans[0], role="given"), b"what")], model=MODEL, sequence_latents=40)
    assert followed.grid.kind_BS[0].tolist().count(Kind.CLEAN) == 7


def test_expected_counts_are_those_of_trees_that_split_their_largest_blocks_first() -> None:
    """Pictures and sounds of +1 and -1 in turn: a block loses in proportion to its patches."""
    media = {"image": ((4, 4), (4, 8)), "audio": ((8,), (16,))}
    for name, shapes in media.items():
        one = MODEL.media[name]
        rows = []
        for shape in shapes:
            latent = np.broadcast_to((-1.0) ** np.indices(shape).sum(0), (one.channels, *shape)).astype(np.float32)
            spans = [media_span(latent, name, media=one, role=role) for role in ("generate", "given")]
            rows.append([document(role, span) for role, span in zip("ab", spans, strict=True)])
        found = counts_of(packed(*rows), MODEL).media[name]
        source = {"path": "made", "form": "pairs", "modality": name, "weight": 1.0, "generate_probability": 0.5}
        run = tiny_run().model_dump() | {"model": MODEL.model_dump()}
        run["data"] |= {"sources": {"made": source}, "sequence_latents": 10_000}
        expected = expected_counts(RunConfig.model_validate(run), Guess(symbols=3.0)).media[name]
        for field in ("noised", "clean", "trees", "blocks", "leaves"):
            wanted, real = (np.array(getattr(counts, field)) / counts.spans for counts in (expected, found))
            assert wanted == pytest.approx(real, rel=0.05), (name, field)
        assert sum(real) > 0
