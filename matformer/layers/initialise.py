"""Weights drawn by the name of their parameter, so that every layout and host starts from the same model."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

EMBEDDING_STD, HEAD_STD = 0.5, 0.02
ZEROS = (".velocity.", ".gain.", ".film.", ".ngram_embedding.", ".detail.")


def initial_value(name: str, shape: tuple[int, ...], *, seed: int, depth: int) -> Tensor:
    """The float32 start of the global parameter `name`, drawn from a generator of its own.

    Norm weights are 1; biases, the last layers of a media Coda and of modulations by time 0; embeddings normal
    with std 0.5 (0.02 is drowned by the first layers: docs/LOG.md), but tables of n-grams and the detail of
    merged patches 0; `head` of text, router and trees, and what a tree's head makes of its header, 0.02; other
    matrices (the heads of shape buckets and of patch ends too) 1 / sqrt(fan in), those that write into the residual
    stream divided by sqrt(2 depth). Source: GPT-2, section 2.3, for the latter.
    """
    kind = name.rsplit(".", 1)[-1]
    if "norm" in name and kind == "weight":
        return torch.ones(shape)
    if kind == "bias" or any(part in name for part in ZEROS):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if "embedding" in name:
        std = EMBEDDING_STD
    else:
        std = HEAD_STD if ".head" in name else math.prod(shape[1:]) ** -0.5
    if name.endswith((".output.weight", ".down.weight")):
        std /= (2 * depth) ** 0.5
    return torch.randn(shape, generator=generator) * std
