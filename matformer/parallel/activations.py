"""Bytes that autograd keeps of one microbatch's forward, part by part, on one rank.

Each line below counts numbers a row (a position, a symbol, a patch) that some operation saves for its way back; the
comments name them. Found by listing the saved tensors of the real modules; `tests/ranks/test_memory.py` holds the sums
to what ranks allocate. Left out: indices, vectors of statistics, anything below a hundredth.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from matformer.config.schema import AttoConfig, MediaConfig, ModelConfig, Recompute, TextConfig
from matformer.config.time_conditioning import modulated_media
from matformer.parallel.counts import Counts, MediaCounts, TextCounts
from matformer.shapes import NUM_TARGETS

Core = Literal["tiles", "fused"]
"""How attention runs. tiles: layers/tiles.py, which keeps the weights of every tile; fused: nothing of that size."""

FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds. size: bytes of a number in the model's dtype."""

    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    size: int = FLOAT32
    core: Core = "fused"
    recompute: Recompute = "none"

    @property
    def positions(self) -> int:
        """Ranks that share out the positions outside attention and feed-forward."""
        return self.cp * (self.tp if self.sequence_parallel else 1)

    @property
    def ranks(self) -> int:
        """Ranks that share out heads, the feed-forward and the units of small encoders."""
        return self.tp * self.cp


@dataclass(frozen=True, slots=True)
class _Layer:
    """Bytes of one layer's forward. stream: what enters it; ends: that once more, norms, modulations.

    asked: queries, keys and values as the core of attention is handed them, with what they were made of; core: what it
    makes of them; answer: its own; inner: of the feed-forward.
    """

    stream: float
    ends: float
    made: float
    asked: float
    core: float
    answer: float
    inner: float


def _layer(model: ModelConfig, counts: Counts, share: Share) -> _Layer:
    """One layer of the Atto as megatron runs it.

    Under context parallelism the core of attention has all positions of fewer heads (AttoCore in the host).
    """
    atto, rows = model.atto, share.size * counts.positions
    width, head = atto.width, atto.width // atto.heads
    keys, attended = atto.kv_heads * head, key_heads(atto, tp=share.tp, cp=share.cp) * head
    repeats = attended < width and share.core == "tiles"  # the fused ones take fewer key heads than queries'
    ends = 3 * width  # the residual stream in the middle, both norms' answers
    if modulated_media(model):
        ends += 8 * width  # of each branch: normed, 1 + scale, 1 + gate, what the gate closes
    if atto.qk_norm:
        made, asked = 2 * width + 2 * keys, width + keys  # all of qkv, queries copied out of it; both normed
    elif repeats or share.cp > 1:
        made, asked = 0, 2 * width + 2 * keys
    else:
        made, asked = width + 2 * keys, 0  # values are cut out of it
    core = width + (2 * width if repeats else attended)  # turned queries and keys, repeated values
    if share.cp > 1:
        core += 0 if repeats else exchanged(atto, tp=share.tp, cp=share.cp)  # values are cut out of what came
        core += width * (share.core == "fused")  # its answer, of which what is sent back is another copy
    tables = rows * 2 * head + _attention(atto.heads / share.ranks, counts.atto.computed, counts.positions, share)
    return _Layer(
        stream=rows * width / share.positions,
        ends=rows * ends / share.positions,
        made=rows * made / share.ranks,
        asked=rows * asked / share.ranks,
        core=rows * core / share.ranks + tables,
        answer=rows * width / share.ranks,
        inner=rows * 5 * atto.ffn_width / share.ranks,  # gate and up, silu, up + 0, product
    )


def key_heads(atto: AttoConfig, *, tp: int, cp: int) -> int:
    """Key/value heads of a layer that are attended with, over all ranks: at least one on each that exchanges heads."""
    return max(atto.kv_heads, tp * cp) if cp > 1 else atto.kv_heads


def exchanged(atto: AttoConfig, *, tp: int, cp: int) -> int:
    """Numbers of a position that context ranks hand to each other, over all ranks: queries, keys, values."""
    head = atto.width // atto.heads
    return atto.width + 2 * key_heads(atto, tp=tp, cp=cp) * head


def atto_layer(model: ModelConfig, counts: Counts, share: Share) -> float:
    """What one layer keeps until its way back."""
    one = _layer(model, counts, share)
    if share.recompute == "full":
        return one.stream
    kept = one.stream + one.ends + one.made + one.answer
    return kept + (one.asked if share.recompute == "selective" else one.core + one.inner)


def made_again(model: ModelConfig, counts: Counts, share: Share) -> float:
    """What the way back of one layer computes again, as much of it as is there at once."""
    one = _layer(model, counts, share)
    if share.recompute == "selective":
        return max(one.core, one.inner)
    return one.ends + one.made + one.core + one.answer + one.inner if share.recompute == "full" else 0.0


def _attention(heads: float, pairs: int, rows: int, share: Share) -> float:
    """Weights of tiles, or one sum a head and row."""
    return FLOAT32 * heads * (pairs if share.core == "tiles" else rows)


def view(atto: AttoConfig, counts: Counts, share: Share) -> float:
    """Mask, biases of its tiles and rotary tables (float64) that a microbatch keeps beside its layers."""
    tables = 8 * counts.positions * (atto.width // atto.heads)
    if share.core == "fused":
        return tables
    return tables + counts.atto.computed * FLOAT32 + counts.positions * counts.positions


def _local_block(text: TextConfig, counts: TextCounts, share: Share) -> float:
    # stream twice, norms twice, answer, turned queries and keys, qkv; gate, up, silu, product; tables
    numbers = counts.symbols * (10 * text.width + 4 * text.ffn_width + text.width // text.heads)
    return share.size * numbers + _attention(text.heads, counts.pairs.computed, counts.symbols, share)


def text_preludio(model: ModelConfig, counts: TextCounts, share: Share) -> float:
    """Bytes to latents."""
    text, width = model.text, model.text.width
    if text.vocabulary is not None:
        return 0.0
    # of a symbol: norm's rows and answer, keys and values, its patch's questions and their products, weights
    symbol = 4 * width + 2 * model.atto.width + text.heads * model.atto.width // width
    patch = 2 * model.atto.width + 2 * width  # sums, their quotient, the mean and its norm
    numbers = counts.pooled * symbol + counts.patches * patch
    return share.size * numbers + text.preludio_layers * _local_block(text, counts, share)


def text_coda(model: ModelConfig, counts: TextCounts, share: Share) -> float:
    """Latents to the loss of symbols, or of pieces."""
    text, atto = model.text, model.atto
    if text.vocabulary is not None:
        return counts.patches * (share.size * atto.width + FLOAT32 * (text.vocabulary + 1))
    # a reader's rows, norm, query and sum, keys and values of its latent for each symbol, weights
    reader = 4 * text.width + 2 * atto.width + text.heads * atto.width // text.width
    ends = 2 * text.width  # the last norm's rows and answer
    latents = (2 + text.coda_projection) * atto.width  # rows of the norm of slots and its answer
    numbers = counts.symbols * (text.coda_layers * reader + ends) + counts.patches * latents
    return (
        share.size * numbers
        + text.coda_layers * _local_block(text, counts, share)
        + logits(model, counts)  # of the log-softmax
    )


def logits(model: ModelConfig, counts: TextCounts) -> float:
    """Bytes of one float32 copy of the text's logits."""
    if model.text.vocabulary is not None:
        return FLOAT32 * counts.patches * (model.text.vocabulary + 1)
    return FLOAT32 * counts.symbols * NUM_TARGETS * (1 + model.text.predicts_end)


def media_preludio(media: MediaConfig, atto: AttoConfig, *, counts: MediaCounts, share: Share) -> float:
    """Patches to latents."""
    rows = counts.clean + (0 if media.causal else counts.noised)
    film = 2 * atto.width if media.time_conditioning == "adaln_preludio_coda" and not media.causal else 0
    return share.size * rows * (media.patch_scalars + film) + _cells(media, 2 * counts.spans, share)


def media_coda(media: MediaConfig, atto: AttoConfig, *, counts: MediaCounts, share: Share) -> float:
    """Latents and noised patches to squared errors."""
    width, layers = media.coda_width, 0 if media.coda == "linear" else media.coda_layers
    numbers = atto.width + 2 * width + 4 * media.patch_scalars  # latent; last norm; input, gain, patch, error
    numbers += layers * 10 * width  # stream, norm; gate, up, silu, product of twice the width
    if media.coda == "dit":
        numbers += layers * (8 * width + width // media.coda_heads)
    if media.time_conditioning == "adaln_preludio_coda":
        numbers += (1 + (media.coda == "dit")) * layers * 4 * width
    weights = layers * _attention(media.coda_heads, counts.pairs.computed, counts.noised, share)
    return (
        share.size * counts.noised * numbers
        + _cells(media, counts.spans, share)
        + (weights if media.coda == "dit" else 0.0)
    )


def _cells(media: MediaConfig, canvases: int, share: Share) -> float:
    """Convolutions: what enters, the stream, its norm, two inner rows and the answers, over whole canvases."""
    if not media.unet_width:
        return 0.0
    cells = prod(media.places) * media.patch**media.rank
    return share.size * canvases * cells * (media.channels + 6 * media.unet_width)


def kept_by_part(model: ModelConfig, counts: Counts, share: Share) -> dict[str, float]:
    """Bytes of every part but the Atto, by the names of `parts`."""
    found = {
        "preludio/text": text_preludio(model, counts.read, share),
        "coda/text": text_coda(model, counts.text, share),
        "router": share.size * counts.questions * model.atto.width,
    }
    for name, media in model.media.items():
        one = counts.media.get(name, MediaCounts())
        found[f"preludio/{name}"] = media_preludio(media, model.atto, counts=one, share=share)
        found[f"coda/{name}"] = media_coda(media, model.atto, counts=one, share=share)
    return found
