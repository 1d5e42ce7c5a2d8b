"""What every part of the model is made of: its maps with the rows that use them, its tables and its vectors.

From these lists follow parameters (`parameters.py`), FLOPs (`flops.py`) and what a rank stores of them (`memory.py`).
Arithmetic on the config alone: nothing is built, torch is not imported. The tests hold each list to the real modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from matformer.config.check import MAX_PATCH
from matformer.config.schema import MediaConfig, ModelConfig, Recompute, TextConfig
from matformer.config.time_conditioning import ENTRANCES, modulated_media
from matformer.parallel.counts import Counts, MediaCounts, Pairs, TextCounts
from matformer.shapes import ATTO_PARTS, NUM_SYMBOLS, NUM_TARGETS, REACH, TIME_WAVES, TREE_WIDTH


@dataclass(frozen=True, slots=True)
class Map:
    """inner x outer weights that `rows` rows pass through. of_data: the rows are data, and take no gradient.

    sharded: the matrix is cut over TP.
    """

    inner: int
    outer: int
    rows: int
    bias: bool = False
    of_data: bool = False
    sharded: bool = False

    @property
    def parameters(self) -> int:
        return self.inner * self.outer + self.outer * self.bias


@dataclass(frozen=True, slots=True)
class Table:
    """Weights that no product of matrices uses: embeddings, norms."""

    parameters: int
    sharded: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention of `width` numbers a query and a key (all heads together). No weights."""

    width: int
    pairs: Pairs
    sharded: bool = False

    @property
    def parameters(self) -> int:
        return 0


Piece = Map | Table | Attention


def parts(model: ModelConfig, counts: Counts | None = None) -> dict[str, list[Piece]]:
    """Every part by name: `start`, `preludio/NAME`, `atto` (all layers), `router`, `coda/NAME`.

    Without counts no rows pass: parameters alone.
    """
    counts = counts or Counts()
    found: dict[str, list[Piece]] = {"start": [Table(model.atto.width)]}
    found["preludio/text"] = list(text_preludio(model, counts.read))
    for name, media in model.media.items():
        found[f"preludio/{name}"] = list(media_preludio(media, model.atto.width, counts=_media(counts, name)))
    found["atto"] = [*list(atto_layer(model, counts)) * model.atto.layers, Table(model.atto.width)]
    found["router"] = list(router(model, counts))
    found["coda/text"] = list(text_coda(model, counts.text))
    for name, media in model.media.items():
        found[f"coda/{name}"] = list(media_coda(media, model.atto.width, counts=_media(counts, name)))
    return found


def _media(counts: Counts, name: str) -> MediaCounts:
    return counts.media.get(name, MediaCounts())


def atto_layer(model: ModelConfig, counts: Counts) -> Iterator[Piece]:
    """One layer: grouped-query attention, SwiGLU, and AdaLN where the model has it."""
    atto, rows = model.atto, counts.positions
    width, head = atto.width, atto.width // atto.heads
    for outer in (width, atto.kv_heads * head, atto.kv_heads * head):
        yield Map(width, outer, rows, sharded=True)
    yield Map(width, width, rows, sharded=True)
    yield from recomputed(model, counts, "selective")
    yield from [Table(width)] * 2 + [Table(head)] * (2 * atto.qk_norm)
    modulated = modulated_media(model)
    if modulated:
        times = 1 + sum(_media(counts, name).times for name in modulated)
        yield from _modulation(width, parts=ATTO_PARTS, rows=times if counts.positions else 0)


def recomputed(model: ModelConfig, counts: Counts, recompute: Recompute) -> Iterator[Piece]:
    """What of a layer's forward its way back runs again: selective, attention without its maps, and feed-forward."""
    if recompute == "full":
        yield from atto_layer(model, counts)
    elif recompute == "selective":
        yield Attention(model.atto.width, counts.atto, sharded=True)
        yield from _swiglu(model.atto.width, model.atto.ffn_width, counts.positions, sharded=True)


def router(model: ModelConfig, counts: Counts) -> Iterator[Piece]:
    """Kinds, the buckets of each modality, and the trees of those whose noised copies stand in trees."""
    for outer in (len(model.media) + 3, *(len(media.buckets) for media in model.media.values())):
        yield Map(model.atto.width, outer, counts.questions, bias=True)
    for name, media in model.media.items():
        if media.budget is not None and media.noises_trees:
            one = _media(counts, name)
            yield Map(model.atto.width, TREE_WIDTH, one.trees, bias=True)
            yield Table((sum(media.places) + media.budget.levels) * TREE_WIDTH)
            yield Map(TREE_WIDTH, 1, one.blocks, bias=True)


def text_preludio(model: ModelConfig, counts: TextCounts) -> Iterator[Piece]:
    """Bytes to latents, or one table of pieces."""
    text, atto = model.text, model.atto
    if text.vocabulary is not None:
        yield Table((text.vocabulary + 1) * atto.width)
        return
    slots, width, patches = atto.width // text.width, text.width, counts.patches
    yield Table(NUM_SYMBOLS * width + _ngrams(text, len(text.preludio_ngrams)))
    yield Table(MAX_PATCH * width * text.preludio_places + 2 * atto.width * model.diffuses_text)
    for _ in range(text.preludio_layers):
        yield from _local_block(text, counts)
    yield Map(width, 2 * width, counts.pooled)
    yield Map(width, width, patches * slots)
    if text.preludio_pool == "mean":
        yield Map(width, slots * width, patches)
    else:
        yield Map(width, slots * width, patches)
        yield Map(width, width, patches * slots)
    yield Table(2 * width)


def text_coda(model: ModelConfig, counts: TextCounts) -> Iterator[Piece]:
    """Latents to logits of symbols, or of pieces."""
    text, atto = model.text, model.atto
    if text.vocabulary is not None:
        yield Map(atto.width, text.vocabulary + 1, counts.patches)
        return
    width, slots = text.width, atto.width // text.width
    if text.coda_input == "embedding":
        yield Table(NUM_SYMBOLS * width + _ngrams(text, len(text.coda_ngrams)))
    if text.coda_projection:
        yield Map(atto.width, atto.width, counts.patches)
    for _ in range(text.coda_layers):
        yield from (Map(width, width, counts.symbols), Map(width, 2 * width, counts.patches * slots))
        yield from (Map(width, width, counts.symbols), Table(width))
        yield from _local_block(text, counts)
    yield from [Map(width, NUM_TARGETS, counts.symbols)] * (1 + text.predicts_end)
    yield Table(2 * width)


def media_preludio(media: MediaConfig, atto_width: int, *, counts: MediaCounts) -> Iterator[Piece]:
    """Patches to latents."""
    rows = counts.clean + (0 if media.causal else counts.noised)
    if media.unet_width:
        yield from _cells_down(media, atto_width, rows=rows, canvases=2 * counts.spans)
    else:
        yield Map(media.patch_scalars, atto_width, rows, bias=True, of_data=True)
    entrance = "nowhere" if media.causal else ENTRANCES[media.time_conditioning].preludio
    if entrance == "film":
        yield from _modulation(atto_width, parts=2, rows=counts.times + 1)
    elif entrance != "nowhere":
        yield from _time_embedding(atto_width, rows=counts.told if entrance == "token" else counts.times + 1)
    yield Table((sum(media.places) + len(media.buckets) + 1) * atto_width)
    if media.budget is not None:
        yield from _leaf_merge(media, atto_width, leaves=counts.leaves)


def media_coda(media: MediaConfig, atto_width: int, *, counts: MediaCounts) -> Iterator[Piece]:
    """Latents and noised patches to what the objective predicts."""
    width, scalars, rows = media.coda_width, media.patch_scalars, counts.noised
    layers = 0 if media.coda == "linear" else media.coda_layers
    attends = media.coda == "dit"
    yield Map(atto_width, width, rows, bias=True)
    yield Map(scalars, width, rows, bias=True, of_data=True)
    yield Table(sum(media.places) * width)
    entrance = ENTRANCES[media.time_conditioning].coda
    if entrance == "added":
        yield from _time_embedding(width, rows=counts.times)
    elif entrance == "film":
        yield from _modulation(width, parts=3 * layers * (1 + attends) + 2, rows=counts.times)
    for _ in range(layers):
        if attends:
            yield from (Table(width), *_local_attention(width, rows, pairs=counts.pairs))
        yield from (Table(width), *_swiglu(width, 2 * width, rows))
    yield Table(width if media.coda != "linear" else 0)
    if media.unet_width:
        yield from _cells_up(media, width, rows=rows, canvases=counts.spans)
    else:
        yield Map(width, scalars, rows, bias=True)
    yield Map(width, scalars, rows, bias=True)


def _leaf_merge(media: MediaConfig, atto_width: int, *, leaves: tuple[int, ...]) -> Iterator[Piece]:
    """A map of all scalars of a leaf, one a level. leaves: of each level; missing ones have none."""
    assert media.budget is not None
    for level in range(1, media.budget.levels + 1):
        rows = leaves[level - 1] if level <= len(leaves) else 0
        yield Map(2 ** (media.rank * level) * media.patch_scalars, atto_width, rows, of_data=True)
    yield Table(media.budget.levels * atto_width)


def _ngrams(text: TextConfig, sizes: int) -> int:
    return sizes * text.ngram_rows * text.width


def _local_block(text: TextConfig, counts: TextCounts) -> Iterator[Piece]:
    yield from [Table(text.width)] * 2
    yield from _local_attention(text.width, counts.symbols, pairs=counts.pairs)
    yield from _swiglu(text.width, text.ffn_width, counts.symbols)


def _local_attention(width: int, rows: int, *, pairs: Pairs) -> Iterator[Piece]:
    yield from (Map(width, 3 * width, rows), Attention(width, pairs), Map(width, width, rows))


def _swiglu(width: int, inner: int, rows: int, *, sharded: bool = False) -> Iterator[Piece]:
    yield from [Map(width, inner, rows, sharded=sharded)] * 2
    yield Map(inner, width, rows, sharded=sharded)


def _modulation(width: int, *, parts: int, rows: int) -> Iterator[Piece]:
    yield Map(2 * TIME_WAVES, TIME_WAVES, rows, bias=True, of_data=True)
    yield Map(TIME_WAVES, parts * width, rows, bias=True)


def _time_embedding(width: int, *, rows: int) -> Iterator[Piece]:
    yield Map(2 * TIME_WAVES, width, rows, bias=True, of_data=True)
    yield Map(width, width, rows, bias=True)


def _convolution(media: MediaConfig, inner: int, outer: int, *, canvases: int, of_data: bool = False) -> Map:
    """Every cell of every canvas takes a kernel's inputs: as a map, rows are cells."""
    cells = prod(media.places) * media.patch**media.rank
    return Map(inner * REACH**media.rank, outer, canvases * cells, bias=True, of_data=of_data)


def _cells_down(media: MediaConfig, atto_width: int, *, rows: int, canvases: int) -> Iterator[Piece]:
    width = media.unet_width
    yield _convolution(media, media.channels, width, canvases=canvases, of_data=True)
    yield from [_convolution(media, width, width, canvases=canvases)] * 2
    yield Table(width)
    yield Map(width * media.patch**media.rank, atto_width, rows, bias=True)


def _cells_up(media: MediaConfig, coda_width: int, *, rows: int, canvases: int) -> Iterator[Piece]:
    width = media.unet_width
    yield Map(coda_width, width * media.patch**media.rank, rows, bias=True)
    yield _convolution(media, media.channels, width, canvases=canvases, of_data=True)
    yield from [_convolution(media, width, width, canvases=canvases)] * 2
    yield from [Table(width)] * 2
    yield _convolution(media, width, media.channels, canvases=canvases)
