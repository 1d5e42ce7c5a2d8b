"""Each conditioning tells t where it says and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor

import matformer.model
from matformer.atto import masks, trunk
from matformer.coda.latent import LatentCoda
from matformer.config.schema import ModelConfig, RunConfig, TimeConditioning
from matformer.config.time_conditioning import ENTRANCES
from matformer.data.packing import (
    Noise,
    Piece,
    Place,
    build_batch,
    document_positions,
    draw_zeros,
    pack_batch,
    with_noise,
)
from matformer.data.sources import Document, MediaSpan
from matformer.engine.step import loss_weights
from matformer.layers.attention import DenseCore, TiledCore
from matformer.layers.modulation import TimeModulation, modulate, position_times, rows_of_positions
from matformer.layers.tiles import ROWS
from matformer.layers.time_embedding import TimeEmbedding, time_waves
from matformer.losses.total import total_loss
from matformer.model import Matformer
from matformer.parcels import Batch, Kind
from tests.made import (
    LENGTH,
    audio,
    document,
    image,
    mixed_documents,
    plain_host,
    stirred_value,
    text_only,
    tiny_run,
    with_media,
)

EVERY: tuple[TimeConditioning, ...] = get_args(TimeConditioning)
BY_TILES = 2 * ROWS + 1  # latents of a sequence whose attention is computed by tiles on CPU


def run_with(conditioning: str, **keys: str) -> RunConfig:
    run = tiny_run()
    return run.model_copy(update={"model": with_media(run.model, time_conditioning=conditioning, **keys)})


def model_with(conditioning: str, *, stirred: bool = True, **keys: str) -> Matformer:
    found = plain_host(run_with(conditioning, **keys), stirred=stirred).model
    assert isinstance(found, Matformer)
    return found.requires_grad_(False)


def batch_of(documents: list[Document], model: ModelConfig, *, time: float = 0.4, length: int = LENGTH) -> Batch:
    """Each document alone in a row."""
    return with_noise(build_batch(documents, model=model, sequence_latents=length), time=time, seed=0, index=0)


def test_the_table_has_every_name_of_the_config() -> None:
    assert tuple(ENTRANCES) == EVERY


def test_the_names_of_weights_are_those_of_the_places_where_time_enters() -> None:
    names = {each: {name for name, _ in model_with(each).named_parameters()} for each in EVERY}
    extra = {each: {name for name in names[each] - names["none"] if "audio" not in name} for each in EVERY}
    embedding = ("first.weight", "first.bias", "second.weight", "second.bias")
    film = ("first.weight", "first.bias", "film.weight", "film.bias")
    preludio, coda = "preludi.image.time", "code.image.time"
    assert extra["add"] == {f"{where}.{part}" for where in (preludio, coda) for part in embedding}
    assert extra["token"] == {f"{preludio}.{part}" for part in embedding}
    assert extra["adaln_preludio_coda"] == {f"{where}.{part}" for where in (preludio, coda) for part in film}
    assert extra["adaln_atto"] == {f"atto.layers.{i}.modulation.{part}" for i in range(2) for part in film}
    assert all(names[each] >= names["none"] for each in EVERY)


@pytest.mark.parametrize("conditioning", EVERY)
def test_the_answer_depends_on_t_alone_where_t_is_told(conditioning: TimeConditioning) -> None:
    """Value and noise alike are x_t at every t, and no closed form tells it: what is left is the conditioning."""
    model = model_with(conditioning, precondition="none")
    batch = batch_of([document("a", b"red ", image(1))], model.model_config)

    def answer(time: float) -> Tensor:
        units = batch.media["image"]
        now = replace(units, noise_QF=units.value_NF[units.noised_row_Q], time_T=torch.tensor([time]))
        latents = model.latents(replace(batch, media={**batch.media, "image": now}))
        return model.code["image"](latents.flatten(0, 1), now)

    change = (answer(0.2) - answer(0.7)).abs().max()
    assert change < 1e-5 if conditioning == "none" else change > 1e-3


@pytest.mark.parametrize("conditioning", EVERY)
def test_every_weight_has_a_gradient_and_absent_media_give_zeros(conditioning: TimeConditioning) -> None:
    host = plain_host(run_with(conditioning))
    weights = loss_weights(host.config)
    for documents in (mixed_documents(), [document("t", b"only text")]):
        host.model.zero_grad(set_to_none=True)
        batch = batch_of(documents, host.config.model)
        total_loss(host.model(batch), counts=batch.counts(), weights=weights).backward()
        for name, weight in host.model.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all(), name
            if ".time." in name or ".modulation." in name:
                assert bool(weight.grad.any()) == (len(documents) > 1), name


def test_the_waves_of_t_are_those_of_diffusers() -> None:
    times = torch.linspace(0, 1, 11)
    theirs = get_timestep_embedding(1000 * times, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(time_waves(times), theirs, rtol=0, atol=1e-4)  # angles up to 1000 in float32


def test_shift_scale_and_gate_are_those_of_diffusers_adaln_zero() -> None:
    ours, theirs = TimeModulation(128, parts=6), AdaLayerNormZero(128)
    theirs.linear.load_state_dict(ours.film.state_dict())
    times, x = torch.tensor([0.1, 0.7]), torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(x, emb=ours.first(time_waves(times)))
        first, second = rows_of_positions(ours(times), torch.tensor([[1] * 3, [2] * 3]))
        normed = torch.nn.functional.layer_norm(x, (128,), eps=1e-6)
    torch.testing.assert_close(modulate(normed, shift=first[0], scale=first[1]), expected[0])
    for row, other in zip((first[2], *second), expected[1:], strict=True):
        torch.testing.assert_close(row, other[:, None].expand(-1, 3, -1))


# token


def test_a_token_is_one_position_at_the_head_of_each_noised_span() -> None:
    plain, model = tiny_run().model, run_with("token").model
    for one in mixed_documents():
        generated = sum(isinstance(span, MediaSpan) and span.role == "generate" for span in one.spans)
        assert document_positions(one, model=model) == document_positions(one, model=plain) + generated
        batch = batch_of([one], model)
        assert int((batch.grid.kind_BS != Kind.PAD).sum()) == document_positions(one, model=model)
        assert batch.counts() == batch_of([one], plain).counts()


def test_a_token_belongs_to_its_span_holds_its_time_and_has_no_loss() -> None:
    model = model_with("token")
    batch = batch_of([document("a", b"red ", image(1), b" and", audio(2))], model.model_config, time=0.3)
    grid, hidden_LH = batch.grid, model.embed(batch).flatten(0, 1)
    for name in ("image", "audio"):
        units = batch.media[name]
        (slot,), first = units.time_slot_Q.tolist(), int(units.noised_slot_Q[0])
        assert slot == first - 1 == int(units.header_slot_J[0]) + 1
        assert grid.kind_BS.flatten()[slot] == Kind.NOISED
        for field in (grid.span_BS, grid.media_BS, grid.modality_BS):
            assert field.flatten()[slot] == field.flatten()[first]
        assert grid.axes_BSX.flatten(0, 1)[slot].tolist() == [int(grid.axes_BSX.flatten(0, 1)[first][0]), 0, 0, 0]
        time = model.preludi[name].time
        assert isinstance(time, TimeEmbedding)
        torch.testing.assert_close(hidden_LH[slot], time(torch.tensor([0.3]))[0])
        assert slot not in units.noised_slot_Q.tolist()


# adaln_atto


def media_positions(batch: Batch) -> Tensor:
    """Noised and clean patches, by kind alone."""
    return (batch.grid.kind_BS == Kind.NOISED) | (batch.grid.kind_BS == Kind.CLEAN)


def test_noised_patches_have_t_clean_ones_zero_and_others_nothing() -> None:
    model = run_with("adaln_atto").model
    batch = batch_of(mixed_documents(), model)
    found = position_times(batch, ("image", "audio"))
    assert found is not None
    told = torch.cat((torch.tensor([-1.0]), found.time_T))[found.index_BS]
    kind = batch.grid.kind_BS
    expected = torch.where(kind == Kind.NOISED, 0.4, torch.where(kind == Kind.CLEAN, 0.0, -1.0))
    assert torch.equal(told, expected)
    image_alone = position_times(batch, ("image",))
    assert image_alone is not None
    assert torch.equal(image_alone.index_BS > 0, media_positions(batch) & (batch.grid.modality_BS == 1))
    assert position_times(batch, ()) is None


def without_modulation(model: Matformer) -> Matformer:
    """The same weights in a model whose layers are not modulated."""
    plain = model_with("none")
    weights = {name: value for name, value in model.state_dict().items() if ".modulation." not in name}
    plain.load_state_dict(weights)
    return plain


def assert_text_is_untouched(model: Matformer) -> None:
    """Bit for bit as without modulation: a text alone; all but the patches of a last, generated span, which nobody
    sees; and, where each position sees itself alone so that attention brings nothing, all but any span's patches.
    """
    plain = without_modulation(model)
    assert torch.equal(model.latents(text_only(1)), plain.latents(text_only(1)))
    batch = batch_of([document("a", b"a red square ", image(1)), document("b", audio(2))], model.model_config)
    assert_patches_alone_differ(model.latents(batch), plain.latents(batch), batch)
    batch = batch_of(mixed_documents(), model.model_config)
    hidden, view = model.embed(batch), model.view(batch)
    alone = replace(view, core=DenseCore(torch.eye(LENGTH, dtype=torch.bool).expand(*view.rows, LENGTH)))
    told, untold = (one.atto(hidden.flatten(0, 1), alone).view_as(hidden) for one in (model, plain))
    assert_patches_alone_differ(told, untold, batch)


def assert_patches_alone_differ(told: Tensor, untold: Tensor, batch: Batch) -> None:
    patches = media_positions(batch)
    assert torch.equal(told[~patches], untold[~patches])
    assert ((told - untold).abs().amax(-1) > 1e-4)[patches].all()


def test_text_start_headers_and_closings_are_exactly_as_without_modulation() -> None:
    assert_text_is_untouched(model_with("adaln_atto"))


@pytest.mark.parametrize("kind", [Kind.TEXT, Kind.START, Kind.HEADER, Kind.CLOSING])
def test_a_modulation_that_reaches_another_kind_is_seen(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(batch: Batch, modalities: tuple[str, ...]) -> object:
        found = position_times(batch, modalities)
        assert found is not None
        return replace(found, index_BS=torch.where(batch.grid.kind_BS == kind, 1, found.index_BS))

    monkeypatch.setattr(matformer.model, "position_times", planted)
    with pytest.raises(AssertionError):
        assert_text_is_untouched(model_with("adaln_atto"))


def test_modulation_begins_as_nothing_and_adaln_zero_blocks_begin_closed() -> None:
    atto, plain = (model_with(each, stirred=False) for each in ("adaln_atto", "none"))
    batch = batch_of(mixed_documents(), plain.model_config)
    assert torch.equal(atto.latents(batch), plain.latents(batch))
    for name, weight in atto.named_parameters():
        if ".modulation." in name:
            weight.add_(stirred_value(name, weight))
    assert not torch.equal(atto.latents(batch), plain.latents(batch))
    local = model_with("adaln_preludio_coda", stirred=False)
    assert torch.equal(local.latents(batch), plain.latents(batch))
    coda, units = local.code["image"], batch.media["image"]
    assert isinstance(coda, LatentCoda)
    x = torch.randn(len(units.noised_row_Q), 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(coda._modulated(x, units), coda.output_norm(x))


# media_context: noised


def test_under_a_noised_context_there_is_no_clean_copy_and_positions_agree() -> None:
    for conditioning in ("add", "token"):
        model = run_with(conditioning, media_context="noised").model
        for one in mixed_documents():
            batch = batch_of([one], model)
            assert int((batch.grid.kind_BS != Kind.PAD).sum()) == document_positions(one, model=model)
            given = sum(isinstance(span, MediaSpan) and span.role == "given" for span in one.spans)
            assert len(torch.unique(batch.grid.span_BS[batch.grid.kind_BS == Kind.CLEAN])) == given


@pytest.mark.parametrize("objective", ["flow", "ddpm_v"])
def test_spans_that_text_follows_draw_at_most_one_half_and_others_as_ever(objective: str) -> None:
    documents = [document("a", image(1), audio(2), b"text", image(3)), document("b", image(4))]
    pieces = [[Piece(one, Place(), Place(len(one.spans)))] for one in documents]

    def draw(key: str, span: int, shape: tuple[int, int]) -> Noise:
        return Noise(False, 0.9, np.zeros(shape, np.float32))

    def times(context: str) -> list[float]:
        model = run_with("add", media_context=context, objective=objective).model
        batch = pack_batch(pieces, [draw, draw], model=model, sequence_latents=LENGTH)
        return [*batch.media["image"].time_T.tolist(), *batch.media["audio"].time_T.tolist()]

    shift = 0.0 if objective == "flow" else 0.0005
    assert times("noised") == pytest.approx([0.45 + shift, 0.9 + shift, 0.9 + shift, 0.45 + shift])
    assert times("clean_copy") == pytest.approx([0.9 + shift] * 4)


def assert_text_reads_x_t_alone(model: Matformer, *, length: int = LENGTH) -> None:
    """What follows reads a generated span through x_t: its gradients by x and by eps are alpha and sigma times one."""
    model, one = model.double(), document("a", b"red ", image(1), b" then text")
    batch = batch_of([one], model.model_config, time=0.25, length=length)
    assert isinstance(model.view(batch).core, TiledCore) == (length > LENGTH)
    units = batch.media["image"]
    value, noise = units.value_NF.double().requires_grad_(), units.noise_QF.double().requires_grad_()
    media = {**batch.media, "image": replace(units, value_NF=value, noise_QF=noise)}
    sums = model(replace(batch, media=media))
    by_value, by_noise = torch.autograd.grad(sums["text"].sum(), (value, noise), allow_unused=True)
    assert by_value is not None and by_noise is not None and by_noise.any()
    torch.testing.assert_close(by_value / 0.75, by_noise / 0.25)


@pytest.mark.parametrize("length", [LENGTH, BY_TILES])
@pytest.mark.parametrize("conditioning", EVERY)
def test_text_reads_a_noised_context_and_nothing_cleaner(conditioning: TimeConditioning, length: int) -> None:
    assert_text_reads_x_t_alone(model_with(conditioning, media_context="noised"), length=length)


def test_a_context_that_cannot_be_read_and_a_clean_one_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        assert_text_reads_x_t_alone(model_with("add"))  # clean copies: the gradient by noise is zero
    monkeypatch.setattr(trunk, "sees_noised_context", masks.sees)
    with pytest.raises(AssertionError):
        assert_text_reads_x_t_alone(model_with("add", media_context="noised"))


def assert_nothing_earlier_and_no_other_document_reads_it(model: Matformer, *, length: int = LENGTH) -> None:
    model = model.double()
    rows = [[document("a", b"red ", image(1), b" then"), document("b", audio(2), b"text")]]
    pieces = [[Piece(one, Place(), Place(len(one.spans))) for one in row] for row in rows]
    batch = pack_batch(pieces, [draw_zeros], model=model.model_config, sequence_latents=length)
    batch = with_noise(batch, time=0.4, seed=0, index=0)
    hidden = model.embed(batch).detach().requires_grad_()
    latents = model.atto(hidden.flatten(0, 1), model.view(batch)).view_as(hidden)
    places, document_S, span_S = torch.arange(length), batch.grid.document_BS[0], batch.grid.span_BS[0]
    for place in (document_S >= 0).nonzero().flatten().tolist():
        (gradient,) = torch.autograd.grad(latents[0, place].square().sum(), hidden, retain_graph=True)
        same_span = (span_S == span_S[place]) & (span_S >= 0)
        hidden_from = (document_S != document_S[place]) | ((places > place) & ~same_span)
        assert gradient.any() and not gradient[0][hidden_from].any()
    noised = batch.grid.kind_BS[0] == Kind.NOISED
    last = int((document_S == 0).nonzero().max())
    (gradient,) = torch.autograd.grad(latents[0, last].square().sum(), hidden)
    assert gradient[0][noised & (document_S == 0)].any(-1).all()  # what follows reads every noised patch


def test_a_noised_context_leaks_neither_backwards_nor_into_other_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with("add", media_context="noised")
    for length in (LENGTH, BY_TILES):
        assert_nothing_earlier_and_no_other_document_reads_it(model, length=length)
    for planted in (
        lambda query, key: masks.causal(query, key) | masks.same_span(query, key),
        masks.same_document,
        masks.sees,
    ):
        monkeypatch.setattr(trunk, "sees_noised_context", planted)
        with pytest.raises(AssertionError):
            assert_nothing_earlier_and_no_other_document_reads_it(model)
