"""A trained model out of its run folder, on one plain rank: what sampling and the door of evaluation start from."""

from __future__ import annotations

import logging
from pathlib import Path

from matformer.checkpoint.store import Checkpoint, newest_good, step_of
from matformer.config.load import load_run
from matformer.config.schema import ParallelConfig, RunConfig
from matformer.engine.folder import RunFolder, State
from matformer.errors import CheckpointError, ConfigError
from matformer.hosts.plain import PlainHost
from matformer.model import Matformer

log = logging.getLogger(__name__)


def load_for_inference(run_folder: Path, *, ema: bool) -> tuple[RunConfig, PlainHost, Matformer]:
    """The newest good checkpoint of a run, its weights or their average, without moments; `host.steps` is its step.

    The config is the run's own with `parallel` set to one plain rank. Takes no lock: a run may be going on. Raises
    ConfigError if the folder holds no run, CheckpointError if it has no checkpoint or one of another model.
    """
    config = _one_rank(run_config(run_folder))
    folder = RunFolder(Path(run_folder), State.RESUME).checkpoints
    path = newest_good(folder)
    if path is None:
        raise CheckpointError(
            f"{folder} must hold a checkpoint, got none; train first, or wait for run.save_every_steps "
            f"({config.run.save_every_steps}) steps"
        )
    host = PlainHost(config)
    model = Matformer(config.model, trunk=host.build_trunk())
    host.prepare(model)
    _load_weights(host, model=model, checkpoint=Checkpoint(path), key="ema" if ema else "weights")
    host.steps = step_of(path)
    model.eval().requires_grad_(False)
    log.info("%s of %s", "average of the weights" if ema else "weights", path)
    return config, host, model


def run_config(run_folder: Path) -> RunConfig:
    """The resolved config that a run folder holds. Raises ConfigError if it is not a run folder."""
    file = RunFolder(Path(run_folder), State.RESUME).config_file
    if not file.is_file():
        raise ConfigError(f"a run must be a folder with a config.yaml, got {run_folder}; name one such as runs/demo")
    return load_run(file)


def _one_rank(config: RunConfig) -> RunConfig:
    """Nothing of the layout that trained it is left: cp, stages and recompute neither."""
    plain = ParallelConfig(host="plain", threads=config.parallel.threads)
    return config.model_copy(update={"parallel": plain})


def _load_weights(host: PlainHost, *, model: Matformer, checkpoint: Checkpoint, key: str) -> None:
    names = {f"weights/{name}": f"{key}/{name}" for name, _ in model.named_parameters()}
    tensors = checkpoint.read(list(names.values()))
    host.load(lambda wanted: {one: tensors[names[one]] for one in wanted}, step=0)
