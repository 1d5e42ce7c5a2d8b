"""Learning rates and the average's decay, step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from matformer.config.schema import TrainConfig
from matformer.engine.average import Average
from matformer.engine.optim import learning_rate
from matformer.engine.step import optimizer_step
from tests.made import plain_host, text_only, tiny_run


def train(**keys: Any) -> TrainConfig:
    base = {"steps": 20, "global_batch": 1, "micro_batch": 1, "lr": 1.0, "warmup_steps": 4, "min_lr_ratio": 0.1}
    return TrainConfig.model_validate(base | keys)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warmup_is_linear_and_begins_above_zero(schedule: str) -> None:
    rates = [learning_rate(train(schedule=schedule), step) for step in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_falls_from_the_peak_to_the_floor() -> None:
    rates = [learning_rate(train(), step) for step in range(4, 21)]
    assert rates[0] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert rates[8] == pytest.approx(0.55)  # half way
    assert all(later < earlier for earlier, later in zip(rates, rates[1:], strict=False))
    assert learning_rate(train(), 1000) == pytest.approx(0.1)


def test_wsd_stays_and_then_falls_by_a_root() -> None:
    config = train(schedule="wsd", decay_fraction=0.25)  # the last five steps
    assert [learning_rate(config, step) for step in range(4, 16)] == [1.0] * 12
    falling = [learning_rate(config, step) for step in range(16, 21)]
    assert falling == pytest.approx([0.1 + 0.9 * (1 - math.sqrt(done / 5)) for done in range(1, 6)])
    assert learning_rate(config, 1000) == pytest.approx(0.1)


def test_no_warmup_begins_at_the_peak() -> None:
    assert learning_rate(train(warmup_steps=0), 0) == 1.0


def test_warmup_longer_than_the_run_never_divides_by_zero() -> None:
    assert learning_rate(train(warmup_steps=30), 25) == pytest.approx(26 / 30)
    assert learning_rate(train(warmup_steps=20), 20) == pytest.approx(1.0)


def test_the_rate_of_a_step_reaches_the_optimizer() -> None:
    host = plain_host(tiny_run(train={"warmup_steps": 4}))
    numbers = optimizer_step(host, [text_only(1)], config=host.config, step=1)
    assert numbers.lr == pytest.approx(1.5e-3)
    assert {group["lr"] for group in host.optimizer.param_groups} == {numbers.lr}


def test_the_average_follows_early_and_slows_to_its_decay() -> None:
    host = plain_host(tiny_run())
    average = Average(host, decay=0.5)
    name, weight = next(iter(host.local_weights()))
    expected = weight.clone()
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (30, 0.5)):
        weight.add_(1.0)
        expected = decay * expected + (1 - decay) * weight
        average.update(step)
        torch.testing.assert_close(average.values[name], expected)


def test_swapping_the_average_in_and_out_leaves_every_weight_as_it_was() -> None:
    host = plain_host(tiny_run())
    average = Average(host, decay=0.9)
    before = {name: weight.clone() for name, weight in host.local_weights()}
    for _, weight in host.local_weights():
        weight.add_(1.0)
    with average.swapped_in():
        assert all(torch.equal(weight, before[name]) for name, weight in host.local_weights())
    assert all(torch.equal(weight, before[name] + 1.0) for name, weight in host.local_weights())
