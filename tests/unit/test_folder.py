"""The run folder: new, resumed, finished, changed, owned."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from matformer.config.load import load_run
from matformer.config.schema import RunConfig
from matformer.engine.folder import RunFolder, State
from matformer.errors import ConfigError

Here = Callable[..., RunConfig]


@pytest.fixture
def here(demo: Callable[..., RunConfig], tmp_path: Path) -> Here:
    """The demo's config with overrides, its run folder under tmp_path."""
    return lambda *overrides: demo(f"run.folder={tmp_path / 'runs'}", *overrides)


def state_of(config: RunConfig) -> State:
    with RunFolder.open(config) as folder:
        return folder.state


def test_a_new_folder_holds_the_resolved_config(here: Here) -> None:
    with RunFolder.open(here("train.lr=1e-5")) as folder:
        assert folder.state is State.NEW
        assert load_run(folder.config_file) == here("train.lr=1e-5")
        assert folder.checkpoints.is_dir() and folder.samples.is_dir()


def test_the_same_config_resumes(here: Here) -> None:
    state_of(here())
    assert state_of(here()) is State.RESUME


def test_keys_of_the_run_section_do_not_count_as_a_change(here: Here) -> None:
    state_of(here())
    assert state_of(here("run.save_every_steps=7", "run.wandb=disabled")) is State.RESUME
    assert state_of(here()) is State.RESUME


def test_a_finished_run_says_so_until_its_config_changes(here: Here) -> None:
    with RunFolder.open(here()) as folder:
        folder.mark_finished()
    assert state_of(here()) is State.FINISHED
    assert state_of(here("train.steps=9999", "run.resume=branch")) is State.CHANGED
    assert state_of(here("train.steps=9999")) is State.RESUME


def test_a_changed_config_is_refused_and_its_keys_named(here: Here) -> None:
    state_of(here())
    with pytest.raises(ConfigError) as raised:
        RunFolder.open(here("train.lr=0.5", "parallel.threads=1"))
    assert "for parallel.threads, train.lr;" in str(raised.value)
    assert "run.resume=branch" in str(raised.value)
    assert state_of(here()) is State.RESUME


def test_a_branch_goes_on_with_the_new_config(here: Here) -> None:
    state_of(here())
    with RunFolder.open(here("train.lr=0.5", "run.resume=branch")) as folder:
        assert (folder.state, folder.changed) == (State.CHANGED, ("train.lr",))
    assert state_of(here("train.lr=0.5")) is State.RESUME


OWNER = """
import sys, time
from matformer.config.load import load_run
from matformer.engine.folder import RunFolder
folder = RunFolder.open(load_run(sys.argv[1], sys.argv[2:]))
sys.stdout.write("owned\\n")
sys.stdout.flush()
time.sleep(60)
"""


def test_a_live_owner_is_named_and_a_killed_one_is_no_obstacle(here: Here, project: Path, tmp_path: Path) -> None:
    demo = project / "configs/run/demo.yaml"
    command = [sys.executable, "-c", OWNER, str(demo), f"run.folder={tmp_path / 'runs'}"]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None and owner.stdout.readline() == "owned\n"
            with pytest.raises(ConfigError, match=f"process {owner.pid} on "):
                RunFolder.open(here())
        finally:
            owner.kill()
    assert state_of(here()) is State.RESUME


def test_a_refused_open_gives_the_lock_back(here: Here) -> None:
    state_of(here())
    with pytest.raises(ConfigError):
        RunFolder.open(here("seed=1"))
    assert state_of(here()) is State.RESUME


def test_a_folder_that_cannot_be_written_is_one_sentence(here: Here, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(ConfigError, match="can be written.*change run.folder"):
        RunFolder.open(here())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(here: Here, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    (folder / f".config.yaml.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="No space left"):
        RunFolder.open(here())
