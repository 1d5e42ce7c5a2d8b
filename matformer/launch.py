"""The launcher: `python -m matformer.launch [torchrun's options] -m MODULE ...` starts this machine's ranks.

torchrun alone shows a traceback of its own and leaves with 1, whatever the ranks said; here the exit code is theirs.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from matformer.parallel.process import share_of_cores

STOPPED = 130
SAID = (2, 3, STOPPED)  # exit codes of ranks that have said why in a sentence of their own


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 finished, 130 stopped and saved, else that of the ranks that failed."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _share_cores(arguments)
    for name in ("multiprocessing.api", "multiprocessing.errors.error_handler", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)  # we say it in a sentence
    try:
        torchrun(arguments)
    except SignalException:  # given on to the ranks, and waited for
        return STOPPED
    except ChildFailedError as error:
        return _code({rank: failure.exitcode for rank, failure in error.failures.items()}, first=error)
    return 0


def _share_cores(arguments: Sequence[str]) -> None:
    """Ranks share the cores out. torchrun would say one thread; OpenMP asked for more later spins beside other work."""
    ranks = [int(found[1]) for one in arguments if (found := re.fullmatch(r"--nproc-per-node=(\d+)", one))]
    if ranks:
        os.environ.setdefault("OMP_NUM_THREADS", str(share_of_cores(ranks[0])))


def _code(codes: dict[int, int], *, first: ChildFailedError) -> int:
    """One exit code for all ranks: a rank that said why counts more than those that its end took along."""
    said = [code for code in codes.values() if code in SAID]
    if said:
        return said[0]
    rank, failure = first.get_first_failure()
    code = failure.exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    sys.stderr.write(
        f"every rank must end well, but rank {rank} {how}; start again to go on from the last checkpoint\n"
    )
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
