"""Text: cross-entropy in nats, of symbols or of a vocabulary's pieces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from matformer.layers.precision import at_least_float32
from matformer.shapes import END


def symbol_nats(logits_UV: Float[Tensor, "U V"], target_U: Int[Tensor, " U"]) -> Float[Tensor, " U"]:
    """-ln p(symbol or piece), one number each, in float32. Bits per byte = sum / (ln 2 * raw bytes)."""
    return F.cross_entropy(at_least_float32(logits_UV), target_U, reduction="none")


def end_nats(
    logits_UV: Float[Tensor, "U V"], symbol_U: Int[Tensor, " U"], patch_U: Int[Tensor, " U"]
) -> Float[Tensor, " U"]:
    """-ln p(the patch ends here or does not), given the symbol; `<end>` always ends it and costs nothing.

    A patch ends where the next symbol belongs to another one.
    """
    logit_U = at_least_float32(logits_UV).gather(1, symbol_U[:, None])[:, 0]
    ends_U = F.pad(patch_U[1:] != patch_U[:-1], (0, min(1, patch_U.numel())), value=True)
    nats_U = F.binary_cross_entropy_with_logits(logit_U, ends_U.to(logit_U.dtype), reduction="none")
    return torch.where(symbol_U == END, 0.0, nats_U)
