"""Sums over runs of rows.

`index_select` and `index_add` rather than indexing: on CPU their order is fixed, so a run repeats bit for bit, while
the backward of `x[index]` adds atomically in any order.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matformer.layers.precision import at_least_float32


def segment_lengths(segment_U: Int[Tensor, " U"], *, num_segments: int) -> Int[Tensor, " segments"]:
    """Rows of each segment. Not `bincount`, which on a GPU asks the host how long its answer is."""
    one_U = torch.ones_like(segment_U)
    return segment_U.new_zeros(num_segments).index_add(0, segment_U, one_U)


def segment_firsts(segment_U: Int[Tensor, " U"], *, num_segments: int) -> Int[Tensor, " segments"]:
    """The first row of each segment; segments are runs in ascending order."""
    length = segment_lengths(segment_U, num_segments=num_segments)
    return length.cumsum(0) - length


def segment_sum(x_U: Float[Tensor, "U ..."], segment_U: Int[Tensor, " U"], *, num_segments: int) -> Tensor:
    """`[num_segments, ...]`: the sum of each segment's rows; an empty segment gives zeros."""
    return x_U.new_zeros(num_segments, *x_U.shape[1:]).index_add(0, segment_U, x_U)


def segment_mean(x_U: Float[Tensor, "U ..."], segment_U: Int[Tensor, " U"], *, num_segments: int) -> Tensor:
    """`[num_segments, ...]`: the mean of each segment's rows; an empty segment gives zeros."""
    length = segment_lengths(segment_U, num_segments=num_segments).clamp(min=1).to(x_U.dtype)
    return segment_sum(x_U, segment_U, num_segments=num_segments) / length.view(-1, *[1] * (x_U.dim() - 1))


def segment_max(x_U: Float[Tensor, "U ..."], segment_U: Int[Tensor, " U"], *, num_segments: int) -> Tensor:
    """`[num_segments, ...]`: the largest of each segment's rows; segments are runs, none of them empty."""
    if x_U.numel() == 0:
        return segment_sum(x_U, segment_U, num_segments=num_segments)
    length = segment_lengths(segment_U, num_segments=num_segments)
    return torch.segment_reduce(x_U, "max", lengths=length, axis=0, unsafe=True)


def segment_softmax_sum(
    score_U: Float[Tensor, "U ..."],
    value_U: Float[Tensor, "U ... K"],
    segment_U: Int[Tensor, " U"],
    *,
    num_segments: int,
) -> Float[Tensor, "segments ... K"]:
    """Softmax of the scores inside each segment, then the weighted sum of the values: attention without padding."""
    score = at_least_float32(score_U)
    top = score.detach().new_full((num_segments, *score.shape[1:]), -torch.inf)
    index = segment_U.view(-1, *[1] * (score.dim() - 1)).expand_as(score)
    top = top.scatter_reduce(0, index, score.detach(), "amax")
    weight = (score - top.index_select(0, segment_U)).exp()
    total = segment_sum(weight, segment_U, num_segments=num_segments)
    summed = segment_sum(weight.unsqueeze(-1) * at_least_float32(value_U), segment_U, num_segments=num_segments)
    return (summed / total.clamp(min=1e-30).unsqueeze(-1)).to(value_U.dtype)
