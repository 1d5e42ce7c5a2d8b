"""What may flow where: leaks are exactly zero, absent modalities give zeros, and the first loss is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from matformer.atto import masks, trunk
from matformer.atto.masks import Positions
from matformer.engine.step import loss_weights, metrics_row, optimizer_step
from matformer.hosts.plain import PlainHost
from matformer.layers.flow import noised_rows
from matformer.losses.text import symbol_nats
from matformer.losses.total import total_loss
from matformer.model import Matformer
from matformer.parcels import Batch, Kind
from tests.made import (
    MODEL,
    audio,
    document,
    image,
    mixed_documents,
    one_a_row,
    packed,
    plain_host,
    text_only,
    tiny_run,
    with_audio,
    with_both,
    with_images,
)


@pytest.fixture
def model() -> Matformer:
    """The stirred tiny model in float64."""
    found = plain_host(tiny_run()).model
    assert isinstance(found, Matformer)
    return found.double()


def embedded(model: Matformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """The Atto's input `[L, H]`, a leaf that collects a gradient by position, and its output `[B, S, H]`."""
    hidden_LH = model.embed(batch).detach().flatten(0, 1).requires_grad_()
    view = trunk.atto_view(batch.grid, MODEL.atto)
    return hidden_LH, model.atto(hidden_LH, view).view(*batch.grid.kind_BS.shape, -1)


def text_nats(model: Matformer, latents_BSH: Tensor, batch: Batch) -> Tensor:
    """Nats of each symbol."""
    return symbol_nats(model.code["text"](latents_BSH.flatten(0, 1), batch.text), batch.text.symbol_U)


def assert_no_flow(hidden_LH: Tensor, losses: Tensor, *, from_L: Tensor) -> None:
    """The gradient of the losses at these positions is exactly 0, and not everywhere."""
    (gradient_LH,) = torch.autograd.grad(losses.sum(), hidden_LH, retain_graph=True)
    assert gradient_LH.any()
    assert not gradient_LH[from_L].any()


def kinds(batch: Batch) -> Tensor:
    """Kind of every flat position."""
    return batch.grid.kind_BS.flatten()


def assert_noised_do_not_leak(model: Matformer) -> None:
    """Nothing but the noised spans' own losses depends on noised rows."""
    batch = one_a_row([document("a", b"red square ", image(1), b" on grass", audio(2), b"end", image(3))], length=64)
    hidden, latents = embedded(model, batch)
    noised = kinds(batch) == Kind.NOISED
    assert noised.any()
    assert_no_flow(hidden, text_nats(model, latents, batch), from_L=noised)
    assert_no_flow(hidden, latents.flatten(0, 1)[~noised].square(), from_L=noised)


def assert_documents_do_not_leak(model: Matformer) -> None:
    """One document's losses do not depend on another's positions, whichever stands first."""
    first, second = mixed_documents()[0], mixed_documents()[4]
    batch = packed([[first, second]], length=70)
    hidden, latents = embedded(model, batch)
    number = batch.grid.document_BS.flatten()
    for mine in (0, 1):
        assert_no_flow(hidden, latents.flatten(0, 1)[number == mine].square(), from_L=number != mine)


def assert_the_future_does_not_leak(model: Matformer) -> None:
    """Output at a causal position does not depend on later input."""
    batch = one_a_row([document("a", b"some words, then ", image(1, role="given"), b" and more")])
    hidden, latents = embedded(model, batch)
    places = torch.arange(len(hidden))
    causal = (batch.grid.span_BS.flatten() < 0) & (kinds(batch) != Kind.PAD)
    for place in causal.nonzero().flatten().tolist():
        assert_no_flow(hidden, latents.flatten(0, 1)[place].square(), from_L=places > place)


CLAIMS: list[Callable[[Matformer], None]] = [
    assert_noised_do_not_leak,
    assert_documents_do_not_leak,
    assert_the_future_does_not_leak,
]


@pytest.mark.parametrize("claim", CLAIMS)
def test_nothing_leaks_through_the_atto(claim: Callable[[Matformer], None], model: Matformer) -> None:
    claim(model)


def no_noised_rule(query: Positions, key: Positions) -> Tensor:
    return masks.same_document(query, key) & (masks.causal(query, key) | masks.same_span(query, key))


def no_document_rule(query: Positions, key: Positions) -> Tensor:
    together = masks.same_span(query, key)
    return (masks.causal(query, key) | together) & (~masks.noised(key) | together)


def no_order(query: Positions, key: Positions) -> Tensor:
    return masks.same_document(query, key) & (~masks.noised(key) | masks.same_span(query, key))


@pytest.mark.parametrize(
    ("claim", "planted"), list(zip(CLAIMS, [no_noised_rule, no_document_rule, no_order], strict=True))
)
def test_a_planted_leak_is_seen(
    claim: Callable[[Matformer], None],
    planted: masks.Rule,
    model: Matformer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trunk, "sees", planted)
    with pytest.raises(AssertionError):
        claim(model)


def test_noise_and_values_of_a_generated_last_span_reach_its_own_loss_alone(model: Matformer) -> None:
    batch = one_a_row([document("a", b"a red square ", image(1)), document("b", b"text")])
    units = batch.media["image"]
    moved = replace(units, value_NF=units.value_NF + 1, noise_QF=units.noise_QF * 3 - 1)
    with torch.no_grad():
        before, after = model(batch), model(replace(batch, media={**batch.media, "image": moved}))
    assert before["image"][0] != after["image"][0]
    for part in ("text", "audio", "router"):
        assert torch.equal(before[part], after[part]), part
    assert torch.equal(before["image"][1:], after["image"][1:])


def test_text_after_a_generated_span_reads_its_clean_values_and_not_its_noise(model: Matformer) -> None:
    batch = one_a_row([document("a", b"red ", image(1), b" then text")])
    units = batch.media["image"]
    value, noise = units.value_NF.double().requires_grad_(), units.noise_QF.double().requires_grad_()
    media = {**batch.media, "image": replace(units, value_NF=value, noise_QF=noise)}
    sums = model(replace(batch, media=media))
    by_value, by_noise = torch.autograd.grad(sums["text"].sum(), (value, noise), retain_graph=True, allow_unused=True)
    assert by_value is not None and by_value.any()
    assert by_noise is None or not by_noise.any()
    (flow,) = torch.autograd.grad(sums["image"].sum(), noise)
    assert flow.any()


def test_a_later_byte_does_not_change_an_earlier_prediction(model: Matformer) -> None:
    text = b"the quick brown fox jumps over"
    batch = one_a_row([document("a", text)])
    for place in (0, 4, 5, 17, len(text) - 1):
        changed = one_a_row([document("a", text[:place] + b"#" + text[place + 1 :])])
        with torch.no_grad():
            logits, other = (model.code["text"](model.latents(x).flatten(0, 1), x.text) for x in (batch, changed))
        assert torch.equal(logits[: place + 1], other[: place + 1])
        assert not torch.equal(logits[place + 1 :], other[place + 1 :])


def test_a_patch_is_decoded_from_the_latent_just_before_it_and_nothing_newer(model: Matformer) -> None:
    batch = one_a_row([document("a", b"the quick brown fox")])
    latent_LH = model.latents(batch).detach().flatten(0, 1).requires_grad_()
    nats = symbol_nats(model.code["text"](latent_LH, batch.text), batch.text.symbol_U)
    for symbol in (0, 2, 3, 10, 19):
        (gradient_LH,) = torch.autograd.grad(nats[symbol], latent_LH, retain_graph=True)
        slot = int(batch.text.slot_P[batch.text.patch_U[symbol]]) - 1
        assert gradient_LH[slot].any()
        assert not gradient_LH[slot + 1 :].any()


def test_x_t_and_velocity_lie_on_the_straight_path() -> None:
    units = one_a_row([document("a", b"c", image(1))], time=0.25).media["image"]
    x_t, time = noised_rows(units)
    torch.testing.assert_close(x_t, 0.75 * units.value_NF + 0.25 * units.noise_QF)
    assert time.tolist() == [0.25] * 4


def test_the_first_text_loss_is_the_log_of_the_alphabet() -> None:
    host = plain_host(tiny_run(), stirred=False)
    numbers = optimizer_step(host, [text_only(1), with_both(2)], config=tiny_run(), step=0)
    row = metrics_row(numbers, tiny_run())
    assert row["text/nats_per_symbol"] == pytest.approx(math.log(257), rel=0.02)
    # the velocity's last layer is 0: the error is that of predicting nothing, E (eps - x)^2 = 2
    assert row["image/flow_loss"] == pytest.approx(2.0, rel=0.25)


@pytest.mark.parametrize(
    ("absent", "batch"),
    [
        (("image", "audio"), text_only(1)),
        (("audio",), with_images(2)),
        (("image",), with_audio(3)),
        (("text", "audio"), one_a_row([document("m", image(4, role="given"))])),
    ],
)
def test_an_absent_modality_has_gradients_of_zero_and_not_none(absent: tuple[str, ...], batch: Batch) -> None:
    host = plain_host(tiny_run())
    counts, weights = batch.counts(), loss_weights(host.config)
    total_loss(host.model(batch), counts=counts, weights=weights).backward()
    prefixes = tuple(f"{act}.{name}." for act in ("preludi", "code") for name in absent)
    for name, weight in host.model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert not (name.startswith(prefixes) and weight.grad.any()), name
    assert all(counts[name] == 0 for name in absent)


def test_an_absent_modality_has_no_metric_and_the_others_are_as_without_it() -> None:
    config = tiny_run()
    row = metrics_row(optimizer_step(plain_host(config), [with_images(2)], config=config, step=0), config)
    assert "audio/flow_loss" not in row and "image/flow_loss" in row


def test_microbatches_add_up_to_the_batch() -> None:
    """Sums over global counts: one batch of eight rows is eight batches of one, however uneven."""
    documents = mixed_documents()

    def gradients(batches: list[Batch]) -> dict[str, Tensor]:
        host: PlainHost = plain_host(tiny_run())
        optimizer_step(host, batches, config=host.config, step=0)
        return host.state().moments["exp_avg"]

    whole = gradients([one_a_row(documents)])
    parts = gradients([one_a_row([one]) for one in documents])
    for name, gradient in whole.items():
        assert (gradient - parts[name]).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_a_step_repeats_bit_for_bit() -> None:
    def weights() -> dict[str, Tensor]:
        host = plain_host(tiny_run())
        for step in range(2):
            optimizer_step(host, [with_both(step), with_audio(step)], config=host.config, step=step)
        return host.state().weights

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)
