"""Router: cross-entropy of the next kind and, where it is media, of its shape bucket and of its tree."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def kind_nats(logits_RM: Float[Tensor, "R M2"], target_R: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    """-ln p(kind), one number a question; where one answer alone is legal this is 0."""
    return F.cross_entropy(logits_RM, target_R, reduction="none")


def bucket_nats(
    logits_RN: Float[Tensor, "R buckets"], bucket_R: Int[Tensor, " R"], here_R: Bool[Tensor, " R"]
) -> Float[Tensor, " R"]:
    """-ln p(bucket) where `here`, else 0."""
    return F.cross_entropy(logits_RN, bucket_R, reduction="none") * here_R


def split_nats(logit_K: Float[Tensor, " K"], split_K: Bool[Tensor, " K"]) -> Float[Tensor, " K"]:
    """-ln p(the block is split or not). Of a whole tree an upper bound: that its leaves fill the budget is known."""
    return F.binary_cross_entropy_with_logits(logit_K, split_K.to(logit_K.dtype), reduction="none")
