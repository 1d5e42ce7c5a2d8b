"""Several ranks on this machine: gloo on CPU, started by forkserver, with a limit on every task.

The processes stay for some tasks, so that a case costs its arithmetic and not its start; not for all, because a task
leaves groups behind, whose gloo threads poll: after fifty tasks two idle ranks took a whole core. Whatever goes wrong
on one rank, or hangs on any, ends in a failure that shows every rank's traceback.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = ["tests.ranks.cases"]
TASKS_OF_A_LIFE = 4


class RanksFailed(AssertionError):
    """A task raised on some rank, or ran past its limit."""


class Ranks:
    """`world_size` processes that form one world. Use as a context."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self.tasks = 0
        self.stacks = Path(tempfile.mkdtemp(prefix="ranks-"))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, task: Callable[..., Any], *arguments: Any, limit_seconds: float = 60.0) -> list[Any]:
        """task(*arguments) on every rank; the results by rank. Raises RanksFailed with the tracebacks."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((task, arguments))
        results, failures = self._collect(time.monotonic() + limit_seconds)
        missing = [rank for rank in range(self.world_size) if rank not in results and rank not in failures]
        if missing or failures:
            failures |= {rank: f"still running:\n{self._stack(rank)}" for rank in missing}
            self.close()
            shown = "\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(failures.items()))
            raise RanksFailed(f"{task.__name__} failed or took more than {limit_seconds} s\n{shown}")
        self.tasks += 1
        if self.tasks % TASKS_OF_A_LIFE == 0:
            self.close()
        return [results[rank] for rank in range(self.world_size)]

    def _collect(self, deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        open_pipes = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while open_pipes and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(open_pipes), timeout=left):
                rank = open_pipes.pop(pipe)  # pyright: ignore
                try:
                    good, value = pipe.recv()  # pyright: ignore
                except EOFError:
                    good, value = False, "the process died"
                (results if good else failures)[rank] = value
            if failures:  # the others may wait for the failed rank for ever: they get a moment, no more
                deadline = min(deadline, time.monotonic() + 2.0)
        return results, failures

    def _start(self) -> None:
        port = _free_port()
        for rank in range(self.world_size):
            ours, theirs = self.context.Pipe()
            process = self.context.Process(
                target=_serve, args=(rank, self.world_size, port, theirs, self._file(rank)), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def _file(self, rank: int) -> Path:
        return self.stacks / f"rank{rank}.txt"

    def _stack(self, rank: int) -> str:
        """Where a rank hangs, asked by signal."""
        process = self.processes[rank]
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.2)
        return self._file(rank).read_text() if self._file(rank).exists() else "no stack"

    def close(self) -> None:
        """End all processes; the next task starts new ones."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _serve(rank: int, world_size: int, port: int, pipe: Connection, stacks: Path) -> None:
    """A rank's life: one task after the other, until the pipe closes."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with stacks.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        while True:
            try:
                task, arguments = pipe.recv()
            except EOFError:
                return
            try:
                answer = (True, task(*arguments))
            except BaseException:  # noqa: BLE001 - whatever it is, the test shows it
                answer = (False, traceback.format_exc())
            pipe.send(answer)
