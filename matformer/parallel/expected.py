"""What a microbatch will hold on average, from the config alone: sources in their shares, packed without padding.

What only the data know is guessed, and said: how long patches, documents and captions are. Media under a budget take
all the latents that it allows, and split their largest blocks first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from statistics import fmean

from matformer.config.budget import budgeted_splits, leaves_of_levels
from matformer.config.schema import BudgetConfig, MediaConfig, ModelConfig, RunConfig, SourceConfig
from matformer.parallel.counts import Counts, MediaCounts, Pairs, Run, TextCounts, document_pairs, window_pairs

MEAN_PATCH = {"space": 5.5, "entropy": 4.5, "entropy_monotonic": 4.5, "bpe": 4.4, "tokens": 1.0}


@dataclass(frozen=True, slots=True)
class Guess:
    """symbols: of a patch. document: latents of a text document. caption: its symbols."""

    symbols: float
    document: int = 1024
    caption: int = 64


def guess_of(config: RunConfig, *, patch_bytes: float | None = None) -> Guess:
    """The patcher's usual mean, or what the caller knows of the data."""
    patcher = config.data.patcher
    known = float(patcher.patch_bytes) if patcher.kind == "static" else MEAN_PATCH[patcher.kind]
    return Guess(symbols=patch_bytes or known)


@dataclass(frozen=True, slots=True)
class _Document:
    """One of a kind: its runs in the Atto, text patches, and media as (name, noised patches, clean patches)."""

    runs: tuple[Run, ...]
    patches: int
    media: tuple[tuple[str, int, int], ...] = ()

    @property
    def positions(self) -> int:
        return sum(count for _, count in self.runs)


def expected_counts(config: RunConfig, guess: Guess, *, source: str | None = None) -> Counts:
    """Of a microbatch of the mixture, or of one source alone."""
    sources = config.data.sources if source is None else {source: config.data.sources[source]}
    positions = config.train.micro_batch * config.data.sequence_latents
    total = sum(one.weight for one in sources.values())
    documents: list[tuple[float, _Document]] = []  # how many of each
    for one in sources.values():
        for share, document in _documents(config, one, guess):
            documents.append((positions * one.weight / total * share / document.positions, document))
    return _counts(config.model, documents, positions=positions, guess=guess)


def heaviest_counts(config: RunConfig, guess: Guess) -> list[Counts]:
    """Of microbatches of one source each: what memory has to hold at worst."""
    return [expected_counts(config, guess, source=name) for name in config.data.sources]


def _documents(config: RunConfig, source: SourceConfig, guess: Guess) -> Iterator[tuple[float, _Document]]:
    """Kinds of documents with their shares of the source's latents."""
    model, longest = config.model, config.data.sequence_latents
    if source.form == "text":
        yield 1.0, _text(model, min(guess.document, longest) - 1)
        return
    caption = max(1, round(guess.caption / guess.symbols))
    if source.form == "documents":  # text, every medium once, text
        spans = [_generated(model, name, copies=model.most_copies(media)) for name, media in model.media.items()]
        yield 1.0, _joined(_text(model, caption), *spans, _Document((("causal", caption),), caption))
        return
    if source.shows == "caption" or source.modality is None:
        yield 1.0, _text(model, caption)
        return
    generated = _generated(model, source.modality, copies=1)
    given = _given(model, source.modality)
    text = _text(model, caption if source.shows == "both" else 0)
    yield source.generate_probability, _joined(text, generated)
    yield 1.0 - source.generate_probability, _joined(text, given)


def _text(model: ModelConfig, patches: int) -> _Document:
    """Start and text; under a diffusion objective half of the latents are noised copies, half clean ones."""
    if not model.diffuses_text or patches < 2:
        return _Document((("causal", 1 + patches),), patches)
    half = patches // 2
    return _Document((("causal", 1), ("noised", half), ("clean", half)), half)


def _generated(model: ModelConfig, name: str, *, copies: int) -> _Document:
    media = model.media[name]
    size = mean_patches(media)
    if media.causal:
        return _Document((("causal", size + 2),), 0, ((name, size * media.next_latent.noises, size),))
    clean: tuple[Run, ...] = (("clean", _mean(media, media.clean_latents)),) if copies == 2 else ()
    noised: Run = ("noised", _mean(media, media.noised_latents))
    runs: tuple[Run, ...] = (("causal", 1), noised, *clean, ("causal", 1))
    return _Document(runs, 0, ((name, size, size * (copies == 2)),))


def _given(model: ModelConfig, name: str) -> _Document:
    media = model.media[name]
    runs: tuple[Run, ...] = (("causal", 1), ("clean", _mean(media, media.clean_latents)), ("causal", 1))
    return _Document(runs, 0, ((name, 0, mean_patches(media)),))


def _joined(*documents: _Document) -> _Document:
    return _Document(
        tuple(run for one in documents for run in one.runs),
        sum(one.patches for one in documents),
        tuple(medium for one in documents for medium in one.media),
    )


def mean_patches(media: MediaConfig) -> int:
    """Of a span, every bucket as often as the others."""
    return _mean(media, lambda bucket: prod(media.grid(bucket)))


def _mean(media: MediaConfig, size: Callable[[int], float]) -> int:
    """Of what a bucket's number gives."""
    return round(fmean(size(bucket) for bucket in range(len(media.buckets))))


def _counts(model: ModelConfig, documents: list[tuple[float, _Document]], *, positions: int, guess: Guess) -> Counts:
    noised_context = model.media_context == "noised"
    seen = round(sum(many * document_pairs(one.runs, noised_context=noised_context) for many, one in documents))
    decoded = _text_counts(model, documents, guess)
    twice = 2 if model.diffuses_text else 1
    pairs = Pairs(*(twice * pair for pair in decoded.pairs))
    read = TextCounts(twice * decoded.symbols, twice * decoded.pooled, twice * decoded.patches, pairs)
    media = {name: _media_counts(model.media[name], name, documents) for name in model.media}
    spans = sum(one.spans for one in media.values())
    questions = round(sum(many for many, _ in documents)) + decoded.patches + spans
    return Counts(positions, Pairs(seen, seen), read, decoded, media, questions)


def _text_counts(model: ModelConfig, documents: list[tuple[float, _Document]], guess: Guess) -> TextCounts:
    patches = sum(many * one.patches for many, one in documents)
    ends = sum(many for many, one in documents if one.patches)
    symbols = round(patches * guess.symbols + ends)
    if model.text.vocabulary is not None:
        return TextCounts(symbols, symbols, round(patches))
    pairs = sum(
        many * window_pairs([round(one.patches * guess.symbols) + 1], window=model.text.window)
        for many, one in documents
        if one.patches
    )
    return TextCounts(symbols, symbols, round(patches), Pairs(round(pairs), round(pairs)))


def _media_counts(media: MediaConfig, name: str, documents: list[tuple[float, _Document]]) -> MediaCounts:
    found: Mapping[str, float] = {
        "noised": sum(many * noised for many, one in documents for at, noised, _ in one.media if at == name),
        "clean": sum(many * clean for many, one in documents for at, _, clean in one.media if at == name),
        "spans": sum(many for many, one in documents for at, _, _ in one.media if at == name),
    }
    noised, clean, spans = (round(found[key]) for key in ("noised", "clean", "spans"))
    seen = noised * min(2 * media.coda_window - 1, mean_patches(media)) if media.coda == "dit" else 0
    times = noised if media.causal else spans
    told = spans if media.time_conditioning == "token" else 0
    counts = MediaCounts(noised, clean, spans, times, told, pairs=Pairs(seen, seen))
    return counts if media.budget is None else _in_trees(counts, media, media.budget)


def _in_trees(counts: MediaCounts, media: MediaConfig, budget: BudgetConfig) -> MediaCounts:
    """With the leaves of every copy that stands in a tree, and what the router is asked of noised ones."""
    grids = [media.grid(bucket) for bucket in range(len(media.buckets))]
    leaves = [leaves_of_levels(grid, share=budget.share, levels=budget.levels) for grid in grids]
    splits = fmean(max(0, budgeted_splits(grid, share=budget.share, levels=budget.levels)) for grid in grids)
    large = [fmean(level) for level in zip(*leaves, strict=True)][1:]
    trees = counts.noised / mean_patches(media) if media.noises_trees else 0.0
    copies = counts.clean / mean_patches(media) + trees
    return replace(
        counts,
        leaves=tuple(round(copies * level) for level in large),
        trees=round(trees),
        blocks=round(trees * (splits + sum(large))),  # those that are split, and those that could be
    )
