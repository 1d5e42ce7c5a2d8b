"""Expected FLOPs and traffic of a step against what a rank multiplies and sends, with and without recompute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from matformer.config.schema import Recompute
from matformer.data.counts import counts_of
from matformer.parallel.flops import batch_flops, flops_again
from matformer.parallel.step_time import traffic
from tests.ranks.flops import step_of
from tests.ranks.launcher import Ranks
from tests.ranks.test_memory import batches_of, run_of


@pytest.fixture(scope="module")
def one() -> Iterator[Ranks]:
    with Ranks(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_multiplies_what_is_expected(recompute: Recompute, one: Ranks) -> None:
    run = run_of(recompute=recompute)
    batches = batches_of(run)
    expected = 0
    for batch in batches:
        counts = counts_of(batch, run.model)
        expected += batch_flops(run.model, counts, attended="computed")
        expected += flops_again(run.model, counts, recompute, attended="computed")
    ((flops, _),) = one.run(step_of, run, batches, limit_seconds=120.0)
    assert flops == expected


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_step_sends_what_is_expected(recompute: Recompute, sequence_parallel: bool, two: Ranks) -> None:
    run = run_of(tp=2, sequence_parallel=sequence_parallel, recompute=recompute)
    batches = batches_of(run)
    (_, first), (_, second) = two.run(step_of, run, batches, limit_seconds=120.0)
    layers = traffic(run, counts_of(batches[0], run.model)).tensor
    stream = run.data.sequence_latents * run.model.atto.width * 4
    # without sequence parallelism one gather each way where a rank's shares enter the layers and leave them
    assert first == second == layers + (0 if sequence_parallel else len(batches) * 2 * stream // 2)
