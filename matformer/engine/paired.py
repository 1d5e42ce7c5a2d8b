"""Are captions used? The same medium, noise and t with its own caption against the captions of other concepts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from matformer.config.schema import RunConfig
from matformer.data.loader import pack_documents
from matformer.data.packing import with_noise
from matformer.data.sources import Document, MediaSpan, Source, merge_spans, open_source
from matformer.engine.baselines import TIMES, Score, ratio
from matformer.engine.document_sums import Documents, document_sums, gather_documents, velocity_scalars
from matformer.hosts.base import Host
from matformer.parallel.seeds import digest

NUM_DERANGEMENTS = 4
NOISE_SEED = 1  # its own: the loss of held-out spans uses 0


@dataclass(frozen=True, slots=True)
class Subject:
    """A held-out medium and its caption. concept: what is held out, without variants; kin: whose captions may stand in.

    rank: its number among the variants of its concept in one style.
    """

    index: int
    concept: str
    caption: str
    kin: tuple[Any, ...]
    rank: int


def caption_gain(host: Host, config: RunConfig, *, modality: str, num_spans: int) -> dict[str, float]:
    """How much the loss grows under other captions. Collective.

    Keys `heldout/captions/<modality>_gain`, its `_stderr` clustered by concept, `_z` (unless nothing differs) and
    `_num_concepts`; none if nobody can be swapped with another. Mean over media of the mean over t and over up to four
    other captions of the same language and shape (and style, for pictures). Raises DataError if data cannot be read.
    """
    found: list[tuple[str, float]] = []
    for name, source in config.data.sources.items():
        if source.form == "pairs" and source.shows == "both" and source.modality == modality:
            opened = open_source(name, data=config.data, model=config.model, split="heldout")
            found += _gains(host, config, source=opened, modality=modality, num_spans=num_spans)
    concepts = [concept for concept, _ in found]
    if len(set(concepts)) < 2:
        return {}
    score = clustered([gain for _, gain in found], concepts)
    key = f"heldout/captions/{modality}_gain"
    numbers = {key: score.value, f"{key}_stderr": score.stderr, f"{key}_num_concepts": float(len(set(concepts)))}
    return numbers | ({f"{key}_z": score.value / score.stderr} if score.stderr > 0 else {})


def clustered(values: Iterable[float], concepts: Sequence[str]) -> Score:
    """The mean, its standard error over concepts."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for value, concept in zip(values, concepts, strict=True):
        sums[concept] += value
        counts[concept] += 1
    return ratio(list(sums.values()), list(counts.values()))


def subjects_of(source: Source, *, by_style: bool) -> list[Subject]:
    """Every document of a source of pairs with one caption: of the main language where it has it, else of its first.

    Order and choice are free of the run's seed.
    """
    found: list[Subject] = []
    seen: dict[tuple[str, str], int] = defaultdict(int)
    for index in range(len(source)):
        facts = source.describe(index)
        texts = {text["lang"]: text["text"] for text in facts["texts"] if text["text"]}
        if not texts:
            continue
        language = source.config.main_language if source.config.main_language in texts else min(texts)
        concept = facts.get("base") or facts["concept"]
        style = facts.get("style", "")
        kin = (language, tuple(facts["bucket"]), *([style] if by_style else []))
        found.append(Subject(index, concept, texts[language], kin, seen[concept, style]))
        seen[concept, style] += 1
    return found


def other_captions(subjects: Sequence[Subject], *, number: int = NUM_DERANGEMENTS) -> dict[int, list[str]]:
    """For each subject's index, captions of `number` other concepts of its kin; fewer, or none, where kin is small.

    Concepts of a kin stand in a circle of fixed order; derangement s turns it by s, so that no concept keeps its own
    caption. Where two concepts have the same words, the turn goes on.
    """
    circles: dict[tuple[Any, ...], dict[str, list[Subject]]] = defaultdict(lambda: defaultdict(list))
    for subject in subjects:
        circles[subject.kin][subject.concept].append(subject)
    chosen: dict[int, list[str]] = {}
    for circle in circles.values():
        concepts = sorted(circle, key=_order)
        for place, concept in enumerate(concepts):
            turned = [concepts[(place + turn) % len(concepts)] for turn in range(1, len(concepts))]
            for subject in circle[concept]:
                captions = [circle[other][subject.rank % len(circle[other])].caption for other in turned]
                different = [caption for caption in captions if caption != subject.caption]
                chosen[subject.index] = different[:number]
    return chosen


def spread(subjects: Sequence[Subject]) -> list[Subject]:
    """In a fixed order that names every concept once before any comes twice."""
    ordered = sorted(subjects, key=lambda subject: _order(f"{subject.concept}/{subject.index}"))
    turn: dict[str, int] = defaultdict(int)
    turns = []
    for subject in ordered:
        turns.append(turn[subject.concept])
        turn[subject.concept] += 1
    return [ordered[place] for place in sorted(range(len(ordered)), key=turns.__getitem__)]


def _gains(
    host: Host, config: RunConfig, *, source: Source, modality: str, num_spans: int
) -> Iterator[tuple[str, float]]:
    """(concept, gain) of each medium."""
    everyone = subjects_of(source, by_style=config.model.media[modality].rank > 1)
    others = other_captions(everyone)
    able = [subject for subject in everyone if others[subject.index]]
    # every concept once before any variant comes twice
    subjects = sorted(able, key=lambda subject: (subject.rank, _order(f"{subject.concept}/{subject.index}")))[
        :num_spans
    ]
    if not subjects:
        return
    arms = [{subject.index: subject.caption for subject in subjects}]
    for turn in range(NUM_DERANGEMENTS):
        arms.append({s.index: others[s.index][turn] for s in subjects if len(others[s.index]) > turn})
    tables = [_arm(source, captions, config=config) for captions in arms if captions]
    losses = [
        dict(zip(table.keys, sums[modality] / table.count(lambda b: velocity_scalars(b, modality)), strict=True))
        for table, sums in zip(tables, document_sums(host, tables), strict=True)
    ]
    for subject in subjects:
        key = source.pick(subject.index, direction="generate").key
        own, *other = [loss[key] for loss in losses if key in loss]
        yield subject.concept, float(np.mean(other) - own)


def _arm(source: Source, captions: dict[int, str], *, config: RunConfig) -> Documents:
    """Caption -> medium at every t. The noise is keyed by the document, so that it is the same in every arm."""
    documents = [_captioned(source, index, caption) for index, caption in captions.items()]
    batches = list(pack_documents(documents, config=config))
    noised = [with_noise(b, time=t, seed=NOISE_SEED, index=k) for b in batches for k, t in enumerate(TIMES, start=1)]
    return gather_documents(noised, num_rows=config.train.micro_batch)


def _captioned(source: Source, index: int, caption: str) -> Document:
    picked = source.pick(index, direction="generate")
    media = [span for span in picked.spans if isinstance(span, MediaSpan)]
    return Document(picked.key, merge_spans((caption.encode(), *media), source.patcher))


def _order(name: str) -> bytes:
    return digest(0, "caption", name)
