"""The training door: `python -m matformer.train CONFIG [key=value ...]`, one process a rank."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import platform
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

import matformer
from matformer.config.check import check
from matformer.config.load import load_run
from matformer.config.schema import RunConfig
from matformer.data.loader import Loader
from matformer.data.statistics import with_statistics
from matformer.engine.average import Average
from matformer.engine.evaluate import HeldOut, evaluate_run
from matformer.engine.folder import RunFolder, State
from matformer.engine.gallery import make_gallery
from matformer.engine.loop import Run, agreed, build_host, build_model, due, num_parameters, train
from matformer.errors import MatformerError
from matformer.hosts.base import Host
from matformer.observe.progress import ProgressLine
from matformer.observe.sinks import MetricsFile, Sink, WandbSink, read_metrics
from matformer.parallel.process import settle

log = logging.getLogger("matformer.train")  # __name__ is __main__ when started as a door

STOPPED = 130  # what a shell shows for an interrupted program; the run goes on with the same command


class Stop:
    """Set by the first signal: the step in hand is finished and saved. A second Ctrl-C ends at once.

    Once `all_is_saved` was called, any signal ends at once: SystemExit(130).
    """

    def __init__(self) -> None:
        self.asked = self._saved = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._ask)

    def all_is_saved(self) -> None:
        """Nothing is left that a signal must wait for; one that came too late to be heard counts now."""
        self._saved = True
        if self.asked:
            self._leave("a signal")

    def _ask(self, number: int, _: object) -> None:
        name = signal.Signals(number).name
        if self._saved:
            self._leave(name)
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("%s: the step in hand is finished and saved, then the run stops", name)

    def _leave(self, name: str) -> NoReturn:
        log.warning("%s: all steps are saved; the same command finishes the run", name)
        raise SystemExit(STOPPED)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 finished, 130 stopped and saved, 3 ranks that do not agree, 2 said in another sentence."""
    parser = argparse.ArgumentParser(prog="matformer.train", description=__doc__)
    parser.add_argument("config", nargs="?", default="configs/run/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_args(arguments)
    if "=" in asked.config:
        asked.config, asked.overrides = "configs/run/demo.yaml", [asked.config, *asked.overrides]
    rank = int(os.environ.get("RANK", "0"))
    _log_to_stderr(rank)
    try:
        config = load_run(asked.config, asked.overrides)
        check(config)
        return _run(with_statistics(config), rank=rank)
    except MatformerError as error:
        log.error("%s", error)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        log.error("the disk must have room for the run's files, got: %s; free space or change run.folder", error)
        return 2


def _run(config: RunConfig, *, rank: int) -> int:
    folder = RunFolder.open(config) if rank == 0 else None
    try:
        if config.parallel.ranks == 1 and folder is not None and folder.state is State.FINISHED:
            return _finished_already(folder)
        settle(config.parallel.threads)
        host = build_host(config)
        state = agreed(folder.state if folder else None, host.groups)
        if state is State.FINISHED:
            return _finished_already(folder)
        path = Path(config.run.folder, config.name)
        stop = Stop()
        done = _train(config, host=host, path=path, folder=folder, stop=stop)
        _leave_world()
        if not done:
            log.info("saved; the same command goes on")
            return STOPPED
        stop.all_is_saved()
        if folder is not None:
            if config.run.report:
                _show_what_it_learned(path)
            folder.mark_finished()
            log.info("finished: %s", folder.report_file if config.run.report else path)
        return 0
    finally:
        if folder is not None:
            folder.close()


def _show_what_it_learned(path: Path) -> None:
    log.info("evaluating the averaged weights on held-out data, beside the baselines")
    evaluate_run(path, ema=True)
    log.info("making samples")
    make_gallery(path)
    from matformer.report import write_report  # takes a second to import, and a run that is stopped needs none of it

    write_report(path)


def _train(config: RunConfig, *, host: Host, path: Path, folder: RunFolder | None, stop: Stop) -> bool:
    groups = host.groups
    loader = Loader(config, dp_rank=groups.dp_rank, dp_size=groups.dp_size)
    build_model(host, config)
    run = Run(config, host, loader, Average(host, decay=config.train.ema_decay), path / "checkpoints")
    resumed = run.resume()
    if folder is not None:
        run.sinks = _sinks(config, folder, step=run.step)
        count = num_parameters(config)
        _write_machine(path / "machine.json", config, parameters=count)
        log.info("%s: %.2f M parameters, ranks: %d", path, count / 1e6, groups.world)
        log.info("goes on after step %d of %d" if resumed else "begins; step %d of %d", run.step, config.train.steps)
        run.owes_heldout = resumed and owes_heldout(folder.metrics_file, config, step=run.step)
    run.owes_heldout = agreed(run.owes_heldout, groups)
    with ExitStack() as closing:  # closes all of them, even if one fails
        for one in (loader, *run.sinks):
            closing.callback(one.close)
        return train(run, stopping=lambda: stop.asked, evaluate=HeldOut(config))


def _sinks(config: RunConfig, folder: RunFolder, *, step: int) -> list[Sink]:
    metrics = MetricsFile(folder.metrics_file)
    metrics.truncate_after(step)
    wandb = WandbSink(folder.path, name=config.name, config=config.model_dump(), mode=config.run.wandb)
    return [metrics, wandb, ProgressLine(config.train.steps, first_step=step)]


def owes_heldout(metrics: Path, config: RunConfig, *, step: int) -> bool:
    """Whether a step that was to be evaluated was not: a run that is stopped saves and leaves."""
    rows = (row for row in read_metrics(metrics) if row["step"] == step)
    asked = step == config.train.steps or due(step, config.eval.every_steps)
    return asked and not any(name.startswith("heldout") for row in rows for name in row)


def _finished_already(folder: RunFolder | None) -> int:
    if folder is not None:
        log.info("%s is finished; see %s, or choose another name", folder.path, folder.report_file)
    return 0


def _write_machine(path: Path, config: RunConfig, *, parameters: int) -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {
        "parameters": parameters,
        "host": platform.node(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "ranks": config.parallel.ranks,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matformer": matformer.__version__,
    }
    path.write_text(json.dumps(facts, indent=1))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _leave_world() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _log_to_stderr(rank: int) -> None:
    mark = "" if rank == 0 else f"[rank {rank}] "
    logging.basicConfig(level=logging.WARNING, format=f"{mark}%(message)s", stream=sys.stderr)
    logging.getLogger("matformer").setLevel(logging.INFO if rank == 0 else logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
