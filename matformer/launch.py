"""The launcher: `python -m matformer.launch [torchrun's options] -m MODULE ...` starts this machine's ranks.

torchrun alone shows a traceback of its own and leaves with 1, whatever the ranks said; here the exit code is theirs.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api as launcher
from torch.distributed.run import main as torchrun

from matformer.parallel.process import share_of_cores

STOPPED = 130
SAID = (2, 3)  # exit codes of ranks that have said why in a sentence of their own


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 finished, 130 stopped and saved by all ranks, else that of the ranks that failed.

    2 before any rank is started where this machine has fewer GPUs than ranks.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    ranks = _local_ranks(arguments)
    if ranks is not None:
        gpus = torch.cuda.device_count()
        if 0 < gpus < ranks:
            sys.stderr.write(
                f"a machine must have a GPU for each of its ranks, got {gpus} for {ranks}; change parallel.* or the "
                "number of nodes, or set CUDA_VISIBLE_DEVICES= to run without GPUs\n"
            )
            return 2
        # torchrun would say one thread; OpenMP asked for more later spins beside other work
        os.environ.setdefault("OMP_NUM_THREADS", str(share_of_cores(ranks)))
    for name in ("multiprocessing.api", "multiprocessing.errors.error_handler", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)  # we say it in a sentence
    codes: dict[int, int | None] = {}
    try:
        with _remembered(codes):
            torchrun(arguments)
    except SignalException as error:  # given on to the ranks, and waited for
        if not codes:
            sys.stderr.write(f"ranks must be started, but {error.sigval.name} came before; start again\n")
            return 1
        return _code(dict(sorted(codes.items(), key=lambda one: (one[1] is None or one[1] < 0, one[0]))))
    except ChildFailedError as error:
        in_time = sorted(error.failures.items(), key=lambda one: one[1].timestamp)
        return _code({rank: failure.exitcode for rank, failure in in_time})
    return 0


@contextmanager
def _remembered(codes: dict[int, int | None]) -> Iterator[None]:
    """Inside, torchrun's agent writes down how its ranks ended, also after a signal: it tells nobody then."""

    class Agent(LocalElasticAgent):
        def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
            try:
                super()._shutdown(death_sig, timeout)
            finally:  # another signal may have cut it short
                if isinstance(self._pcontext, SubprocessContext):
                    for local, handler in self._pcontext.subprocess_handlers.items():
                        codes[self._worker_group.workers[local].global_rank] = handler.proc.poll()

    taken, launcher.LocalElasticAgent = launcher.LocalElasticAgent, Agent  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        launcher.LocalElasticAgent = taken  # pyright: ignore[reportPrivateImportUsage]


def _local_ranks(arguments: Sequence[str]) -> int | None:
    """How many ranks this machine is to start, where the arguments say so."""
    found = (re.fullmatch(r"--nproc-per-node=(\d+)", one) for one in arguments)
    return next((int(one[1]) for one in found if one), None)


def _code(codes: Mapping[int, int | None]) -> int:
    """One exit code for all ranks, in order of blame (None: not ended): one that said why counts before all others."""
    for code in SAID:
        if code in codes.values():
            return code
    failed = {rank: code for rank, code in codes.items() if code not in (0, STOPPED)}
    if not failed:
        return STOPPED if STOPPED in codes.values() else 0
    rank, code = next(iter(failed.items()))
    sys.stderr.write(
        f"every rank must end well, but rank {rank} {_how(code)}; start again to go on from the last checkpoint\n"
    )
    shown = 1 if code is None else 128 - code if code < 0 else code
    return 1 if shown == STOPPED else shown  # SIGINT's number says that all have saved


def _how(code: int | None) -> str:
    if code is None:
        return "had not ended when a signal came again"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


if __name__ == "__main__":
    sys.exit(main())
