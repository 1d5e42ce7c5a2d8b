"""What the tree of a noised copy is worth: the loss in a medium's own tree, in the predicted one, in another's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from matformer.config.schema import RunConfig
from matformer.data.loader import heldout_documents, pack_documents
from matformer.data.packing import with_noise
from matformer.data.sources import Document, MediaSpan
from matformer.engine.baselines import TIMES, ratio
from matformer.engine.document_sums import document_sums, gather_documents, velocity_scalars
from matformer.engine.draws import Draws, Row
from matformer.engine.trees import draw_trees
from matformer.hosts.base import Host
from matformer.losses.route import split_nats
from matformer.model import Matformer

NOISE_SEED = 0
ROWS = 16
"""Documents whose trees are predicted at once."""


def tree_arms(host: Host, model: Matformer, config: RunConfig, *, modality: str) -> dict[str, float]:
    """Keys `heldout/<modality>/<own | predicted | shuffled>_tree_<loss>`, `_stderr`; `.../tree_nats` of a whole tree.

    The same documents, times and noise in all three; `own` tells where detail is, which no sampler knows. Of up to
    eval.media_spans captioned media of each source. On one rank, with the whole model.
    """
    name, found = config.model.media[modality].loss_name, {}
    scored = trees_by_document(host, model, config, modality=modality)
    for arm, by_document in scored.items():
        losses, sizes = zip(*by_document.values(), strict=True)
        score, key = ratio(losses, sizes), f"heldout/{modality}/{arm}_tree_{name}"
        found |= {key: score.value} | ({f"{key}_stderr": score.stderr} if math.isfinite(score.stderr) else {})
    if scored:
        documents = _documents(config, modality)
        found[f"heldout/{modality}/tree_nats"] = _nats(model, documents, modality=modality, config=config)
    return found


def trees_by_document(
    host: Host, model: Matformer, config: RunConfig, *, modality: str
) -> dict[str, dict[str, tuple[float, float]]]:
    """Of each arm, as `media_by_document` has it: each document's squared errors and scalars, means over noise levels.

    Nothing where no captioned medium is held out.
    """
    documents = _documents(config, modality)
    if not documents:
        return {}
    arms = {
        "own": [_span(one).tree for one in documents],
        "predicted": list(_predicted(model, documents, modality=modality, config=config)),
        "shuffled": _shuffled(documents),
    }
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for arm, trees in arms.items():
        standing = [_in_tree(one, tree) for one, tree in zip(documents, trees, strict=True)]
        plain = list(pack_documents(standing, config=config))
        batches = [with_noise(b, time=t, seed=NOISE_SEED, index=k) for b in plain for k, t in enumerate(TIMES, start=1)]
        table = gather_documents(batches, num_rows=config.train.micro_batch)
        errors = document_sums(host, [table])[0][modality] / len(TIMES)
        sizes = table.count(lambda batch: velocity_scalars(batch, modality)) / len(TIMES)
        found[arm] = dict(zip(table.keys, zip(errors.tolist(), sizes.tolist(), strict=True), strict=True))
    return found


def _documents(config: RunConfig, modality: str) -> list[Document]:
    """Held-out caption -> medium."""
    sources = config.data.sources.items()
    pairs = [name for name, one in sources if one.form == "pairs" and one.modality in (None, modality)]
    spans = config.eval.media_spans
    return [one for name in pairs for one in heldout_documents(config, name, max_spans=spans, direction="generate")]


def _span(document: Document) -> MediaSpan:
    span = document.spans[-1]
    assert isinstance(span, MediaSpan)
    return span


def _in_tree(document: Document, tree: np.ndarray | None) -> Document:
    return replace(document, spans=(*document.spans[:-1], replace(_span(document), noised_tree=tree)))


def _predicted(
    model: Matformer, documents: Sequence[Document], *, modality: str, config: RunConfig
) -> Iterator[np.ndarray]:
    """Drawn at temperature 1: the law that the head has learned."""
    draws = Draws(seed=NOISE_SEED, temperature=1.0)
    rows = [Row(number, document.spans[:-1]) for number, document in enumerate(documents)]
    buckets = [_span(document).bucket for document in documents]
    for at in range(0, len(rows), ROWS):
        some, theirs = rows[at : at + ROWS], buckets[at : at + ROWS]
        yield from draw_trees(model, some, modality=modality, buckets=theirs, config=config, draws=draws)


def _shuffled(documents: Sequence[Document]) -> list[np.ndarray | None]:
    """The tree of the next medium of the same shape."""
    alike: dict[int, list[int]] = {}
    for number, document in enumerate(documents):
        alike.setdefault(_span(document).bucket, []).append(number)
    after = {one: those[(at + 1) % len(those)] for those in alike.values() for at, one in enumerate(those)}
    return [_span(documents[after[number]]).tree for number in range(len(documents))]


@torch.no_grad()
def _nats(model: Matformer, documents: Sequence[Document], *, modality: str, config: RunConfig) -> float:
    """Of a medium's own tree, said by its header."""
    total = 0.0
    for batch in pack_documents([_in_tree(one, _span(one).tree) for one in documents], config=config):
        asked = batch.trees[modality]
        logits = model.router.tree_head[modality](model.latents(batch).flatten(0, 1), asked)
        total += float(split_nats(logits, asked.split_K).sum())
    return total / len(documents)
