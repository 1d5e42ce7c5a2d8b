"""How even the work of data-parallel ranks is: most FLOPs of a rank over their mean, dealt out and by turns.

python tools/bench/balance.py [--config configs/run/demo.yaml] [--ranks 8] [--rows 64] [--steps 20] [--json]

Every rank's loader runs in this process. FLOPs are counted on the packed batches, not those that rows were dealt by.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from common import finish
from rich.table import Table

from matformer.config.load import load_run
from matformer.data.counts import counts_of
from matformer.data.loader import Loader
from matformer.parallel.flops import batch_flops


def measure(config_file: str, *, ranks: int, rows: int, steps: int, together: int) -> dict[str, float]:
    """The median and the worst step; CPU seconds of a rank's loader a step."""
    keys = {"data.lanes": rows, "train.global_batch": rows, "train.micro_batch": max(1, rows // ranks // 2)}
    keys |= {"parallel.dp": ranks, "parallel.balance_ranks": together}
    config = load_run(config_file, [f"{key}={value}" for key, value in keys.items()])
    loaders = [Loader(config, dp_rank=rank, dp_size=ranks, prefetch=False) for rank in range(ranks)]
    found, seconds = [], 0.0
    for step in range(steps):
        began = time.process_time()
        batches = [loader.next_global_batch(step) for loader in loaders]
        seconds += time.process_time() - began
        flops = [sum(batch_flops(config.model, counts_of(one, config.model)) for one in each) for each in batches]
        found.append(max(flops) / statistics.mean(flops))
    return {"median": statistics.median(found), "worst": max(found), "loader_cpu_s": seconds / steps / ranks}


def main() -> int:
    """Prints a table; with --json one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/run/demo.yaml")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64, help="sequences of a global batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    table = Table("rows", "median", "worst", "loader, CPU s a step")
    result: dict[str, object] = {"ranks": asked.ranks, "rows": asked.rows, "steps": asked.steps}
    for name, together in (("by turns", 1), ("dealt out", asked.ranks)):
        found = measure(asked.config, ranks=asked.ranks, rows=asked.rows, steps=asked.steps, together=together)
        result[name] = found
        table.add_row(name, f"{found['median']:.3f}", f"{found['worst']:.3f}", f"{found['loader_cpu_s']:.3f}")
    return finish(table, result, as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
