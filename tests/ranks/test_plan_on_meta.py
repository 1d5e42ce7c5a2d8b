"""Parameters a rank, as planned, against the real host's stages of the large models."""

from __future__ import annotations

from pathlib import Path

import pytest

from matformer.config.check import check
from matformer.config.load import load_run
from matformer.parallel.memory import parameters_of_stage, stages
from matformer.parallel.plan import Plan
from tests.ranks.fake import parameters_on_meta
from tests.ranks.launcher import Ranks

CONFIGS = Path(__file__).parents[2] / "configs" / "run"


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("8b", {"tp": 8, "pp": 4, "dp": 2, "sequence_parallel": "true"}),
        ("1b", {"tp": 2, "pp": 1, "dp": 64, "sequence_parallel": "true"}),
        ("1b", {"pp": 4, "virtual_stages": 2, "stage_layers": "[2,3,3,3,3,3,3,4]"}),
        ("1b", {"tp": 1, "pp": 8, "dp": 1, "model.media.image.time_conditioning": "adaln_atto"}),
    ],
)
def test_stages_of_large_models_hold_what_the_plan_says(name: str, degrees: dict[str, object]) -> None:
    overrides = [f"{key if '.' in key else f'parallel.{key}'}={value}" for key, value in degrees.items()]
    config = load_run(CONFIGS / f"{name}.yaml", overrides)
    check(config)
    parallel = config.parallel
    plan = Plan(tp=parallel.tp, cp=parallel.cp, pp=parallel.pp, dp=parallel.dp)
    firsts = tuple(plan.rank_at(tp=parallel.tp - 1, pp=pp) for pp in range(parallel.pp))
    with Ranks(1) as ranks:
        (found,) = ranks.run(parameters_on_meta, config, firsts, limit_seconds=120.0)
    assert found == [parameters_of_stage(config.model, stage, tp=parallel.tp) for stage in stages(config)]
