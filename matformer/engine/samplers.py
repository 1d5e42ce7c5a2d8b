"""From prompts to new spans: text byte by byte, media by denoising.

Rows are documents that grow side by side. What a row draws is a function of (seed, row, span): the same seed gives the
same spans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from matformer.config.schema import RunConfig
from matformer.data.packing import (
    DrawNoise,
    Noise,
    Piece,
    Place,
    build_batch,
    document_positions,
    draw_zeros,
    pack_batch,
)
from matformer.data.patching import Boundary, Patcher, build_patcher, text_symbols
from matformer.data.sources import Document, MediaSpan, TextSpan
from matformer.errors import ParcelError
from matformer.layers.patchify import unpatchify
from matformer.modalities import patch_scalars, patches_of_bucket
from matformer.model import Matformer
from matformer.parallel.seeds import generator
from matformer.parcels import Batch, TextUnits
from matformer.shapes import BEGIN, END, NUM_TARGETS

Span = TextSpan | MediaSpan
Velocity = Callable[[Tensor, float], Tensor]
Solver = Literal["euler", "heun"]


@dataclass(frozen=True, slots=True)
class Draws:
    """How spans are drawn.

    temperature: 0 takes the likeliest answer. top_p: probability mass of the likeliest answers that may be drawn.
    max_bytes: new bytes of a text span. steps: of the way from t = 1 to 0. guidance: w of
    v_blind + w (v_cond - v_blind); 1 leaves the blind rows out.
    """

    seed: int = 0
    temperature: float = 0.8
    top_p: float = 0.95
    max_bytes: int = 256
    steps: int = 50
    guidance: float = 2.0
    solver: Solver = "euler"


@dataclass(slots=True)
class Row:
    """A document that grows: whole spans, and the bytes of a text span that is to be continued."""

    number: int
    spans: tuple[Span, ...] = ()
    prompt: bytes = b""

    def add(self, span: Span) -> None:
        """`span` (it holds the prompt where that was continued) is the newest of the row."""
        self.spans, self.prompt = (*self.spans, span), b""


# Text


class TextWriter:
    """Text spans that are being written, one a row; boundaries, latents and logits are those of the finished span.

    The Atto runs again over a row where a patch was completed; the Coda runs for every symbol over as many symbols of
    the span as its layers can see.
    """

    def __init__(self, model: Matformer, rows: Sequence[Row], *, config: RunConfig) -> None:
        text = config.model.text
        self.model, self.config = model, config
        # what the layers look back over, and the n-grams of the first symbol that they see
        layers, ngrams = text.coda_layers, text.coda_ngrams
        if text.coda_input == "preludio":
            layers, ngrams = layers + text.preludio_layers, text.preludio_ngrams
        self.sight = layers * (text.window - 1) + max(ngrams, default=1)
        patcher = build_patcher(config.data.patcher)
        self.pens = [_Pen(given_media(row.spans), patcher.boundary()) for row in rows]
        for pen, row in zip(self.pens, rows, strict=True):
            pen.before = document_positions(Document("", pen.spans), model=config.model)
            for symbol, ends in zip(row.prompt, _prompt_ends(row.prompt, patcher), strict=True):
                pen.push(symbol, ends=ends)
            if not self.has_room(pen):
                raise ParcelError(
                    f"a prompt must leave room in {config.data.sequence_latents} latents, got "
                    f"{pen.before + len(pen.lengths)}; shorten it"
                )

    def has_room(self, pen: _Pen) -> bool:
        """Whether the patch in hand still fits into the sequence."""
        return pen.before + len(pen.lengths) < self.config.data.sequence_latents

    @torch.no_grad()
    def logits(self, pens: Sequence[_Pen]) -> Float[Tensor, "rows V"]:
        """Of the next symbol of each, and after them, where the Coda says so, of its patch's end (see TextCoda)."""
        self._refresh([pen for pen in pens if pen.latents is None])
        latents = [pen.latents for pen in pens if pen.latents is not None]
        first = np.cumsum([0] + [len(latent) for latent in latents])
        units = _coda_units(pens, first, sight=self.sight)
        last = np.cumsum([min(len(pen.data) + 1, self.sight) for pen in pens]) - 1
        return self.model.text_logits(torch.cat(latents), units)[torch.from_numpy(last)]

    def _refresh(self, stale: Sequence[_Pen]) -> None:
        if not stale:
            return
        documents = [Document(f"row {i}", pen.complete()) for i, pen in enumerate(stale)]
        sizes = [pen.before + len(pen.lengths) for pen in stale]
        batch = build_batch(documents, model=self.config.model, sequence_latents=max(sizes))
        for pen, size, latents_SH in zip(stale, sizes, self.model.latents(batch), strict=True):
            pen.latents = latents_SH[:size]


def _prompt_ends(prompt: bytes, patcher: Patcher) -> np.ndarray:
    """Whether a patch ends with each byte, where the patcher does not find out by itself; the last stays open."""
    ends = np.zeros(len(prompt), bool)
    if patcher.learned:
        ends[patcher.lengths(text_symbols(prompt, ended=False)).cumsum()[:-1] - 1] = True
    return ends


class _Pen:
    """One span in the writing. `lengths`: symbols of its complete patches; `latents`: up to the last of these."""

    def __init__(self, spans: tuple[Span, ...], boundary: Boundary) -> None:
        self.spans, self.boundary = spans, boundary
        self.before = 0
        self.data = bytearray()
        self.lengths: list[int] = []
        self.in_hand = 0
        self.ended = False
        self.latents: Tensor | None = None

    def push(self, symbol: int, *, ends: bool = False) -> None:
        """Write a byte or `<end>`; `ends` as Boundary wants it."""
        self.in_hand += 1
        if symbol == END:
            self.ended = True
        else:
            self.data.append(symbol)
        if self.boundary.push(symbol, ends=ends):
            self.lengths.append(self.in_hand)
            self.in_hand, self.latents = 0, None

    def complete(self) -> tuple[Span, ...]:
        """The document up to its last complete patch."""
        if not self.lengths:
            return self.spans
        data = bytes(self.data[: sum(self.lengths)])
        return (*self.spans, TextSpan(data, np.asarray(self.lengths, np.int32), self.ended))

    def span(self) -> TextSpan:
        """What is written; the patch in hand is cut where it stands."""
        lengths = self.lengths + [self.in_hand] * (self.in_hand > 0)
        return TextSpan(bytes(self.data), np.asarray(lengths, np.int32), self.ended)


@torch.no_grad()
def write_texts(model: Matformer, rows: Sequence[Row], *, config: RunConfig, draws: Draws) -> list[TextSpan]:
    """One text span a row, its prompt continued until `<end>`, `draws.max_bytes` or the end of the sequence.

    Raises ParcelError where a prompt does not fit.
    """
    writer = TextWriter(model, rows, config=config)
    dice = [dice_of(draws, row, "text") for row in rows]
    limits = [len(row.prompt) + draws.max_bytes for row in rows]
    live = list(range(len(rows)))
    while live:
        logits = writer.logits([writer.pens[i] for i in live]).double().numpy()
        for i, logits_V in zip(live, logits, strict=True):
            of_symbol, of_end = logits_V[:NUM_TARGETS], logits_V[NUM_TARGETS:]
            if not writer.pens[i].data:
                of_symbol[END] = -np.inf  # no span of a document is empty
            symbol = draw_answer(of_symbol, draws=draws, dice=dice[i])
            ends = len(of_end) > 0 and draw_answer(np.array([0.0, of_end[symbol]]), draws=draws, dice=dice[i]) == 1
            writer.pens[i].push(symbol, ends=ends)
        pens = writer.pens
        live = [i for i in live if not pens[i].ended and len(pens[i].data) < limits[i] and writer.has_room(pens[i])]
    return [pen.span() for pen in writer.pens]


def draw_answer(logits: Float[np.ndarray, " answers"], *, draws: Draws, dice: np.random.Generator) -> int:
    """One answer: the likeliest at temperature 0, else drawn among the likeliest that hold `top_p` of the mass.

    Source: Holtzman 2020, section 3.1 (nucleus sampling). Answers at -inf are never drawn.
    """
    if draws.temperature == 0:
        return int(logits.argmax())
    weight = np.exp((logits - logits.max()) / draws.temperature)
    order = np.argsort(-weight, kind="stable")
    reached = np.cumsum(weight[order])
    count = int(np.searchsorted(reached, draws.top_p * reached[-1])) + 1
    number = np.searchsorted(reached[:count], dice.random() * reached[:count][-1], side="right")
    return int(order[min(int(number), count - 1)])


def _coda_units(pens: Sequence[_Pen], first: np.ndarray, *, sight: int) -> TextUnits:
    """The last `sight` Coda inputs of each span; what they predict is not asked, so `symbol` repeats the input."""
    inputs, places, patches, slots, pieces, num_patches = [], [], [], [], [], 0
    for number, (pen, begin) in enumerate(zip(pens, first, strict=False)):
        size = len(pen.data) + 1
        kept = slice(max(0, size - sight), size)
        patch = np.repeat(np.arange(len(pen.lengths) + 1), [*pen.lengths, pen.in_hand + 1])[kept]
        inputs.append(np.array([BEGIN, *pen.data], np.int64)[kept])
        places.append(np.arange(size)[kept])
        patches.append(patch - patch[0] + num_patches)
        slots.append(begin + pen.before + np.arange(patch[0], patch[-1] + 1))
        pieces.append(np.full(len(patch), number))
        num_patches += int(patch[-1] - patch[0]) + 1
    symbol, place, patch, slot, piece = (
        torch.from_numpy(np.concatenate(arrays)).long() for arrays in (inputs, places, patches, slots, pieces)
    )
    return TextUnits(
        symbol_U=symbol, coda_input_U=symbol, piece_U=piece, place_U=place, patch_U=patch, document_U=piece, slot_P=slot
    )


# Media


@torch.no_grad()
def draw_media(
    model: Matformer, rows: Sequence[Row], *, modality: str, buckets: Sequence[int], config: RunConfig, draws: Draws
) -> list[MediaSpan]:
    """One span of `modality` a row, of the shape that `buckets` names, denoised from t = 1 to 0.

    Raises ParcelError where it does not fit into the sequence.
    """
    media = config.model.media[modality]
    empty = [_empty_span(modality, bucket, config=config) for bucket in buckets]
    documents = [
        Document(f"row {row.number}", (*given_media(row.spans), one)) for row, one in zip(rows, empty, strict=True)
    ]
    batch = denoising_batch(documents, config=config, guided=draws.guidance != 1)
    sizes = [patches_of_bucket(media, bucket) for bucket in buckets]
    noise = [
        dice_of(draws, row, modality).standard_normal((size, patch_scalars(media)), dtype=np.float32)
        for row, size in zip(rows, sizes, strict=True)
    ]
    velocity = guided_velocity(model, batch, modality=modality, guidance=draws.guidance)
    x_QF = denoise(velocity, torch.from_numpy(np.concatenate(noise)), steps=draws.steps, solver=draws.solver)
    latents = [
        unpatchify(x_NF, grid=media.buckets[bucket], patch=media.patch).numpy()
        for x_NF, bucket in zip(x_QF.split(sizes), buckets, strict=True)
    ]
    return [replace(one, latent=latent) for one, latent in zip(empty, latents, strict=True)]


def denoise(velocity: Velocity, x: Tensor, *, steps: int, solver: Solver = "euler") -> Tensor:
    """x_0 of x_1 = `x` along dx/dt = velocity(x, t), in equal steps of t. Source: Karras 2022, algorithm 1 (Heun)."""
    times = np.linspace(1.0, 0.0, steps + 1)
    for time, after in zip(times[:-1], times[1:], strict=True):
        slope = velocity(x, float(time))
        ahead = x + float(after - time) * slope
        if solver == "heun":
            ahead = x + float(after - time) / 2 * (slope + velocity(ahead, float(after)))
        x = ahead
    return x


def denoising_batch(documents: Sequence[Document], *, config: RunConfig, guided: bool) -> Batch:
    """Each document a row, its last span the generated one; `guided` repeats all rows without their condition.

    Raises ParcelError where a document does not fit.
    """
    model = config.model
    length = max(document_positions(document, model=model) for document in documents)
    if length > config.data.sequence_latents:
        raise ParcelError(
            f"a prompt and the span after it must fit into {config.data.sequence_latents} latents, got {length}; "
            "shorten the prompt"
        )
    blind = [replace(document, key=f"{document.key} blind") for document in documents] if guided else []
    pieces = [[Piece(one, Place(), Place(len(one.spans)))] for one in (*documents, *blind)]
    noises = [_no_noise(blind=False)] * len(documents) + [_no_noise(blind=True)] * len(blind)
    return pack_batch(pieces, noises, model=model, sequence_latents=length)


def guided_velocity(model: Matformer, batch: Batch, *, modality: str, guidance: float) -> Velocity:
    """v_blind + w (v_cond - v_blind) of the noised rows of a `denoising_batch`; with w = 1 it has no blind rows.

    x_t stands as value and as noise alike: the straight path between x_t and itself is x_t at every t. The value is
    read by nobody else, since a span that ends its document has no clean copy.
    """
    units = batch.media[modality]
    generated = torch.zeros_like(units.time_J).index_fill(0, units.span_N[units.noised_row_Q].unique(), 1.0)
    copies = 1 if guidance == 1 else 2

    def velocity(x_QF: Tensor, time: float) -> Tensor:
        value = units.value_NF.index_copy(0, units.noised_row_Q, torch.cat((x_QF,) * copies))
        now = replace(units, value_NF=value, noise_NF=value, time_J=time * generated)
        latents = model.latents(replace(batch, media={**batch.media, modality: now}))
        found = model.code[modality](latents.flatten(0, 1), now).float()
        if copies == 1:
            return found
        seeing, blind = found.chunk(2)
        return blind + guidance * (seeing - blind)

    return velocity


def _no_noise(*, blind: bool) -> DrawNoise:
    def draw(key: str, span: int, shape: tuple[int, int]) -> Noise:
        return draw_zeros(key, span, shape)._replace(blind=blind)

    return draw


def _empty_span(modality: str, bucket: int, *, config: RunConfig) -> MediaSpan:
    media = config.model.media[modality]
    shape = (media.channels, *media.buckets[bucket])
    return MediaSpan(modality, np.zeros(shape, np.float32), bucket, "generate")


def given_media(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Media clean alone: for what follows the same as a generated span with its clean copy, in fewer positions."""
    return tuple(replace(span, role="given") if isinstance(span, MediaSpan) else span for span in spans)


def dice_of(draws: Draws, row: Row, use: str) -> np.random.Generator:
    """The row's own random stream for its next span."""
    return generator(draws.seed, "sample", use, row.number, len(row.spans))
