"""Does any layout give the run of one rank? Random small models under random layouts of CPU ranks.

    python tools/parity_fuzz.py [--trials 20] [--seed 0] [--ranks 8]

A trial trains three steps in plain PyTorch and under a layout, and compares losses, gradient norms on all ranks, every
parameter's gradient (under AdamW) and every weight. Exit code 0, or 1 with a line for each trial that differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np

from tests.ranks import cases
from tests.ranks.cases import Arrays, Trained
from tests.ranks.fuzz import Trial, draw_trial, one_rank
from tests.ranks.launcher import Ranks, RanksFailed
from tests.tolerances import GRADIENT, LOSS, WEIGHT

LIMIT_SECONDS = 300.0
FLOOR = 1e-7  # of gradients that are zero in theory: sums that cancel leave rounding


def differences(ranks: Sequence[Trained], plain: Trained) -> list[str]:
    """What is not as on one rank, a line each."""
    found = []
    for number, trained in enumerate(ranks):
        for what, limit in (("losses", LOSS), ("norms", LOSS)):
            ours, theirs = np.array(getattr(trained, what)), np.array(getattr(plain, what))
            if not np.allclose(ours, theirs, rtol=limit, atol=0.0):
                found.append(f"{what} on rank {number}: {ours} where one rank has {theirs}")
    found += _apart("gradient", [trained.gradients for trained in ranks], plain.gradients, GRADIENT)
    return found + _apart("weight", [trained.weights for trained in ranks], plain.weights, WEIGHT)


def _apart(kind: str, held: Sequence[Arrays], expected: Arrays, limit: float) -> list[str]:
    names = sorted(name for one in held for name in one)
    if names != sorted(expected):
        return [f"every {kind} must be there once, got {len(names)} of {len(expected)}"]
    found = []
    for name, value in ((name, value) for one in held for name, value in one.items()):
        difference, largest = np.abs(value - expected[name]).max(), np.abs(expected[name]).max()
        if difference > limit * largest + FLOOR * (kind == "gradient"):
            found.append(f"{kind} of {name}: {difference:.2g} apart, largest {largest:.2g}")
    return found


def attempt(trial: Trial) -> list[str]:
    """The differences of one trial; a rank that fails or hangs is one."""
    plain = cases.train_plain(one_rank(trial.config), trial.steps)
    with Ranks(trial.config.parallel.ranks) as ranks:
        try:
            trained = ranks.run(cases.train_ranks, trial.config, trial.steps, limit_seconds=LIMIT_SECONDS)
        except RanksFailed as error:
            return [str(error)]
    return differences(trained, plain)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 if every trial is as on one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=8, help="most ranks of a layout")
    asked = parser.parse_args(arguments)
    start, failed = time.monotonic(), 0
    for number in range(asked.trials):
        trial = draw_trial(asked.seed, number, most_ranks=asked.ranks)
        found = attempt(trial)
        failed += bool(found)
        sys.stdout.write(f"{number}: {'differs' if found else 'same'}  {trial.words}\n")
        sys.stdout.write("".join(f"    {line}\n" for line in found))
        sys.stdout.flush()
    seconds = time.monotonic() - start
    sys.stdout.write(
        f"{asked.trials - failed} of {asked.trials} layouts as one rank, seed {asked.seed}, {seconds:.0f} s\n"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
