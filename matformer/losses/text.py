"""Text: cross-entropy in nats."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from matformer.layers.precision import at_least_float32


def symbol_nats(logits_UV: Float[Tensor, "U V"], target_U: Int[Tensor, " U"]) -> Float[Tensor, " U"]:
    """-ln p(symbol), one number a symbol, in float32. Bits per byte = sum / (ln 2 * raw bytes)."""
    return F.cross_entropy(at_least_float32(logits_UV), target_U, reduction="none")
