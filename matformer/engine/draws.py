"""What is drawn in sampling: how, for whom, and from which stream of random numbers.

What a row draws is a function of (seed, row, span): the same seed gives the same spans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from matformer.config.schema import MediaConfig, RunConfig
from matformer.data.sources import MediaSpan, TextSpan
from matformer.errors import ConfigError
from matformer.parallel.seeds import generator

Span = TextSpan | MediaSpan
Solver = Literal["euler", "heun", "dpm"]
OnStep = Callable[[int, int], None]
"""Told after each step how many are done, and of how many."""
Watch = Callable[[str, int, int | None], None]
"""Told what is made, how many of its steps are done, and of how many; None where nobody knows."""
GUIDANCE = 2.0


@dataclass(frozen=True, slots=True)
class Draws:
    """How spans are drawn.

    temperature: 0 takes the likeliest answer. top_p: probability mass of the likeliest answers that may be drawn.
    max_bytes: new bytes of a text span. steps: of the way from t = 1 to 0. guidance: w of
    v_blind + w (v_cond - v_blind); 1 leaves the blind rows out (see `guidance_for`).
    """

    seed: int = 0
    temperature: float = 0.8
    top_p: float = 0.95
    max_bytes: int = 256
    steps: int = 50
    guidance: float = GUIDANCE
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


def unwatched(*_: object) -> None:
    """An `OnStep` or a `Watch` of nobody."""


def guidance_for(config: RunConfig, asked: float | None = None, *, standard: float = GUIDANCE) -> float:
    """What is asked for, else `standard`; 1 where the run never learned what there is without a condition.

    Raises ConfigError where such a run is asked for another.
    """
    if config.data.blind_probability > 0:
        return standard if asked is None else asked
    if asked not in (None, 1):
        raise ConfigError(
            f"--guidance must be 1 (none) where data.blind_probability is 0: nothing was learned without its "
            f"condition, got {asked:g}; leave --guidance out, or train with a higher data.blind_probability"
        )
    return 1.0


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


def given(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Each clean alone: for what follows the same as a generated span with its clean copy, in fewer positions."""
    return tuple(
        replace(span, role="given") if isinstance(span, MediaSpan) else replace(span, given=len(span.patch_lengths))
        for span in spans
    )


def dice_of(draws: Draws, row: Row, use: str) -> np.random.Generator:
    """The row's own random stream for its next span."""
    return generator(draws.seed, "sample", use, row.number, len(row.spans))


def empty_span(modality: str, bucket: int, *, media: MediaConfig) -> MediaSpan:
    """What is to be generated: a shape without content."""
    return MediaSpan(modality, np.zeros((media.channels, *media.buckets[bucket]), np.float32), bucket, "generate")
