"""Objective `next_latent`: each patch is decoded from the position before it, and noise stays in the Coda."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from matformer.atto import masks
from matformer.coda.base import Coda
from matformer.config.schema import MediaObjective, ModelConfig, RunConfig
from matformer.data.packing import (
    DrawNoise,
    Piece,
    Place,
    build_batch,
    document_positions,
    draw_training_noise,
    largest_span,
    pack_batch,
)
from matformer.data.sources import Document, MediaSpan
from matformer.engine.denoiser import draw_media
from matformer.engine.draws import Draws, Row, Solver
from matformer.engine.step import loss_weights
from matformer.layers.flow import noised_rows
from matformer.layers.noise_levels import levels
from matformer.layers.patchify import patchify
from matformer.losses.flow import squared_error
from matformer.losses.total import total_loss
from matformer.model import Matformer
from matformer.parallel.seeds import generator
from matformer.parcels import Batch, Kind, MediaUnits
from tests.made import (
    LENGTH,
    audio,
    document,
    image,
    mixed_documents,
    one_a_row,
    packed,
    plain_host,
    tiny_run,
    with_media,
)
from tests.tolerances import SAME_SUM

S, T, H, C, E, P = (int(kind) for kind in (Kind.START, Kind.TEXT, Kind.HEADER, Kind.CLEAN, Kind.CLOSING, Kind.PAD))


def next_latent(*, noises: int = 3, predicts: MediaObjective = "flow", **keys: Any) -> RunConfig:
    """The tiny run with every medium under `next_latent`."""
    run, asked = tiny_run(), {"noises": noises, "predicts": predicts}
    model = with_media(run.model, objective="next_latent", next_latent=asked, **keys)
    return run.model_copy(update={"model": model})


def model_of(run: RunConfig) -> Matformer:
    model = plain_host(run).model
    assert isinstance(model, Matformer)
    return model


def drawn(*, step: int = 1, lane: int = 0, blind: float = 0.0) -> DrawNoise:
    return draw_training_noise(seed=0, step=step, lane=lane, blind_probability=blind, time_shift=1.0)


def training_batch(documents: list[Document], model: ModelConfig, *, blind: float = 0.0, length: int = LENGTH) -> Batch:
    """Each document alone in a row, in a lane of its own."""
    pieces = [[Piece(one, Place(), Place(len(one.spans)))] for one in documents]
    draws = [drawn(lane=lane, blind=blind) for lane in range(len(pieces))]
    return pack_batch(pieces, draws, model=model, sequence_latents=length)


# layout


def test_a_span_stands_once_clean_and_each_patch_is_decoded_before_it() -> None:
    batch = training_batch([document("a", b"cap", image(1), b"z")], next_latent().model, length=12)
    # start | cap. | header | four patches | closing | z.
    grid, units = batch.grid, batch.media["image"]
    assert grid.kind_BS.tolist() == [[S, T, T, H, C, C, C, C, E, T, P, P]]
    assert (grid.span_BS == -1).all()
    assert grid.axes_BSX[0, :10, 0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 5, 6]
    assert grid.axes_BSX[0, 4:8, 1:].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert (units.clean_row_Q.tolist(), units.clean_slot_Q.tolist()) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert units.noised_row_Q.tolist() == [0, 1, 2, 3] * 3
    assert units.noised_slot_Q.tolist() == [3, 4, 5, 6] * 3
    assert units.time_of_Q.tolist() == list(range(12))
    assert batch.counts()["image"] == 3 * 4 * 8
    assert batch.route.slot_R.tolist() == [0, 1, 2, 8, 9]  # as ever: not at headers and patches


def test_given_spans_have_the_same_layout_and_no_loss() -> None:
    model = next_latent().model
    generated, given = (
        training_batch([document("a", b"cap", image(1, role=role), b"z")], model) for role in ("generate", "given")
    )
    for field in ("kind_BS", "axes_BSX", "span_BS", "media_BS"):
        assert torch.equal(getattr(generated.grid, field), getattr(given.grid, field))
    assert given.counts()["image"] == 0


@pytest.mark.parametrize("media_context", ["clean_copy", "noised"])
def test_positions_are_counted_as_they_are_laid_out(media_context: str) -> None:
    run = next_latent(media_context=media_context)
    for one in mixed_documents():
        batch = training_batch([one], run.model)
        assert int((batch.grid.kind_BS != Kind.PAD).sum()) == document_positions(one, model=run.model)
        assert not (batch.grid.kind_BS == Kind.NOISED).any()
    assert largest_span(run.model) == 3 + 8  # an image of 4 x 8 cells, or a sound of 16


def test_modalities_may_differ_in_their_objective() -> None:
    model = next_latent().model
    flow = tiny_run().model.media["audio"]
    model = model.model_copy(update={"media": {**model.media, "audio": flow}})
    batch = training_batch(mixed_documents(), model)
    noised = batch.grid.kind_BS == Kind.NOISED
    assert noised.any() and (batch.grid.modality_BS[noised] == 2).all()
    sums = model_of(tiny_run().model_copy(update={"model": model}))(batch)
    assert sums["image"].sum() > 0 and sums["audio"].sum() > 0


# noise


def test_every_noise_of_every_latent_has_its_own_t_and_epsilon() -> None:
    units = training_batch([document("a", image(1), b"z", image(2))], next_latent().model).media["image"]
    assert len(units.noise_QF) == len(units.time_T) == 2 * 3 * 4
    assert len(torch.unique(units.time_T)) == len(units.time_T)
    assert len(torch.unique(units.noise_QF)) == units.noise_QF.numel()
    assert (units.time_T > 0).all() and (units.time_T < 1).all()


def test_noise_is_that_of_step_lane_and_span_whoever_holds_the_row() -> None:
    """A rank that holds one row draws what a rank that holds all draws: so does a resumed or resharded run."""
    documents, model = mixed_documents(), next_latent().model
    together = training_batch(documents, model, blind=0.5)
    for lane, one in enumerate(documents):
        pieces = [[Piece(one, Place(), Place(len(one.spans)))]]
        alone = pack_batch(pieces, [drawn(lane=lane, blind=0.5)], model=model, sequence_latents=LENGTH)
        assert torch.equal(alone.grid.blind_BS[0], together.grid.blind_BS[lane])
        for name, units in together.media.items():
            rows = units.noised_slot_Q // LENGTH == lane
            assert torch.equal(alone.media[name].noise_QF, units.noise_QF[rows])
            assert torch.equal(alone.media[name].time_T, units.time_T[units.time_of_Q[rows]])
    other = pack_batch(pieces, [drawn(step=2, lane=7)], model=model, sequence_latents=LENGTH)
    assert not torch.isin(other.media["image"].time_T, alone.media["image"].time_T).any()


def test_under_ddpm_times_lie_on_its_indices() -> None:
    units = training_batch([document("a", image(1))], next_latent(predicts="ddpm_v").model).media["image"]
    index = 1000 * units.time_T.double() - 0.5
    torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-4)


def test_heldout_noise_is_one_of_each_latent_and_that_of_other_objectives() -> None:
    documents = mixed_documents()
    ours, theirs = one_a_row(documents, model=next_latent().model, time=0.3), one_a_row(documents, time=0.3)
    assert ours.counts() == theirs.counts()
    for name, units in ours.media.items():
        assert torch.equal(units.noise_QF, theirs.media[name].noise_QF)
        assert torch.equal(units.noised_row_Q, theirs.media[name].noised_row_Q)
        assert units.time_T[units.time_of_Q].tolist() == pytest.approx([0.3] * len(units.noised_row_Q))


# who sees what


def assert_no_leak(model: Matformer, batch: Batch) -> None:
    """Patch j is decoded from what stands before it; noise reaches the loss of its own row alone."""
    units = batch.media["image"]
    value, noise = units.value_NF.double().requires_grad_(), units.noise_QF.double().requires_grad_()
    now = replace(units, value_NF=value, noise_QF=noise)
    batch = replace(batch, media={**batch.media, "image": now})
    hidden = model.embed(batch)
    latent_LH = model.atto(hidden.flatten(0, 1), model.view(batch))
    errors_Q = squared_error(model.code["image"](latent_LH, now), now)
    slot_of_row = dict(zip(units.clean_row_Q.tolist(), units.clean_slot_Q.tolist(), strict=True))
    for q, row in enumerate(units.noised_row_Q.tolist()):
        by_value, by_noise = torch.autograd.grad(errors_Q[q], (value, noise), retain_graph=True)
        assert by_value[row].any() and not by_value[row + 1 :].any()
        assert by_noise[q].any() and not by_noise[:q].any() and not by_noise[q + 1 :].any()
        decoded_from = latent_LH[units.noised_slot_Q[q]].square().sum()
        (by_hidden,) = torch.autograd.grad(decoded_from, hidden, retain_graph=True)
        assert by_hidden.flatten(0, 1)[: slot_of_row[row]].any()
        assert not by_hidden.flatten(0, 1)[slot_of_row[row] :].any()
    by_value, _ = torch.autograd.grad(errors_Q[3], (value, noise), retain_graph=True)
    assert by_value[:3].any(-1).all()  # the last of the first four reads all three before it
    sums = model.sums(latent_LH, batch)
    for part in ("text", "router", "audio"):
        by_value, by_noise = torch.autograd.grad(sums[part].sum(), (value, noise), retain_graph=True, allow_unused=True)
        assert by_value is not None and by_value.any(-1).all(), f"{part} reads every latent"
        assert by_noise is None or not by_noise.any()


def leaking(batch: Batch) -> Batch:
    """A planted fault: patches see each other both ways."""
    grid = batch.grid
    return replace(batch, grid=replace(grid, span_BS=torch.where(grid.kind_BS == Kind.CLEAN, 0, -1)))


def shifted(batch: Batch) -> Batch:
    """A planted fault: each patch is decoded from its own position."""
    units = batch.media["image"]
    own = replace(units, noised_slot_Q=units.noised_slot_Q + 1)
    return replace(batch, media={**batch.media, "image": own})


@pytest.mark.parametrize("conditioning", ["none", "add", "adaln_preludio_coda"])
def test_a_patch_is_decoded_from_what_stands_before_it_and_text_never_sees_noise(conditioning: str) -> None:
    run = next_latent(noises=2, time_conditioning=conditioning)
    model = model_of(run).double()
    batch = training_batch([document("a", b"red ", image(1), b" then ", audio(2))], run.model)
    assert_no_leak(model, batch)
    for planted in (leaking, shifted):
        with pytest.raises(AssertionError):
            assert_no_leak(model, planted(batch))


def test_a_blind_span_sees_itself_and_the_start_and_is_seen_without_its_header() -> None:
    model = next_latent().model
    batch = build_batch([document("a", b"cap", image(1), b"z")], model=model, sequence_latents=10, blind=True)
    # start | cap. | header | four patches | closing | z.
    seen = masks.visible(batch.grid)[0].long().tolist()
    assert ["".join(".x"[k] for k in row) for row in seen] == [
        "x.........",
        "xx........",
        "xxx.......",
        "x..x......",
        "x..xx.....",
        "x..xxx....",
        "x..xxxx...",
        "x..xxxxx..",
        "xxx.xxxxx.",
        "xxx.xxxxxx",
    ]
    assert torch.equal(masks.visible(batch.grid), masks.visible(batch.grid, masks.sees_noised_context))


def test_a_document_is_the_same_alone_packed_and_padded() -> None:
    run = next_latent()
    model, documents = model_of(run).double().requires_grad_(False), mixed_documents()
    alone = {}
    for one in documents:
        length = document_positions(one, model=run.model)
        alone[one.key] = model(one_a_row([one], length=length, model=run.model))
    batches = [
        packed([documents[::-1]], length=170, model=run.model),
        packed([documents[:3], documents[3:]], length=90, model=run.model),
        one_a_row(documents, length=61, model=run.model),
    ]
    for batch in batches:
        sums = model(batch)
        for number, key in enumerate(batch.document_keys):
            for part, expected in alone[key].items():
                limit = SAME_SUM[torch.float64] * max(float(expected[0]), 1.0)
                assert abs(float(sums[part][number] - expected[0])) <= limit, (key, part)


@pytest.mark.parametrize("conditioning", ["none", "add", "adaln_preludio_coda"])
def test_every_weight_has_a_gradient_and_time_enters_the_coda_alone(conditioning: str) -> None:
    host = plain_host(next_latent(time_conditioning=conditioning))
    weights = loss_weights(host.config)
    for documents in (mixed_documents(), [document("t", b"only text")]):
        host.model.zero_grad(set_to_none=True)
        batch = training_batch(documents, host.config.model)
        total_loss(host.model(batch), counts=batch.counts(), weights=weights).backward()
        for name, weight in host.model.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all(), name
            assert bool(weight.grad.any()) or len(documents) == 1, name
    timed = {name.rsplit(".time.")[0] for name, _ in host.model.named_parameters() if ".time." in name}
    assert timed == (set() if conditioning == "none" else {"code.image", "code.audio"})


# sampling


class Listening(Coda[MediaUnits]):
    """Says what `inner` says, and keeps the latents that it was asked with."""

    def __init__(self, inner: Coda[MediaUnits]) -> None:
        super().__init__()
        self.inner = inner
        self.heard: list[tuple[Tensor, Tensor]] = []  # rows and their latents

    def forward(self, latent_LH: Float[Tensor, "L H"], units: MediaUnits) -> Float[Tensor, "Qn F"]:
        self.heard.append((units.noised_row_Q, latent_LH.index_select(0, units.noised_slot_Q)))
        return self.inner(latent_LH, units)


def prompted() -> list[Row]:
    """Rows that differ in what stands before the new span."""
    texts = [document("x", text).spans for text in (b"red", b"a longer caption", b"x")]
    return [Row(0, texts[0]), Row(1, (image(5, role="given"), *texts[1])), Row(2), Row(3, texts[2])]


@pytest.mark.parametrize("predicts", ["flow", "ddpm_eps", "ddpm_v"])
def test_latents_in_sampling_are_those_of_teacher_forcing(predicts: MediaObjective) -> None:
    run = next_latent(predicts=predicts)
    model = model_of(run).requires_grad_(False)
    listening = Listening(model.code["image"])
    model.code["image"] = listening
    rows, buckets = prompted(), [1, 0, 1, 0]
    spans = draw_media(model, rows, modality="image", buckets=buckets, config=run, draws=Draws(steps=2, guidance=1.0))
    assert [span.latent.shape for span in spans] == [(2, 4, 8), (2, 4, 4), (2, 4, 8), (2, 4, 4)]
    documents = [Document(f"d{row.number}", (*row.spans, span)) for row, span in zip(rows, spans, strict=True)]
    batch = build_batch(documents, model=run.model, sequence_latents=LENGTH)
    forced_LH, units = model.latents(batch).flatten(0, 1), batch.media["image"]
    heard = dict(
        (row, latent)
        for rows_Q, latents_QH in listening.heard
        for row, latent in zip(rows_Q.tolist(), latents_QH, strict=True)
    )
    assert sorted(heard) == sorted(units.noised_row_Q.tolist())
    for row, slot in zip(units.noised_row_Q.tolist(), units.noised_slot_Q.tolist(), strict=True):
        torch.testing.assert_close(heard[row], forced_LH[slot], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("solver", "each"), [("euler", 3), ("heun", 6), ("dpm", 3)])
def test_evaluations_are_counted_over_all_patches(solver: Solver, each: int) -> None:
    run, heard = next_latent(), []
    model = model_of(run).requires_grad_(False)
    draws = Draws(steps=3, guidance=1.0, solver=solver)
    draw_media(
        model, prompted(), modality="image", buckets=[1, 0, 1, 0], config=run, draws=draws,
        on_step=lambda *step: heard.append(step),
    )  # fmt: skip
    total = 8 * each  # patches of the larger bucket
    assert heard == [(done, total) for done in range(1, total + 1)]


class GaussianOracle(Coda[MediaUnits]):
    """The exact expectation of what is predicted for x ~ N(mean, spread^2)."""

    def __init__(self, mean: float, spread: float, *, predicts: MediaObjective) -> None:
        super().__init__()
        self.mean, self.spread, self.predicts = mean, spread, predicts

    def forward(self, latent_LH: Float[Tensor, "L H"], units: MediaUnits) -> Float[Tensor, "Qn F"]:
        x_t, time = noised_rows(units, objective=self.predicts)
        at = levels(time.double()[:, None], objective=self.predicts)
        surprise = (x_t - at.alpha * self.mean) / (at.alpha.square() * self.spread**2 + at.sigma.square())
        clean, noise = self.mean + at.alpha * self.spread**2 * surprise, at.sigma * surprise
        if self.predicts == "ddpm_eps":
            return noise
        return noise - clean if self.predicts == "flow" else at.alpha * noise - at.sigma * clean


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("predicts", ["flow", "ddpm_eps", "ddpm_v"])
def test_the_exact_answer_of_a_gaussian_gives_its_mean_and_spread(predicts: MediaObjective, guidance: float) -> None:
    run = next_latent(predicts=predicts)
    model = model_of(run).requires_grad_(False)
    model.code["image"] = GaussianOracle(0.7, 0.4, predicts=predicts)
    draws = Draws(steps=30, guidance=guidance, solver="heun")
    rows = prompted()
    for row, span in zip(
        rows, draw_media(model, rows, modality="image", buckets=[1, 0, 1, 0], config=run, draws=draws), strict=True
    ):
        x_0 = patchify(torch.from_numpy(span.latent), rank=2, patch=2).numpy()
        dice = generator(0, "sample", "image", row.number, len(row.spans))
        x_1 = dice.standard_normal(x_0.shape, dtype=np.float32)
        assert np.abs(x_0 - (0.7 + 0.4 * x_1)).max() < 0.03


def test_a_row_is_drawn_as_it_is_alone_and_guidance_is_heard() -> None:
    run = next_latent()
    model = model_of(run).requires_grad_(False)

    def made(rows: list[Row], buckets: list[int], guidance: float) -> list[MediaSpan]:
        draws = Draws(steps=2, guidance=guidance)
        return draw_media(model, rows, modality="image", buckets=buckets, config=run, draws=draws)

    together = made(prompted(), [1, 0, 1, 0], 2.0)
    for row, bucket, span in zip(prompted(), [1, 0, 1, 0], together, strict=True):
        assert np.allclose(made([row], [bucket], 2.0)[0].latent, span.latent, atol=1e-4)
    unguided = made(prompted()[:1], [1], 1.0)[0].latent
    assert np.abs(unguided - together[0].latent).max() > 1e-3
    other = Row(0, document("x", b"blue").spans)
    assert np.abs(made([other], [1], 1.0)[0].latent - unguided).max() > 1e-4  # the caption is read
    assert np.allclose(made([other], [1], 0.0)[0].latent, made(prompted()[:1], [1], 0.0)[0].latent, atol=1e-5)
