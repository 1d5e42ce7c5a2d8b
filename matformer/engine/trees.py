"""Trees of spans that are to be generated, drawn from what their headers say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from matformer.config.schema import RunConfig
from matformer.data.packing import build_batch, document_positions
from matformer.data.sources import Document
from matformer.engine.draws import Draws, Row, dice_of, empty_span, given
from matformer.layers.quad_tree import drawn_levels
from matformer.model import Matformer


@torch.no_grad()
def draw_trees(
    model: Matformer, rows: Sequence[Row], *, modality: str, buckets: Sequence[int], config: RunConfig, draws: Draws
) -> list[np.ndarray]:
    """The tree of the next span of each row: the level of each patch's leaf, the whole budget spent.

    Blocks are split in the order of their logits, with logistic noise of the temperature on each: without a budget
    this would draw each split by its probability.
    """
    media = config.model.media[modality]
    assert media.budget is not None
    grids = [media.grid(bucket) for bucket in buckets]
    documents = []
    for row, bucket, grid in zip(rows, buckets, grids, strict=True):
        patches = np.zeros(math.prod(grid), np.int64)  # a tree of patches alone: every block is asked
        span = replace(empty_span(modality, bucket, media=media), noised_tree=patches)
        documents.append(Document(f"row {row.number}", (*given(row.spans), span)))
    length = max(document_positions(one, model=config.model) for one in documents)
    batch = build_batch(documents, model=config.model, sequence_latents=length)
    asked = batch.trees[modality]
    logits = model.router.tree_head[modality](model.latents(batch).flatten(0, 1), asked).double().numpy()
    trees = []
    for number, (row, grid) in enumerate(zip(rows, grids, strict=True)):
        scores = logits[asked.tree_K.numpy() == number]
        noise = dice_of(draws, row, f"{modality} tree").logistic(size=len(scores))
        scores = scores + draws.temperature * noise
        trees.append(drawn_levels(scores, grid=grid, share=media.budget.share, levels=media.budget.levels))
    return trees
