"""Documents that grow: the router says what comes next, the samplers make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from matformer.config.schema import RunConfig
from matformer.data.packing import build_batch, document_positions, time_positions
from matformer.data.sources import Document, TextSpan
from matformer.data.text_layout import text_positions
from matformer.engine.denoiser import draw_media
from matformer.engine.draws import Draws, OnStep, Row, Span, Watch, dice_of, draw_answer, given, unwatched
from matformer.engine.text_writer import write_texts
from matformer.engine.unmask import fill_texts
from matformer.errors import ParcelError
from matformer.model import Matformer
from matformer.parcels import RouterUnits

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Answer:
    """What comes next: a modality and its shape bucket (0 for text), or nothing: the document ends."""

    modality: str | None
    bucket: int = 0


@torch.no_grad()
def ask(model: Matformer, rows: Sequence[Row], *, want: str, config: RunConfig, draws: Draws) -> list[Answer]:
    """What the router says of the span after each row; under a `want` other than auto only that modality is legal.

    A document does not end before it began, no text follows text, and what does not fit is illegal. Raises
    ParcelError where nothing is legal.
    """
    names = config.model.modalities
    heard = _heard if want == AUTO else given  # where something follows, training shows all of it clean
    documents = [Document(f"row {i}", heard(row.spans)) for i, row in enumerate(rows)]
    length = max(document_positions(one, model=config.model) for one in documents)
    batch = build_batch(documents, model=config.model, sequence_latents=max(length, 1))
    fitting = [_fitting(row, config=config) for row in rows]
    legal = torch.tensor([_legal(row, fits, want=want, names=names) for row, fits in zip(rows, fitting, strict=True)])
    for row in range(len(rows)):
        if not legal[row].any():
            raise ParcelError(
                f"a prompt must leave room for {want} in {config.data.sequence_latents} latents, got a prompt of "
                f"{document_positions(documents[row], model=config.model)}; shorten it"
            )
    asked = _questions([document_positions(one, model=config.model) for one in documents], length, legal=legal)
    kinds, buckets = model.router(model.latents(batch).flatten(0, 1), asked)
    answers = []
    for i, (row, fits) in enumerate(zip(rows, fitting, strict=True)):
        dice = dice_of(draws, row, "router")
        kind = draw_answer(kinds[i].double().numpy(), draws=draws, dice=dice)
        if kind == len(names) or kind == 0:
            answers.append(Answer("text" if kind == 0 else None))
            continue
        scores = buckets[names[kind]][i].double().numpy()
        scores[~np.asarray(fits[names[kind]])] = -np.inf
        answers.append(Answer(names[kind], draw_answer(scores, draws=draws, dice=dice)))
    return answers


def continue_rows(
    model: Matformer,
    rows: Sequence[Row],
    *,
    want: str,
    config: RunConfig,
    draws: Draws,
    max_spans: int = 1,
    watch: Watch = unwatched,
) -> None:
    """Add to each row `max_spans` spans of modality `want` (of text one); under auto fewer where its document ends.

    All rows that get the same modality are one batch; `watch` hears of its steps.
    Raises ParcelError where a prompt leaves no room.
    """
    live = list(rows)
    count = 1 if want == "text" else max_spans
    for number in range(1, count + 1):
        answers = (
            [Answer("text")] * len(live) if want == "text" else ask(model, live, want=want, config=config, draws=draws)
        )
        for modality in config.model.modalities:
            chosen = [
                (row, answer.bucket) for row, answer in zip(live, answers, strict=True) if answer.modality == modality
            ]
            if chosen:
                on_step = partial(watch, f"{modality}, batch {number} of {count}")
                _add(model, chosen, modality=modality, config=config, draws=draws, on_step=on_step)
        live = [row for row, answer in zip(live, answers, strict=True) if _goes_on(row, answer)]
        if not live:
            return


def _add(
    model: Matformer,
    chosen: Sequence[tuple[Row, int]],
    *,
    modality: str,
    config: RunConfig,
    draws: Draws,
    on_step: OnStep,
) -> None:
    rows = [row for row, _ in chosen]
    if modality == "text":
        make = fill_texts if config.model.diffuses_text else write_texts
        spans: Sequence[Span] = make(model, rows, config=config, draws=draws, on_step=on_step)
    else:
        buckets = [bucket for _, bucket in chosen]
        spans = draw_media(model, rows, modality=modality, buckets=buckets, config=config, draws=draws, on_step=on_step)
    for row, span in zip(rows, spans, strict=True):
        row.add(span)


def _goes_on(row: Row, answer: Answer) -> bool:
    """A text that was cut short has no question after it."""
    last = row.spans[-1] if row.spans else None
    return answer.modality is not None and not (isinstance(last, TextSpan) and not last.ended)


def _fitting(row: Row, *, config: RunConfig) -> dict[str, list[bool]]:
    """Which shape buckets of each modality fit behind the row (text: one patch)."""
    used = document_positions(Document("", given(row.spans)), model=config.model)
    room = config.data.sequence_latents - used
    media = config.model.media
    fits = {
        name: [2 + time_positions(one) + one.noised_latents(bucket) <= room for bucket in range(len(one.buckets))]
        for name, one in media.items()
    }
    one_patch = text_positions(1, config.model.text, given=0, followed=False)
    return {"text": [room >= one_patch], **fits}


def _legal(row: Row, fits: dict[str, list[bool]], *, want: str, names: Sequence[str]) -> list[bool]:
    after_text = bool(row.spans) and isinstance(row.spans[-1], TextSpan)
    kinds = [any(fits[name]) and want in (AUTO, name) and not (name == "text" and after_text) for name in names]
    return [*kinds, want == AUTO and bool(row.spans), False]  # the end; latent thoughts


def _questions(sizes: Sequence[int], length: int, *, legal: Tensor) -> RouterUnits:
    slot = torch.tensor([row * length + size - 1 for row, size in enumerate(sizes)])
    return RouterUnits(
        slot_R=slot,
        target_R=torch.zeros_like(slot),
        legal_RM=legal,
        span_end_R=torch.ones_like(slot, dtype=torch.bool),
        bucket_R=torch.full_like(slot, -1),
        document_R=torch.arange(len(sizes)),
    )


def _heard(spans: Sequence[Span]) -> tuple[Span, ...]:
    """As `given`, but a span made last keeps its layout of the end of a document, without a clean copy.

    In training a generated span has a clean copy only where something follows: with one, the router would never say
    that the document ends. So after a diffused text it nearly always does (decisions 0003 and 0009).
    """
    return (*given(spans[:-1]), *spans[-1:])
