"""Expected FLOPs and traffic of a step against what a rank multiplies and sends, with and without recompute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from matformer.config.schema import Recompute, RunConfig
from matformer.data.counts import counts_of
from matformer.parallel.flops import batch_flops, flops_again
from matformer.parallel.step_time import traffic
from matformer.parcels import Batch
from tests.ranks.flops import step_of
from tests.ranks.launcher import Ranks
from tests.ranks.test_memory import batches_of, run_of

EXCHANGES: list[tuple[Recompute, int]] = [("none", 1), ("none", 4), ("selective", 2), ("full", 1)]
"""(recompute, key/value heads): of one head, two ranks get a copy each."""


@pytest.fixture(scope="module")
def one() -> Iterator[Ranks]:
    with Ranks(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def expected_flops(run: RunConfig, batches: list[Batch]) -> int:
    counts = [counts_of(batch, run.model) for batch in batches]
    once = sum(batch_flops(run.model, one, attended="computed") for one in counts)
    return once + sum(flops_again(run.model, one, run.parallel.recompute, attended="computed") for one in counts)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_multiplies_what_is_expected(recompute: Recompute, one: Ranks) -> None:
    run = run_of(recompute=recompute)
    batches = batches_of(run)
    (done,) = one.run(step_of, run, batches, limit_seconds=120.0)
    assert done.flops == expected_flops(run, batches)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_step_sends_what_is_expected(recompute: Recompute, sequence_parallel: bool, two: Ranks) -> None:
    run = run_of(tp=2, sequence_parallel=sequence_parallel, recompute=recompute)
    batches = batches_of(run)
    first, second = two.run(step_of, run, batches, limit_seconds=120.0)
    layers = traffic(run, counts_of(batches[0], run.model)).tensor
    stream = run.data.sequence_latents * run.model.atto.width * 4
    # without sequence parallelism one gather each way where a rank's shares enter the layers and leave them
    assert first.summed == second.summed == layers + (0 if sequence_parallel else len(batches) * 2 * stream // 2)
    assert first.exchanged == second.exchanged == 0


@pytest.mark.parametrize(
    ("recompute", "kv_heads"),
    [("none", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in EXCHANGES)],
)
def test_context_ranks_exchange_what_is_expected(recompute: Recompute, kv_heads: int, two: Ranks) -> None:
    run = run_of(cp=2, recompute=recompute)
    model = run.model.model_copy(update={"atto": run.model.atto.model_copy(update={"kv_heads": kv_heads})})
    run, batches = run.model_copy(update={"model": model}), batches_of(run)
    first, second = two.run(step_of, run, batches, limit_seconds=120.0)
    assert first.exchanged == second.exchanged == traffic(run, counts_of(batches[0], model)).context
    assert first.summed == second.summed == 0
    for rank in (first, second):  # units of small encoders are dealt out whole
        assert rank.flops == pytest.approx(expected_flops(run, batches) / 2, rel=0.005)
