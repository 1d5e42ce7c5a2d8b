"""A budget of latents for clean media: what stands where, what it costs, and what may flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from matformer.config.schema import MediaConfig, ModelConfig
from matformer.data.packing import Piece, Place, build_batch, document_positions, draw_zeros, largest_span, pack_batch
from matformer.data.packing import with_noise as noised
from matformer.data.sources import Document, MediaSpan, Role, media_span, merge_spans
from matformer.engine.denoiser import draw_media
from matformer.engine.draws import Draws, Row
from matformer.hosts.plain import PlainHost
from matformer.layers.quad_tree import leaf_numbers, num_leaves
from matformer.model import Matformer
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


def budgeted(model: ModelConfig, **budget: object) -> ModelConfig:
    """The same sizes, a patch a cell, every modality with this budget or, without keys, none."""
    media = {name: media.model_dump() | {"patch": 1, "budget": budget or None} for name, media in model.media.items()}
    return ModelConfig.model_validate(model.model_dump() | {"media": media})


FULL = budgeted(tiny_model())
HALF = budgeted(tiny_model(), share=0.5, levels=2)  # 7 of 16 and 14 of 32 patches of pictures, half of sound's


def image(seed: int, *, role: Role = "generate", wide: bool = False, model: ModelConfig = HALF) -> MediaSpan:
    latent = np.random.default_rng(seed).standard_normal((2, 4, 8 if wide else 4), dtype=np.float32)
    return media_span(latent, "image", media=model.media["image"], role=role)


def audio(seed: int, *, role: Role = "generate", model: ModelConfig = HALF) -> MediaSpan:
    latent = np.random.default_rng(seed).standard_normal((3, 8), dtype=np.float32)
    return media_span(latent, "audio", media=model.media["audio"], role=role)


def document(key: str, *spans: bytes | MediaSpan) -> Document:
    return Document(key, merge_spans(spans, PATCHER))


def documents(model: ModelConfig = HALF) -> list[Document]:
    """Given and generated, followed and last, both shapes."""
    return [
        document("a", b"red", image(1, model=model), b" on grass"),
        document("b", audio(2, role="given", model=model), b"they say"),
        document("c", image(3, role="given", wide=True, model=model), b"and", audio(4, model=model), b"x"),
        document("d", b"last", image(5, model=model)),
    ]


def packed(rows: Sequence[Sequence[Document]], *, model: ModelConfig = HALF, length: int = 100) -> Batch:
    pieces = [[Piece(one, Place(), Place(len(one.spans))) for one in row] for row in rows]
    batch = pack_batch(pieces, [draw_zeros] * len(rows), model=model, sequence_latents=length)
    return noised(batch, time=0.4, seed=0, index=0)


def made(model: ModelConfig = HALF) -> Matformer:
    """Stirred, in float64."""
    found = plain_host(tiny_run().model_copy(update={"model": model})).model
    assert isinstance(found, Matformer)
    return found.double()


def kinds(batch: Batch) -> list[int]:
    return batch.grid.kind_BS[0].tolist()


def test_clean_copies_take_the_budget_and_noised_copies_every_patch() -> None:
    first, second, third, _ = (kinds(packed([[one]])) for one in documents())
    assert (first.count(Kind.NOISED), first.count(Kind.CLEAN)) == (16, 7)
    assert (second.count(Kind.NOISED), second.count(Kind.CLEAN)) == (0, 4)
    assert (third.count(Kind.NOISED), third.count(Kind.CLEAN)) == (8, 14 + 4)  # 2 roots of 16 patches, and 3 a split
    for one in documents():
        used = sum(kind != Kind.PAD for kind in kinds(packed([[one]])))
        assert document_positions(one, model=HALF) == used
    assert largest_span(HALF) == 3 + 32 + 14


def test_a_constant_picture_takes_a_latent_a_root() -> None:
    flat = media_span(np.full((2, 4, 8), 0.3, np.float32), "image", media=HALF.media["image"], role="given")
    assert kinds(packed([[document("flat", flat, b"flat")]])).count(Kind.CLEAN) == 2


def test_every_patch_of_a_clean_copy_shares_the_latent_of_its_leaf() -> None:
    span = image(1)
    assert span.tree is not None
    batch = packed([[document("a", b"red", span, b"x")]])
    units = batch.media["image"]
    number, first = leaf_numbers(span.tree, grid=(4, 4))
    clean = (batch.grid.kind_BS[0] == Kind.CLEAN).nonzero().flatten()
    assert units.clean_slot_Q.tolist() == clean[torch.from_numpy(number)].tolist()
    assert units.clean_row_Q.tolist() == units.noised_row_Q.tolist() == list(range(16))
    assert units.clean_level_Q.tolist() == span.tree.tolist() and not units.noised_level_Q.any()
    # t, y, x of the middle of each leaf, rounded down
    offset = (2 ** span.tree[first] - 1) // 2
    middle = np.stack((np.zeros(7, int), first // 4 + offset, first % 4 + offset), axis=1)
    assert batch.grid.axes_BSX[0, clean, 1:].tolist() == middle.tolist()
    assert batch.counts()["image"] == 16 * 2


def test_a_span_is_laid_down_as_without_a_budget_but_for_its_clean_copy() -> None:
    (full,), (half,) = documents(FULL)[3:], documents(HALF)[3:]
    one, other = packed([[full]], model=FULL, length=32), packed([[half]], length=32)
    for name in ("kind_BS", "axes_BSX", "span_BS", "media_BS"):
        assert torch.equal(getattr(one.grid, name), getattr(other.grid, name))


def test_merging_begins_as_the_mean_of_the_patches_rows() -> None:
    host = PlainHost(tiny_run().model_copy(update={"model": HALF}))
    model = Matformer(HALF, trunk=host.build_trunk())
    host.prepare(model)
    assert not any(weight.any() for name, weight in model.named_parameters() if ".detail." in name)
    batch = packed([[document("a", image(1, role="given"), b"x")]])
    alone = replace(batch.media["image"], clean_level_Q=torch.zeros(16, dtype=torch.int64))
    with torch.no_grad():
        (rows, slots), (each, _) = (model.preludi["image"](units) for units in (batch.media["image"], alone))
        level = model.preludi["image"].merge.level_embedding.weight
    units = batch.media["image"]
    for slot in units.clean_slot_Q.unique():
        here = units.clean_slot_Q == slot
        expected = each[:16][here].mean(0)
        if here.sum() > 1:
            expected = expected + level[int(units.clean_level_Q[here][0]) - 1]
        torch.testing.assert_close(rows[slots == slot][0], expected)


def test_what_a_leaf_leaves_out_of_its_mean_still_reaches_the_text() -> None:
    model, batch = made(), packed([[document("a", image(1, role="given"), b"some words")]])
    units = batch.media["image"]
    merged = (units.clean_level_Q > 0).nonzero().flatten()[:4]
    moved = units.value_NF.clone()
    moved[merged[0]] += 1.0
    moved[merged[1]] -= 1.0  # the same mean
    with torch.no_grad():
        before = model(batch)["text"]
        after = model(replace(batch, media={**batch.media, "image": replace(units, value_NF=moved)}))["text"]
    assert units.clean_slot_Q[merged].unique().numel() == 1
    assert (before - after).abs() > 1e-6


def test_packed_in_any_order_is_alone() -> None:
    model, every = made(), documents()
    expected: dict[str, Mapping[str, float]] = {}
    for one in every:
        expected |= sums_by_document(model, packed([[one]], length=document_positions(one, model=HALF)))
    for rows in ([every], [every[::-1]], [every[1:3], every[:1] + every[3:]]):
        assert_same_sums(sums_by_document(model, packed(rows, length=160)), expected)


def test_nothing_but_its_own_loss_depends_on_a_noised_span() -> None:
    batch = packed([documents()], length=160)
    assert not gradient_by_pictures(made(), "text", batch, by="noise_QF").any()
    assert not gradient_by_pictures(made(), "router", batch, by="noise_QF").any()
    assert gradient_by_pictures(made(), "image", batch, by="noise_QF").any()
    assert gradient_by_pictures(made(), "text", batch, by="value_NF").any()


@pytest.mark.parametrize("unet_width", [0, 4])
def test_no_latent_of_clean_patches_or_text_depends_on_a_noised_span(unet_width: int) -> None:
    """Through leaves neither, nor through convolutions over the cells of both copies."""
    media = {
        name: MediaConfig.model_validate(one.model_dump() | {"unet_width": unet_width})
        for name, one in HALF.media.items()
    }
    model = made(HALF.model_copy(update={"media": media}))
    batch = packed([documents()], length=160)
    leaves = {name: units.noise_QF.double().requires_grad_() for name, units in batch.media.items()}
    noised_media = {name: replace(units, noise_QF=leaves[name]) for name, units in batch.media.items()}
    latent_LH = model.latents(replace(batch, media=noised_media)).flatten(0, 1)
    kind_L = batch.grid.kind_BS.flatten()
    weights = torch.randn(latent_LH.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for here, flows in ((kind_L != Kind.NOISED, False), (kind_L == Kind.NOISED, True)):
        total = (latent_LH * weights)[here].sum()
        for name, found in zip(
            leaves, torch.autograd.grad(total, list(leaves.values()), retain_graph=True), strict=True
        ):
            assert bool(found.any()) == flows, name


def test_the_tree_does_not_tell_a_noised_span_anything() -> None:
    """Another tree, of the same or of another number of leaves, leaves the span's own loss as it is."""
    model, span = made(), image(1)
    trees = [span.tree, image(9).tree, np.full(16, 2)]
    assert not (trees[0] == trees[1]).all()
    sums = [
        sums_by_document(model, packed([[document("a", b"red", replace(span, tree=tree), b"x")]], length=60))["a"]
        for tree in trees
    ]
    assert sums[0]["image"] == pytest.approx(sums[1]["image"], rel=1e-12)
    assert sums[0]["image"] == pytest.approx(sums[2]["image"], rel=1e-12)
    assert sums[0]["text"] != sums[1]["text"]


@pytest.mark.parametrize("conditioning", ["token", "adaln_preludio_coda", "adaln_atto"])
def test_every_weight_has_a_gradient_whatever_stands_in_the_batch(conditioning: str) -> None:
    media = {
        name: MediaConfig.model_validate(one.model_dump() | {"time_conditioning": conditioning})
        for name, one in HALF.media.items()
    }
    model = made(HALF.model_copy(update={"media": media}))
    for rows in ([documents()], [[document("t", b"text alone")]]):
        batch = packed(rows, model=model.model_config, length=160)
        sum(part.sum() for part in model(batch).values()).backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
        detail = model.preludi["image"].merge.detail[0].weight.grad
        assert bool(detail.any()) == (len(rows[0]) > 1)
        model.zero_grad()


def test_a_picture_that_was_sampled_stands_in_its_own_tree_for_what_follows() -> None:
    run = tiny_run().model_copy(update={"model": HALF})
    row = Row(0, merge_spans([b"red"], PATCHER))
    draws = Draws(steps=2, guidance=1.0)
    host = plain_host(run)
    (span,) = draw_media(host.model, [row], modality="image", buckets=[0], config=run, draws=draws)
    again = media_span(span.latent, "image", media=HALF.media["image"], role="given")
    assert span.tree is not None and again.tree is not None and (span.tree == again.tree).all()
    assert num_leaves(span.tree, rank=2) == 7
    given = build_batch([document("g", replace(span, role="given"), b"what")], model=HALF, sequence_latents=40)
    assert kinds(given).count(Kind.CLEAN) == 7
