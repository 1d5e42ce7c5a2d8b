"""Rates are of a step, totals add up, and a resume goes on with the totals."""

from __future__ import annotations

import json

from matformer.observe.meters import Throughput


def test_rates_are_of_the_step_and_totals_of_the_run() -> None:
    meter = Throughput()
    meter.step(2.0, bytes=100, latents=10)
    row = meter.step(0.5, bytes=100, latents=20)
    assert row["bytes_per_second"] == 200 and row["latents_per_second"] == 40
    assert row["bytes_seen"] == 200 and row["latents_seen"] == 30 and row["seconds"] == 2.5


def test_totals_go_on_after_a_resume() -> None:
    whole, first, second = Throughput(), Throughput(), Throughput()
    whole.step(1.0, bytes=7)
    first.step(1.0, bytes=7)
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.step(3.0, bytes=5) == whole.step(3.0, bytes=5)
