"""What training steps leave behind, through megatron's schedule and DeepSpeed's optimizer, on a rank of its own."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))  # tools are scripts, not a package

from growth import grown

from matformer.engine.step import optimizer_step
from tests.made import mixed_documents, one_a_row, tiny_run
from tests.ranks.cases import hosted

STEPS = 20


def grown_in_training(dtype: str) -> dict[str, float]:
    """A step's growth."""
    config = tiny_run(train={"global_batch": 4}, dtype=dtype)
    documents = mixed_documents()
    batches = [one_a_row(documents[:2]), one_a_row(documents[2:4])]
    with hosted(config) as host:
        steps = itertools.count()
        return grown(lambda: optimizer_step(host, batches, config=config, step=next(steps)), steps=STEPS)
