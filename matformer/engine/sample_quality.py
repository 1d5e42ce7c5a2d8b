"""Pictures drawn from held-out captions, judged by a classifier of real ones: is what was asked for in them?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from matformer.config.schema import RunConfig
from matformer.data.patching import build_patcher
from matformer.data.sources import MediaSpan, Source, text_span
from matformer.engine.classifier import seen
from matformer.engine.denoiser import draw_media
from matformer.engine.draws import Draws, Row, Watch, guidance_for, unwatched
from matformer.engine.frechet import fitted, frechet_distance
from matformer.engine.judge import Judge, decoded, group_of, load_judge, picture_sources
from matformer.engine.media import MediaCodec, load_codec
from matformer.engine.paired import Subject, clustered, other_captions, spread, subjects_of
from matformer.model import Matformer

DRAWS = Draws(steps=25, guidance=5.0)
ROWS = 64
"""Pictures that are drawn side by side."""


@dataclass(frozen=True)
class Asked:
    """A held-out picture that the model is to draw from its caption, and from another concept's."""

    source: Source
    subject: Subject
    other: str
    label: int
    bucket: int


@dataclass(frozen=True)
class Judged:
    """What the classifier says of pictures."""

    features: Float[np.ndarray, "n F"]
    label_n: Int[np.ndarray, " n"]


def draws_for(config: RunConfig, *, guidance: float | None = None, **others: Any) -> Draws:  # noqa: ANN401
    """DRAWS with these changed, guided as far as the run learned to be. Raises ConfigError as `guidance_for`."""
    return replace(DRAWS, guidance=guidance_for(config, guidance, standard=DRAWS.guidance), **others)


def sample_quality(
    model: Matformer,
    config: RunConfig,
    *,
    modality: str,
    num_samples: int,
    draws: Draws | None = None,
    watch: Watch = unwatched,
) -> dict[str, float]:
    """Keys `heldout/samples/<modality>_...` of up to `num_samples` held-out captions, every concept once first.

    `top1`: share of pictures drawn from their captions that the classifier takes for their own kind; `top1_shuffled`:
    of those drawn from another concept's caption (the same language, style and shape, the same noise); `top1_gain`,
    `_z`: the difference; `top1_real`: of the real ones, the ceiling; `top1_majority`: the commonest kind's share.
    Standard errors are clustered by concept. `frechet`: distance of the features of drawn pictures from those of train
    pictures; `frechet_real`: that of the real ones. Raises DataError if data cannot be read or say no kinds.
    """
    draws = draws or draws_for(config)
    judge, codec = load_judge(config, modality=modality), load_codec(config, modality)
    asked = asked_for(config, judge, modality=modality, num_samples=num_samples)
    if not asked:
        return {}
    real = judged(judge, [seen(decoded(one.source, one.subject.index, codec=codec)[None]) for one in asked])

    count = 2 * -(-len(asked) // ROWS)
    names = (f"{modality}, batch {number} of {count}" for number in range(1, count + 1))

    def drawn(captions: Sequence[str]) -> Judged:
        pictures = _drawn(model, captions, asked, config=config, codec=codec, draws=draws, names=names, watch=watch)
        return judged(judge, pictures)

    own, shuffled = drawn([one.subject.caption for one in asked]), drawn([one.other for one in asked])
    return _numbers(judge, asked, modality=modality, real=real, own=own, shuffled=shuffled)


def judged_samples(
    model: Matformer, config: RunConfig, *, draws: Draws | None = None, watch: Watch = unwatched
) -> dict[str, float]:
    """`sample_quality` of every modality of pictures, `eval.judged_samples` of each."""
    found: dict[str, float] = {}
    for modality, media in config.model.media.items():
        paired = any(source.modality == modality for source in config.data.sources.values())
        if config.eval.judged_samples and media.rank == 2 and paired:
            amount = config.eval.judged_samples
            found |= sample_quality(model, config, modality=modality, num_samples=amount, draws=draws, watch=watch)
    return found


def asked_for(config: RunConfig, judge: Judge, *, modality: str, num_samples: int) -> list[Asked]:
    """Held-out captions whose kind the classifier knows; the choice is free of the run's seed."""
    number = {label: place for place, label in enumerate(judge.labels)}
    found: list[Asked] = []
    for source in picture_sources(config, modality=modality, split="heldout"):
        subjects = subjects_of(source, by_style=True)
        others = other_captions(subjects, number=1)
        for subject in spread(subjects):
            label = number.get(group_of(source.describe(subject.index)) or "")
            if label is not None and others[subject.index]:
                span = source.pick(subject.index, direction="generate").spans[-1]
                assert isinstance(span, MediaSpan)
                found.append(Asked(source, subject, others[subject.index][0], label, span.bucket))
    return found[:num_samples]


def judged(judge: Judge, pictures: Sequence[Float[Tensor, "1 3 side side"]]) -> Judged:
    """Of pictures as `seen` gives them."""
    features, labels = judge.classifier.judge(torch.cat(list(pictures)))
    return Judged(features.double().numpy(), labels.numpy())


def _drawn(
    model: Matformer,
    captions: Sequence[str],
    asked: Sequence[Asked],
    *,
    config: RunConfig,
    codec: MediaCodec,
    draws: Draws,
    names: Iterator[str],
    watch: Watch,
) -> list[Float[Tensor, "1 3 side side"]]:
    """A picture a caption; the noise goes by the place, so that it is the same whatever the caption.

    `names` gives each batch's, for `watch`.
    """
    patcher = build_patcher(config.data.patcher, vocabulary=config.model.text.vocabulary)
    rows = [Row(place, (text_span(caption.encode(), patcher),)) for place, caption in enumerate(captions)]
    order = sorted(range(len(rows)), key=lambda place: len(captions[place]))  # rows of one batch are as long
    pictures: dict[int, Tensor] = {}
    for first in range(0, len(order), ROWS):
        places = order[first : first + ROWS]
        spans = draw_media(
            model,
            [rows[place] for place in places],
            modality=codec.modality,
            buckets=[asked[place].bucket for place in places],
            config=config,
            draws=draws,
            on_step=partial(watch, next(names)),
        )
        pictures |= {place: seen(codec.decode(span.latent)[None]) for place, span in zip(places, spans, strict=True)}
    return [pictures[place] for place in range(len(rows))]


def _numbers(
    judge: Judge, asked: Sequence[Asked], *, modality: str, real: Judged, own: Judged, shuffled: Judged
) -> dict[str, float]:
    label_n = np.array([one.label for one in asked])
    concepts = [one.subject.concept for one in asked]
    right = {name: (part.label_n == label_n).astype(float) for name, part in _named(real, own, shuffled)}
    key = f"heldout/samples/{modality}"
    found: dict[str, float] = {f"{key}_num_samples": len(asked), f"{key}_num_concepts": len(set(concepts))}
    for name, values in (*right.items(), ("_gain", right[""] - right["_shuffled"])):
        score = clustered(values, concepts)
        found |= {f"{key}_top1{name}": score.value, f"{key}_top1{name}_stderr": score.stderr}
        if name == "_gain" and score.stderr > 0:
            found[f"{key}_top1_gain_z"] = score.value / score.stderr
    found[f"{key}_top1_majority"] = float(np.bincount(label_n).max() / len(label_n))
    for name, part in (("", own), ("_real", real)):
        found[f"{key}_frechet{name}"] = frechet_distance(fitted(part.features), judge.train)
    return {name: value for name, value in found.items() if np.isfinite(value)}


def _named(real: Judged, own: Judged, shuffled: Judged) -> tuple[tuple[str, Judged], ...]:
    return ("", own), ("_shuffled", shuffled), ("_real", real)
