"""Shares of a microbatch: together they are the whole, the tables carry every row home, and nothing is done twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from matformer.config.schema import ModelConfig
from matformer.data.packing import Piece, Place, draw_training_noise, pack_batch
from matformer.hosts.base import Placed, Trunk
from matformer.hosts.plain import plain_trunk
from matformer.layers.attention import AttoView
from matformer.model import Matformer
from matformer.parallel.shares import deal, share_out
from matformer.parcels import Batch, Exchange
from tests.made import (
    LENGTH,
    MODEL,
    as_blt,
    as_diffused,
    audio,
    document,
    image,
    masked_batch,
    mixed_documents,
    one_a_row,
    stirred_value,
    text_only,
    with_images,
    with_media,
)

MODELS: dict[str, ModelConfig] = {
    "as it is": MODEL,
    "blt": as_blt(MODEL),
    "masked": as_diffused(MODEL, "masked_diffusion"),
    "token": with_media(MODEL, time_conditioning="token"),
    "u-net and attention": with_media(MODEL, unet_width=4, coda="dit"),
    "trees": with_media(MODEL, budget={"share": 0.5, "levels": 1, "noised_tree": "own"}),
    "next latent": with_media(MODEL, objective="next_latent", next_latent={"noises": 3}),
}


def batch_of(model: ModelConfig) -> Batch:
    """Eight documents of all kinds."""
    if model.diffuses_text:
        texts = [document(f"m.{i}", b"some text %d" % i, image(i), b"after") for i in range(4)]
        return masked_batch(texts, model=model, number=3)
    if any(media.objective == "next_latent" for media in model.media.values()):
        rows = [[Piece(one, Place(), Place(len(one.spans)))] for one in mixed_documents()]
        draws = [
            draw_training_noise(seed=0, step=1, lane=lane, blind_probability=0.3, time_shift=1.0)
            for lane in range(len(rows))
        ]
        return pack_batch(rows, draws, model=model, sequence_latents=LENGTH)
    return one_a_row(mixed_documents(), model=model)


def model_of(config: ModelConfig) -> Matformer:
    torch.manual_seed(0)
    model = Matformer(config, trunk=plain_trunk(config)).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(stirred_value(name, weight))
    return model


class Post(Trunk):
    """A trunk that keeps what was brought, and gives back the latents it was told: the group in one process."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Tensor | None = None
        self.slots: Tensor | None = None

    def bring(self, rows: Tensor, slots: Tensor, exchange: Exchange | None) -> Placed:
        self.rows, self.slots = rows, slots
        return rows[:0], slots[:0]

    def forward(self, hidden: Tensor | None, view: AttoView, exchange: Exchange | None = None) -> Tensor:
        raise NotImplementedError

    def receive(self, tensor: Tensor | None) -> None:
        raise NotImplementedError


def embedded_in_shares(model: Matformer, shares: Sequence[Batch]) -> Tensor:
    """What enters the Atto, put together from every rank's rows by the tables of all."""
    whole, post = model.atto, Post()
    model.atto = post
    chunks, sent = [], []
    for share in shares:
        assert share.exchange is not None
        chunks.append(model._embedded(share)[0])
        assert post.rows is not None and post.slots is not None
        sent.append(post.rows[post.slots.argsort()].split(list(share.exchange.entering_sent)))
    model.atto = whole
    for rank, share in enumerate(shares):
        assert share.exchange is not None
        arrived = torch.cat([rows[rank] for rows in sent])
        assert [len(rows[rank]) for rows in sent] == list(share.exchange.entering_received)
        chunks[rank] = chunks[rank].index_add(0, share.exchange.entering_slot_R, arrived)
    return torch.cat(chunks)


def inputs_of(model: Matformer, share: Batch) -> Tensor | None:
    """The Coda's inputs for text, if the Preludio makes them."""
    whole, model.atto = model.atto, Post()
    found = model._embedded(share)[1]
    model.atto = whole
    return found


def read_back(latent_LH: Tensor, shares: Sequence[Batch]) -> list[Tensor]:
    """The latents that each rank reads, zeros elsewhere."""
    tables = [share.exchange for share in shares]
    sent = [latent_LH[table.own][table.leaving_slot_R].split(list(table.leaving_sent)) for table in tables if table]
    found = []
    for rank, table in enumerate(tables):
        assert table is not None
        assert [len(rows[rank]) for rows in sent] == list(table.leaving_received)
        arrived = torch.cat([rows[rank] for rows in sent])
        found.append(torch.zeros_like(latent_LH).index_copy(0, table.read_slot_R, arrived))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", list(MODELS))
def test_shares_together_enter_and_sum_as_the_whole(name: str, ranks: int) -> None:
    config = MODELS[name]
    batch, model = batch_of(config), model_of(config)
    shares = [share_out(batch, model=config, rank=rank, ranks=ranks) for rank in range(ranks)]
    with torch.no_grad():
        whole, inputs = model._embedded(batch)
        assert (embedded_in_shares(model, shares) - whole).abs().max() < 1e-9
        latent_LH = model.atto(whole, model.view(batch))
        expected = model.sums(latent_LH, batch, inputs)
        found = [
            model.sums(latents, share, inputs_of(model, share))
            for latents, share in zip(read_back(latent_LH, shares), shares, strict=True)
        ]
    for part, value in expected.items():
        torch.testing.assert_close(torch.stack([sums[part] for sums in found]).sum(0), value, rtol=1e-9, atol=1e-9)
    assert sum(share.text.symbol_U.numel() for share in shares) == batch.text.symbol_U.numel()
    assert len(config.media) and all(expected[name].any() for name in ("text", "image", "router"))


@pytest.mark.parametrize("make", [text_only, with_images])
def test_a_rank_without_units_takes_part(make: Callable[[int], Batch]) -> None:
    batch, model = make(1), model_of(MODEL)
    shares = [share_out(batch, model=MODEL, rank=rank, ranks=4) for rank in range(4)]
    assert min(share.text.symbol_U.numel() for share in shares) == 0
    with torch.no_grad():
        assert (embedded_in_shares(model, shares) - model._embedded(batch)[0]).abs().max() < 1e-9


def flops_of_small_parts(model: Matformer, batch: Batch, latent_LH: Tensor) -> int:
    """Of Preludi, Code and router, forward."""
    whole, model.atto = model.atto, Post()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        inputs = model._embedded(batch)[1]
        model.sums(latent_LH, batch, inputs)
    model.atto = whole
    return counted.get_total_flops()


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_computes_its_part_and_no_more(ranks: int) -> None:
    documents = [
        document(f"{i}", b"word " * (3 + i % 5), image(i, wide=bool(i % 2)), b"and", audio(i)) for i in range(16)
    ]
    batch, model = one_a_row(documents, length=96), model_of(MODEL)
    latent_LH = torch.zeros(batch.grid.kind_BS.numel(), MODEL.atto.width, dtype=torch.float64)
    whole = flops_of_small_parts(model, batch, latent_LH)
    shares = [share_out(batch, model=MODEL, rank=rank, ranks=ranks) for rank in range(ranks)]
    found = [flops_of_small_parts(model, share, latent_LH) for share in shares]
    assert 0.95 * whole < sum(found) < 1.01 * whole, "once in all (a tile of attention is filled less often)"
    assert max(found) <= 1.1 * whole / ranks, "balanced"


def test_dealing_gives_the_dearest_first_to_who_has_least() -> None:
    dealt = deal({"a": [5.0, 1.0, 1.0], "b": [3.0]}, ranks=2)
    assert {name: owner.tolist() for name, owner in dealt.items()} == {"a": [0, 1, 1], "b": [1]}
    assert deal({"a": []}, ranks=3)["a"].numel() == 0
