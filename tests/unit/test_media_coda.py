"""The Code of media: linear maps, an MLP a patch, blocks that attend to the span's other patches."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from matformer.coda.latent import LatentCoda
from matformer.config.schema import CodaKind, ModelConfig
from matformer.data.packing import build_batch, with_noise
from matformer.data.sources import Document
from matformer.engine.step import loss_weights
from matformer.layers.cells import CellsDown, CellShape, CellsUp, canvases
from matformer.layers.flow import noised_rows
from matformer.layers.precondition import Precondition
from matformer.losses.total import total_loss
from matformer.model import Matformer
from matformer.parcels import MediaUnits
from tests.made import LENGTH, document, image, mixed_documents, packed, plain_host, tiny_run, with_media

EVERY: tuple[CodaKind, ...] = get_args(CodaKind)
NEIGHBOURS = {"linear": False, "mlp": False, "dit": True}


def model_of(kind: str, **keys: object) -> Matformer:
    run = tiny_run()
    run = run.model_copy(update={"model": with_media(run.model, coda=kind, **keys)})
    found = plain_host(run, stirred=True).model
    assert isinstance(found, Matformer)
    return found


def units_of(documents: list[Document], model: ModelConfig) -> MediaUnits:
    batch = build_batch(documents, model=model, sequence_latents=LENGTH)
    return with_noise(batch, time=0.4, seed=0, index=0).media["image"]


def answered(model: Matformer, units: MediaUnits, *, latents: Tensor | None = None) -> Tensor:
    coda = model.code["image"]
    if latents is None:
        latents = torch.randn(4 * LENGTH, 32, generator=torch.Generator().manual_seed(1))
    return coda(latents, units)


@pytest.mark.parametrize("conditioning", ["add", "adaln_preludio_coda"])
@pytest.mark.parametrize("kind", EVERY)
def test_an_answer_reads_its_own_span_and_nothing_else(kind: str, conditioning: str) -> None:
    """By gradient: patch 0 of the first of two spans; its neighbours only where the Coda attends."""
    model = model_of(kind, time_conditioning=conditioning)
    units = units_of([document("a", b"x", image(1)), document("b", b"y", image(2, wide=True))], model.model_config)
    noise = units.noise_QF.clone().requires_grad_()
    answered(model, replace(units, noise_QF=noise))[0].sum().backward()
    assert noise.grad is not None
    read = noise.grad.abs().sum(1) > 0
    first = units.span_N[units.noised_row_Q] == 0
    assert read[0]
    assert not read[~first].any()
    assert bool(read[first][1:].all()) is NEIGHBOURS[kind]
    assert bool(read[first][1:].any()) is NEIGHBOURS[kind]


def test_a_window_of_one_patch_sees_no_neighbour() -> None:
    model = model_of("dit", coda_window=1)
    units = units_of([document("a", image(1))], model.model_config)
    noise = units.noise_QF.clone().requires_grad_()
    answered(model, replace(units, noise_QF=noise))[1].sum().backward()
    assert noise.grad is not None
    assert (noise.grad.abs().sum(1) > 0).tolist() == [False, True, False, False]


def test_attention_is_torchs_over_the_span_with_turned_queries_and_keys() -> None:
    """The whole Coda of one block, written again with nn.functional over each span alone."""
    model = model_of("dit", coda_layers=1, time_conditioning="none")
    coda = model.code["image"]
    assert isinstance(coda, LatentCoda)
    units = units_of([document("a", image(1)), document("b", image(2, wide=True))], model.model_config)
    latents = torch.randn(2 * LENGTH, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = coda(latents, units)
        x_t, time = noised_rows(units)
        row = units.noised_row_Q
        patch = coda.precondition.network_input(x_t, time)
        x = coda.latent(latents[units.noised_slot_Q]) + coda.patch(patch) + coda.place(units.place_NX[row])
        for span in (0, 1):
            of = units.span_N[row] == span
            x[of] = x[of] + attended(coda, coda.attention_norms[0](x[of]), units.place_NX[row][of])
        x = x + coda.blocks[0](coda.norms[0](x))
        x = coda.output_norm(x)
        want = coda.precondition.prediction(coda.velocity(x) + coda.gain(x) * patch, x_t, time)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def attended(coda: LatentCoda, x: Tensor, places: Tensor) -> Tensor:
    """Heads of 4 scalars: pair 0 turns by y, pair 1 by x, both at rate 1 (the first of each axis)."""
    attention = coda.attentions[0]
    query, key, value = attention.query_key_value(x).view(len(x), 3, 4, 4).permute(1, 2, 0, 3)
    angle = places[:, 1:].double().to(x.dtype)
    query, key = (
        torch.view_as_real(torch.complex(q[..., :2], q[..., 2:]) * torch.polar(torch.ones_like(angle), angle))
        for q in (query, key)
    )
    query, key = (torch.cat((q[..., 0], q[..., 1]), dim=-1) for q in (query, key))
    out = nn.functional.scaled_dot_product_attention(query, key, value)
    return attention.output(out.transpose(0, 1).flatten(1))


def test_the_linear_coda_is_affine_in_the_latent() -> None:
    """Inside the closed form's scales; the gain makes it a product with the noised patch, which is held."""
    model = model_of("linear", time_conditioning="none")
    units = units_of([document("a", image(1))], model.model_config)
    first, second = torch.randn(2, 4 * LENGTH, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        middle = answered(model, units, latents=(first + second) / 2)
        ends = (answered(model, units, latents=first) + answered(model, units, latents=second)) / 2
        curved = answered(model_of("mlp"), units, latents=(first + second) / 2)
        curved_ends = (
            answered(model_of("mlp"), units, latents=first) + answered(model_of("mlp"), units, latents=second)
        ) / 2
    torch.testing.assert_close(middle, ends, rtol=1e-4, atol=1e-4)
    assert (curved - curved_ends).abs().max() > 1e-2


@pytest.mark.parametrize("kind", EVERY)
def test_the_first_answer_is_the_gaussians(kind: str) -> None:
    run = tiny_run()
    model = plain_host(run.model_copy(update={"model": with_media(run.model, coda=kind)}), stirred=False).model
    assert isinstance(model, Matformer)
    units = units_of([document("a", image(1))], model.model_config)
    x_t, time = noised_rows(units)
    want = Precondition([1.0] * 8).prediction(torch.zeros_like(x_t), x_t, time)
    torch.testing.assert_close(answered(model, units), want)


@pytest.mark.parametrize("kind", EVERY)
def test_every_weight_has_a_gradient_also_where_media_are_absent(kind: str) -> None:
    run = tiny_run()
    host = plain_host(run.model_copy(update={"model": with_media(run.model, coda=kind)}), stirred=True)
    for documents in (mixed_documents(), [document("t", b"only text")]):
        host.model.zero_grad(set_to_none=True)
        batch = build_batch(documents, model=host.config.model, sequence_latents=LENGTH)
        batch = with_noise(batch, time=0.4, seed=0, index=0)
        total_loss(host.model(batch), counts=batch.counts(), weights=loss_weights(host.config)).backward()
        assert all(weight.grad is not None for weight in host.model.parameters())
        assert all(bool(weight.grad.any()) == (len(documents) > 1) for weight in host.model.code["image"].parameters())


def test_alone_is_packed_where_the_coda_attends() -> None:
    model = model_of("dit")
    documents = [document("a", b"red ", image(1)), document("b", image(2, wide=True), b"wide"), document("c", image(3))]
    with torch.no_grad():
        alone = [float(model(packed([[one]], length=LENGTH))["image"].sum()) for one in documents]
        together = model(packed([documents[::-1]], length=2 * LENGTH))["image"].tolist()
    assert together == pytest.approx(alone[::-1], rel=1e-5)


# U-Net


def test_rows_laid_on_canvases_are_taken_back_and_cells_are_where_unpatchify_puts_them() -> None:
    shape = CellShape((1, 2, 4), patch=2, rank=2, channels=2)
    model = tiny_run().model
    spans = [image(1), image(2, wide=True)]
    units = units_of([document(str(i), one) for i, one in enumerate(spans)], model)
    rows = units.value_NF[units.noised_row_Q]
    copy, place = units.span_N[units.noised_row_Q], units.place_NX[units.noised_row_Q]
    on = canvases(copy, place, count=2, shape=shape, dtype=rows.dtype)
    cells = on.lay(rows)
    assert torch.equal(on.take(cells), rows)
    for span, canvas, known in zip(spans, cells, on.known, strict=True):
        wide = span.latent.shape[2]
        assert torch.equal(canvas[:, :, :wide], torch.from_numpy(span.latent))
        assert known[:, :, :wide].all()
        assert not canvas[:, :, wide:].any()
        assert not known[:, :, wide:].any()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_else_is_on_the_canvas_changes_nothing(rank: int) -> None:
    """A grid alone on a canvas of its own size, and in the corner of a larger one."""
    rows, place, shapes = grid_rows(rank)
    found = []
    for shape in shapes:
        torch.manual_seed(0)
        down, up = CellsDown(shape, width=6, atto_width=5), CellsUp(shape, width=6, coda_width=5)
        with torch.no_grad():
            on = canvases(torch.zeros(len(rows), dtype=torch.long), place, count=1, shape=shape, dtype=rows.dtype)
            latents = down(rows, on)
            found.append((latents, up(latents, rows, on)))
    for small, large in zip(*found, strict=True):
        torch.testing.assert_close(small, large)
        assert small.abs().max() > 0


def grid_rows(rank: int) -> tuple[Tensor, Tensor, list[CellShape]]:
    """Patches of 2 cells of one small grid, and canvases as large as it and larger."""
    small, large = {1: ((3, 1, 1), (5, 1, 1)), 2: ((1, 2, 3), (1, 4, 3)), 3: ((2, 2, 1), (3, 2, 4))}[rank]
    place = torch.cartesian_prod(*(torch.arange(size) for size in small))
    rows = torch.randn(len(place), 3 * 2**rank, generator=torch.Generator().manual_seed(2))
    return rows, place, [CellShape(places, patch=2, rank=rank, channels=3) for places in (small, large)]


@pytest.mark.parametrize("conditioning", ["add", "adaln_atto"])
def test_a_unet_learns_alone_as_packed_and_with_media_absent(conditioning: str) -> None:
    run = tiny_run()
    keys = {"unet_width": 4, "time_conditioning": conditioning}
    host = plain_host(run.model_copy(update={"model": with_media(run.model, **keys)}), stirred=True)
    documents = [document("a", b"red ", image(1)), document("b", image(2, wide=True), b"wide"), document("c", image(3))]
    with torch.no_grad():
        alone = [float(host.model(packed([[one]], length=LENGTH))["image"].sum()) for one in documents]
        together = host.model(packed([documents[::-1]], length=2 * LENGTH))["image"].tolist()
    assert together == pytest.approx(alone[::-1], rel=1e-5)
    for some in (mixed_documents(), [document("t", b"only text")]):
        host.model.zero_grad(set_to_none=True)
        batch = with_noise(
            build_batch(some, model=host.config.model, sequence_latents=LENGTH), time=0.4, seed=0, index=0
        )
        total_loss(host.model(batch), counts=batch.counts(), weights=loss_weights(host.config)).backward()
        assert all(weight.grad is not None for weight in host.model.parameters())
        assert all(bool(weight.grad.any()) == (len(some) > 1) for weight in host.model.code["image"].parameters())


def test_a_clean_copy_and_a_noised_one_do_not_touch_on_their_canvases() -> None:
    """By gradient: latents of clean patches do not read the noise."""
    model = model_of("mlp", unet_width=4)
    batch = with_noise(
        build_batch([document("a", image(1), b"x")], model=model.model_config, sequence_latents=LENGTH),
        time=0.4,
        seed=0,
        index=0,
    )
    units = batch.media["image"]
    noise = units.noise_QF.clone().requires_grad_()
    rows, slots = model.preludi["image"](replace(units, noise_QF=noise))
    clean = torch.isin(slots, units.clean_slot_Q)
    (of_clean,) = torch.autograd.grad(rows[clean].sum(), noise, retain_graph=True, allow_unused=True)
    (of_noised,) = torch.autograd.grad(rows[~clean].sum(), noise)
    assert of_clean is None or not of_clean.any()
    assert of_noised.any()
