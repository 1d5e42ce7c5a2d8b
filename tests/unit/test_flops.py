"""FLOPs, parameters and counts of the plan against torch's own counter, the real modules and the real masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from matformer.atto.masks import sees, sees_noised_context, visible
from matformer.config.schema import ModelConfig
from matformer.data.counts import counts_of
from matformer.data.sources import media_span
from matformer.hosts.plain import plain_trunk
from matformer.layers.local_attention import Folded, window_of
from matformer.model import Matformer
from matformer.parallel.counts import Run, document_pairs, window_pairs
from matformer.parallel.flops import Flops, added, batch_flops, flops_by_part
from matformer.parallel.parameters import parameters_by_part
from matformer.parcels import Batch, Kind
from tests.made import MODEL, as_blt, as_diffused, as_tokens, audio, document, image, packed, text_only, with_media

LENGTH = 160  # more than two tiles: torch's counter does not know its fused attention on CPU, and knows tiles

MODELS = {
    "plain": MODEL,
    "blt": as_blt(MODEL),
    "tokens": as_tokens(MODEL, 290),
    "masked text": as_diffused(MODEL, "masked_diffusion"),
    "blocks of text": as_diffused(MODEL, "block_diffusion"),
    "dit": with_media(MODEL, coda="dit", coda_window=5),
    "linear coda": with_media(MODEL, coda="linear", time_conditioning="none"),
    "time as a position": with_media(MODEL, time_conditioning="token"),
    "adaln preludio coda": with_media(MODEL, time_conditioning="adaln_preludio_coda", coda="dit"),
    "adaln atto": with_media(MODEL, time_conditioning="adaln_atto"),
    "unet": with_media(MODEL, unet_width=4),
    "next latent": with_media(MODEL, objective="next_latent"),
    "trees": with_media(MODEL, budget={"share": 0.5, "levels": 1, "noised_tree": "own"}),
    "noised context": with_media(MODEL, media_context="noised"),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return MODELS[request.param]


def batch_of(model: ModelConfig) -> Batch:
    """Two rows of two documents: text, both media, generated and given; padding at the end."""
    picture, sound, wide, long = (
        media_span(one.latent, one.modality, media=model.media[one.modality], role=one.role)  # in the model's own trees
        for one in (image(1), audio(2, role="given"), image(3, wide=True), audio(4, long=True))
    )
    first = [document("a", b"a red square ", picture, b" on grass"), document("b", sound, b"hello")]
    second = [document("c", b"\x00\xff" * 30), document("d", wide, long, b"!")]
    batch = packed([first, second], length=LENGTH, model=model)
    if model.text.vocabulary is None:
        return batch
    text = replace(batch.text, token_P=torch.zeros_like(batch.text.slot_P))
    return replace(batch, text=text, read=text)


def counted(run: Callable[[], list[Tensor]]) -> Flops:
    """Forward and backward, by torch's counter."""
    with FlopCounterMode(display=False) as forward:
        found = [x for x in run() if x.requires_grad]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward([x[torch.isfinite(x)].sum() for x in found])
    return Flops(forward.get_total_flops(), backward.get_total_flops())


def counted_parts(model: Matformer, batch: Batch) -> dict[str, Flops]:
    """Each part alone, on inputs that take a gradient where they are not data."""
    size = batch.grid.kind_BS.numel()
    latent_LH = torch.randn(size, model.model_config.atto.width, requires_grad=True)
    hidden = torch.randn(size, model.model_config.atto.width, requires_grad=True)
    input_UD = torch.randn(batch.text.symbol_U.numel(), model.model_config.text.width, requires_grad=True)
    handed = (input_UD,) if model.model_config.text.coda_input == "preludio" else ()

    def routed() -> list[Tensor]:
        kind, buckets = model.router(latent_LH, batch.route)
        trees = [model.router.tree_head[name](latent_LH, units) for name, units in batch.trees.items()]
        return [kind, *buckets.values(), *trees]

    found = {
        "start": counted(lambda: [model.start(batch.grid.kind_BS.flatten())]),
        "preludio/text": counted(lambda: [model.preludi["text"](batch.read)[0]]),
        "atto": counted(lambda: [model.atto(hidden, model.view(batch))]),
        "router": counted(routed),
        "coda/text": counted(lambda: [model.code["text"](latent_LH, batch.text, *handed)]),
    }
    for name, units in batch.media.items():
        found[f"preludio/{name}"] = counted(lambda name=name, units=units: [model.preludi[name](units)[0]])
        found[f"coda/{name}"] = counted(lambda name=name, units=units: [model.code[name](latent_LH, units)])
    return found


def test_each_part_and_the_whole_cost_what_torch_counts(model: ModelConfig) -> None:
    batch, real = batch_of(model), Matformer(model, trunk=plain_trunk(model))
    by_part = flops_by_part(model, counts_of(batch, model), attended="computed")
    assert by_part == counted_parts(real, batch)
    assert added(by_part) == counted(lambda: [x for x in real(batch).values() if x.requires_grad])


def test_parameters_are_those_of_the_modules(model: ModelConfig) -> None:
    with torch.device("meta"):
        real = Matformer(model, trunk=plain_trunk(model))
    rooms = {"start": real.start, "atto": real.atto, "router": real.router}
    rooms |= {f"preludio/{name}": one for name, one in real.preludi.items()}
    rooms |= {f"coda/{name}": one for name, one in real.code.items()}
    assert parameters_by_part(model) == {name: sum(p.numel() for p in one.parameters()) for name, one in rooms.items()}


def test_pairs_are_those_of_the_mask(model: ModelConfig) -> None:
    batch = batch_of(model)
    kinds = (Kind.HEADER, Kind.CLEAN if model.media["image"].causal else Kind.NOISED)
    medium = batch.grid.modality_BS > 0
    first = medium & (batch.grid.media_BS == batch.grid.media_BS[medium][0])
    blind = replace(batch.grid, blind_BS=first & torch.isin(batch.grid.kind_BS, torch.tensor(kinds)))
    assert blind.blind_BS.sum() > 4
    rule = sees_noised_context if model.media_context == "noised" else sees
    for grid in (batch.grid, blind):
        assert counts_of(replace(batch, grid=grid), model).atto.seen == int(visible(grid, rule).sum())


def test_attention_of_the_mask_costs_less_than_what_is_multiplied() -> None:
    counts = counts_of(batch_of(MODEL), MODEL)
    assert counts.atto.seen < counts.atto.computed < 2 * LENGTH * LENGTH
    saved = 12 * MODEL.atto.layers * MODEL.atto.width * (counts.atto.computed - counts.atto.seen)
    text = MODEL.text
    for one, layers in ((counts.read.pairs, text.preludio_layers), (counts.text.pairs, text.coda_layers)):
        saved += 12 * layers * text.width * (one.computed - one.seen)
    assert batch_flops(MODEL, counts, attended="computed") - batch_flops(MODEL, counts) == saved


def test_pairs_of_a_document_are_those_of_the_pictures_mask() -> None:
    """The sequence drawn in atto/masks.py: s a b h, n n, c c, e d."""
    runs: list[Run] = [("causal", 4), ("noised", 2), ("clean", 2), ("causal", 2)]
    assert document_pairs(runs) == 10 + 2 * 6 + 2 * 6 + 7 + 8
    assert document_pairs([("causal", 4), ("noised", 2), ("causal", 1)], noised_context=True) == 10 + 12 + 7
    assert document_pairs([("causal", 2), ("blind", 3), ("clean", 2), ("causal", 1)]) == 3 + 2 + 2 * 4 + 2 * 4 + 5


def test_pairs_of_windows_are_those_that_chunks_show() -> None:
    for sizes, window in (((7, 1, 12), 5), ((200,), 100), ((3,), 5)):
        piece = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        for both_ways in (False, True):
            folded = window_of(piece, window=window, both_ways=both_ways, tiled=False)
            assert isinstance(folded, Folded)
            seen = int(folded.visible_CWT.flatten(0, 1)[: len(piece)].sum())
            assert window_pairs(sizes, window=window, both_ways=both_ways) == seen


def test_trees_have_leaves_and_blocks_that_are_asked() -> None:
    model = MODELS["trees"]
    for one in counts_of(batch_of(model), model).media.values():
        assert sum(one.leaves) > 0 and one.trees > 0 and one.blocks >= one.trees


def test_a_batch_of_text_alone_costs_nothing_in_media() -> None:
    batch = text_only(1)
    by_part = flops_by_part(MODEL, counts_of(batch, MODEL))
    assert by_part["coda/image"] == Flops() and by_part["coda/text"].total > 0 and by_part["atto"].total > 0
