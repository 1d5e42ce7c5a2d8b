"""What a row will cost, from its pieces alone: before it is packed, so that ranks can agree on who packs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matformer.config.schema import ModelConfig
from matformer.data.copies import num_latents
from matformer.data.packing import Piece, has_clean_copy, time_positions
from matformer.data.sources import MediaSpan, TextSpan
from matformer.parallel.counts import Counts, MediaCounts, Pairs, Run, TextCounts, document_pairs, window_pairs
from matformer.parallel.flops import batch_flops


def row_flops(pieces: Sequence[Piece], *, model: ModelConfig, sequence_latents: int) -> int:
    """Forward and backward of the model over one sequence, estimated.

    Times, blindness and masks are not drawn yet, so the pairs of the Atto's attention are those without them; diffused
    text counts as one noised and one clean copy.
    """
    return batch_flops(model, row_counts(pieces, model=model, sequence_latents=sequence_latents))


def row_counts(pieces: Sequence[Piece], *, model: ModelConfig, sequence_latents: int) -> Counts:
    """Counts of one sequence; see `row_flops` for what is estimated in them."""
    copies = 2 if model.diffuses_text else 1
    sizes, patches = [], 0
    media: dict[str, list[int]] = {name: [0, 0, 0] for name in model.media}  # noised, clean, spans
    for piece in pieces:
        for number, part in _spans(piece):
            if isinstance(part, TextSpan):
                first, last = _patches(piece, number)
                sizes.append(int(part.patch_lengths[first:last].sum()))
                patches += last - first
                continue
            noised, clean = _copies(piece, number, part, model=model)
            row = media[part.modality]
            row[0], row[1], row[2] = row[0] + noised, row[1] + clean, row[2] + 1
    symbols = sum(sizes)
    pairs = window_pairs(sizes, window=model.text.window, both_ways=model.diffuses_text)
    text = TextCounts(symbols, symbols, patches, Pairs(pairs, pairs))
    read = TextCounts(copies * symbols, copies * symbols, copies * patches, Pairs(copies * pairs, copies * pairs))
    noised_context = model.media_context == "noised"
    seen = sum(document_pairs(_runs(piece, model=model), noised_context=noised_context) for piece in pieces)
    return Counts(
        positions=sequence_latents,
        atto=Pairs(seen, seen),
        read=read,
        text=text,
        media={name: MediaCounts(row[0], row[1], row[2], row[2]) for name, row in media.items()},
        questions=patches + len(pieces),
    )


def _spans(piece: Piece) -> Iterator[tuple[int, TextSpan | MediaSpan]]:
    """Number and span of all that stands in the piece."""
    last = piece.last.span + (piece.last.patch > 0)
    for number in range(piece.first.span, last):
        yield number, piece.document.spans[number]


def _patches(piece: Piece, number: int) -> tuple[int, int]:
    """Which patches of a text span stand in the piece."""
    part = piece.document.spans[number]
    assert isinstance(part, TextSpan)
    first = piece.first.patch if number == piece.first.span else 0
    return first, piece.last.patch if number == piece.last.span else len(part.patch_lengths)


def _copies(piece: Piece, number: int, part: MediaSpan, *, model: ModelConfig) -> tuple[int, int]:
    """Noised and clean patches of a media span, as often as they are encoded."""
    media = model.media[part.modality]
    whole = num_latents(part, None, media=media)
    noised = whole * (media.next_latent.noises if media.causal else 1) if part.role == "generate" else 0
    return noised, whole if media.causal or has_clean_copy(piece.document, number, model=model) else 0


def _runs(piece: Piece, *, model: ModelConfig) -> Iterator[Run]:
    yield "causal", 1
    for number, part in _spans(piece):
        if isinstance(part, TextSpan):
            first, last = _patches(piece, number)
            yield "causal", last - first
            continue
        media = model.media[part.modality]
        noised = part.role == "generate" and not media.causal
        yield "causal", 1
        if noised:
            yield "noised", time_positions(media) + num_latents(part, part.noised_tree, media=media)
        if media.causal:
            yield "causal", num_latents(part, part.tree, media=media)
        elif has_clean_copy(piece.document, number, model=model):
            yield "clean", num_latents(part, part.tree, media=media)
        yield "causal", 1
