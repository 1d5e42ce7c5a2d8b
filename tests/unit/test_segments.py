"""Sums and softmax over runs of rows, against the same on each run alone."""

from __future__ import annotations

import pytest
import torch

from matformer.layers.segments import segment_max, segment_mean, segment_softmax_sum, segment_sum
from tests.tolerances import SAME_SUM

SEGMENT = torch.tensor([0, 0, 0, 2, 2, 3])  # 1 is empty


def test_sum_and_mean_of_an_empty_segment_are_zero() -> None:
    x = torch.tensor([[1.0], [2.0], [6.0], [4.0], [5.0], [7.0]])
    assert segment_sum(x, SEGMENT, num_segments=4).tolist() == [[9.0], [0.0], [9.0], [7.0]]
    assert segment_mean(x, SEGMENT, num_segments=4).tolist() == [[3.0], [0.0], [4.5], [7.0]]
    assert segment_sum(x[:0], SEGMENT[:0], num_segments=2).tolist() == [[0.0], [0.0]]


def test_max_and_its_gradient() -> None:
    x = torch.tensor([[1.0, 9.0], [2.0, 3.0], [-4.0, -5.0]], requires_grad=True)
    found = segment_max(x, torch.tensor([0, 0, 1]), num_segments=2)
    assert found.tolist() == [[2.0, 9.0], [-4.0, -5.0]]
    found.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    assert segment_max(x[:0], torch.zeros(0, dtype=torch.long), num_segments=0).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_softmax_is_torch_softmax_of_each_segment(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    score = (30 * torch.randn(6, 2, 3, dtype=dtype)).requires_grad_()
    value = torch.randn(6, 2, 3, 4, dtype=dtype).requires_grad_()
    got = segment_softmax_sum(score, value, SEGMENT, num_segments=4)
    expected = torch.stack(
        [
            (score[SEGMENT == i].softmax(0).unsqueeze(-1) * value[SEGMENT == i]).sum(
                0
            )  # an empty one: a sum of nothing
            for i in range(4)
        ]
    )
    torch.testing.assert_close(got, expected, rtol=SAME_SUM[dtype], atol=SAME_SUM[dtype])
    weight = torch.randn_like(got)
    seen, wanted = (torch.autograd.grad((x * weight).sum(), (score, value)) for x in (got, expected))
    for ours, theirs in zip(seen, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=SAME_SUM[dtype], atol=10 * SAME_SUM[dtype])


def test_scores_of_one_segment_may_be_far_above_those_of_another() -> None:
    score = torch.tensor([[500.0], [499.0], [-500.0], [-501.0]])
    got = segment_softmax_sum(score, torch.ones(4, 1, 1), torch.tensor([0, 0, 1, 1]), num_segments=2)
    assert got.flatten().tolist() == [1.0, 1.0]


def test_no_rows_give_zeros_and_a_gradient() -> None:
    value = torch.zeros(0, 1, 2, requires_grad=True)
    got = segment_softmax_sum(torch.zeros(0, 1), value, SEGMENT[:0], num_segments=2)
    assert got.tolist() == [[[0.0, 0.0]], [[0.0, 0.0]]]
    got.sum().backward()
    assert value.grad is not None
