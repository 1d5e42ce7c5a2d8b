"""bfloat16 with float32 masters: gradients of many microbatches are added and reduced in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.made import tiny_run
from tests.parity.test_layouts import LAYERS, mixed_steps
from tests.ranks import cases
from tests.ranks.launcher import Ranks

World = Callable[[int], Ranks]
MICROBATCHES = 64
LIMIT = 1e-3  # of a tensor's largest entry


DEFAULTS: dict[str, dict[str, Any]] = {
    "": {},
    "DeepSpeed's own way to add": {"bf16": {"enabled": True}, "data_types": {}},
    "DeepSpeed's own way to reduce": {"communication_data_type": None},
}


@pytest.mark.parametrize("control", list(DEFAULTS))
def test_sixty_four_microbatches_are_added_in_float32(control: str, world: World) -> None:
    config = tiny_run(layers=LAYERS, dtype="bfloat16", train={"global_batch": 2 * MICROBATCHES})
    batches = [batch for step in mixed_steps() for batch in step]
    batches = (batches * -(-MICROBATCHES // len(batches)))[:MICROBATCHES]
    ((found, expected),) = world(1).run(cases.accumulate, config, batches, DEFAULTS[control], limit_seconds=180.0)
    worst = max(np.abs(found[name] - value).max() / np.abs(value).max() for name, value in expected.items())
    assert (worst > LIMIT) == bool(control), f"{worst:.2g}: a control must fail, or the test shows nothing"
