"""A few drawn models under drawn layouts are the run of one rank; `tools/parity_fuzz.py` tries as many as you like."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.ranks import cases
from tests.ranks.cases import Trained
from tests.ranks.fuzz import STEPS, draw_trial, one_rank
from tests.ranks.launcher import Ranks
from tests.tolerances import DOUBLE_GRADIENT
from tools.parity_fuzz import differences

World = Callable[[int], Ranks]
SEED = 0


@pytest.mark.parametrize("trial", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))])
def test_a_drawn_layout_is_one_rank(trial: int, world: World) -> None:
    drawn = draw_trial(SEED, trial, most_ranks=4)
    plain = cases.train_plain(one_rank(drawn.config), drawn.steps)
    trained = world(drawn.config.parallel.ranks).run(cases.train_ranks, drawn.config, drawn.steps, limit_seconds=120.0)
    assert differences(trained, plain) == [], drawn.words


def test_a_difference_is_told() -> None:
    plain = Trained([1.0] * STEPS, [2.0] * STEPS, {"a": np.ones(3)}, {"a": np.ones(3)})
    assert differences([plain], plain) == []
    other = Trained([1.0] * STEPS, [2.0] * STEPS, {"a": np.ones(3) + 2e-5}, {"a": np.ones(3)})
    assert len(differences([other], plain)) == 1 and "gradient of a" in differences([other], plain)[0]
    assert any("must be there" in one for one in differences([Trained([1.0] * 3, [2.0] * 3, {}, {})], plain))


@pytest.mark.parametrize(
    "name", ["tp2 pp2 sequence parallel", "tp2 dp2", "pp2 interleaved", "tp2 cp2 sequence parallel"]
)
def test_in_float64_without_deepspeed_every_gradient_is_that_of_one_rank(name: str, world: World) -> None:
    from tests.parity.test_layouts import mixed_steps, run_of

    config = run_of(name)
    expected = cases.double_plain(one_rank(config), mixed_steps()[0])
    found = world(config.parallel.ranks).run(cases.double_gradients, config, mixed_steps()[0])
    assert sorted(key for one in found for key in one) == sorted(expected)
    for one in found:
        for key, gradient in one.items():
            limit = DOUBLE_GRADIENT * np.abs(expected[key]).max()
            assert np.abs(gradient - expected[key]).max() <= limit, key
