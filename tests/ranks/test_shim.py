"""The CPU shim answers megatron's questions to CUDA; no torch call of a forward passes through it."""

from __future__ import annotations

from tests.ranks import shim
from tests.ranks.launcher import Ranks


def test_no_shim_stands_on_the_torch_calls_of_a_step() -> None:
    with Ranks(1) as ranks:
        (seen,) = ranks.run(shim.seen_in_a_step)
    assert seen["modules"] > 50 and seen["modes"] == 0
    assert seen["shim in the forward"] == 0
    assert 0 < seen["shim elsewhere"] <= 4 * 2, "some look-ups of megatron's schedule a microbatch"
    assert seen["modules with another torch"] == ["megatron.core.pipeline_parallel.schedules"]
    assert seen["torch"] == seen["functional"] == seen["Tensor"] == []
    assert seen["cuda"] == ["current_device", "get_rng_state", "set_rng_state", "synchronize"]


def test_a_mode_on_every_torch_call_would_be_seen() -> None:
    with Ranks(1) as ranks:
        (seen,) = ranks.run(shim.seen_with_a_mode)
    assert seen["modes"] == 1


def test_a_replaced_function_would_be_seen() -> None:
    class Shimmed:
        def add(self) -> None: ...

    assert shim.replaced(Shimmed) == {"add"}
