"""slurm/pretrain.sh and slurm/prepare.sh: what starts, what is refused before, who gets signals, whose exit code.

The scripts are the real ones, and so are config, plan door and launcher; only `matformer.train` is a recorder, and
where Slurm is wanted `srun` and `scontrol` are small programs that do here what Slurm does on its first node.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

RECORDER = """
    import json, os, pathlib, signal, sys, time
    overrides = dict(text.split("=", 1) for text in sys.argv[2:])
    rank = os.environ.get("RANK", "alone")
    here = pathlib.Path("started")
    here.mkdir(exist_ok=True)
    def leave(number, frame):
        (here / f"{rank}.signal").write_text(signal.Signals(number).name)
        sys.exit(0)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, leave)
    world = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    (here / f"{rank}.part").write_text(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), **world}))
    (here / f"{rank}.part").rename(here / f"{rank}.json")
    if overrides.get("name") == "waits":
        time.sleep(60)
    sys.exit(7 if overrides.get("name") == "fails" else 0)
"""
SRUN = """
    #!/usr/bin/env bash
    printf '%s\\n' "$@" > started.srun
    while [[ "$1" == --* ]]; do shift; done
    SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """
    #!/usr/bin/env bash
    echo localhost
    echo the-second-node
"""


@dataclass
class Project:
    """A copy of the scripts, the configs and what the plan door needs, with data and a recorder for train."""

    path: Path

    def started(self) -> dict[str, dict[str, str]]:
        """What each rank that started saw, by rank."""
        return {file.stem: json.loads(file.read_text()) for file in (self.path / "started").glob("*.json")}

    def command(self, *arguments: str) -> list[str]:
        """The script with arguments."""
        return ["bash", str(self.path / "slurm" / "pretrain.sh"), *arguments]

    def environment(self, **more: str) -> dict[str, str]:
        """This machine's environment without Slurm's, and our interpreter as the project's."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        return kept | {"MATFORMER_PYTHON": sys.executable, "PYTHONPATH": ""} | more

    def run(self, *arguments: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """The script's end."""
        return subprocess.run(
            self.command(*arguments),
            cwd=cwd or self.path,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=100,
        )

    def signalled(self, number: signal.Signals, *arguments: str, ranks: int = 1, **more: str) -> int:
        """Start the script, send it a signal once `ranks` run, and give its exit code."""
        with subprocess.Popen(self.command(*arguments), cwd=self.path, env=self.environment(**more)) as script:
            deadline = time.monotonic() + 60
            while len(self.started()) < ranks and time.monotonic() < deadline and script.poll() is None:
                time.sleep(0.05)
            script.send_signal(number)
            return script.wait(timeout=60)

    def signals(self) -> list[str]:
        """Names of the signals that ranks got."""
        return sorted(file.read_text() for file in (self.path / "started").glob("*.signal"))


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Project:
    root = tmp_path / "a project"
    for folder in ("slurm", "configs", "matformer/config", "matformer/parallel"):
        shutil.copytree(project / folder, root / folder)
    for file in ("__init__.py", "door.py", "errors.py", "files.py", "launch.py", "plan.py"):
        shutil.copy(project / "matformer" / file, root / "matformer" / file)
    (root / "matformer" / "train.py").write_text(textwrap.dedent(RECORDER))
    for source in ("text", "images", "speech", "albums"):
        for split in ("train", "heldout"):
            manifest = root / "data" / "demo" / source / split / "manifest.json"
            manifest.parent.mkdir(parents=True)
            manifest.touch()
    return Project(root)


@pytest.fixture
def slurm(copy: Project) -> dict[str, str]:
    """The environment of a job of one node, submitted from the project's folder."""
    programs = copy.path / "programs"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(textwrap.dedent(text).lstrip())
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_SUBMIT_DIR": str(copy.path),
    }


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.step=5"], "nearest is train.steps"),
        (["train.steps=five"], "train.steps must be a valid integer"),
        (["parallel.tp=3"], "model.atto.heads must be divisible by parallel.tp, got 4 and 3"),
        (["model.atto.layers=4", "parallel.zero_stage=2", "parallel.pp=2"], "parallel.zero_stage must be 1"),
        (["data.root=nowhere", "data.recipe=null"], "data.root must hold every data set"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2_before_anything_starts(
    copy: Project, overrides: list[str], words: str
) -> None:
    end = copy.run("configs/run/demo.yaml", *overrides)
    assert end.returncode == 2
    assert words in end.stderr and end.stderr.count("\n") == 1
    assert copy.started() == {}


def test_without_an_argument_it_runs_the_demo(copy: Project) -> None:
    assert copy.run().returncode == 0
    assert copy.started()["alone"]["argv"] == ["configs/run/demo.yaml"]


PREPARES = """
    import sys
    from pathlib import Path
    from data_prep.fetch import fetch
    root, cache = Path(sys.argv[sys.argv.index("--out") + 1]), Path(sys.argv[sys.argv.index("--cache") + 1])
    fetch(cache, packages=[])
    for source in ("text", "images", "speech", "albums"):
        for split in ("train", "heldout"):
            manifest = root / source / split / "manifest.json"
            manifest.parent.mkdir(parents=True)
            manifest.touch()
"""


def test_data_that_are_missing_are_prepared_under_a_lock_that_the_downloads_do_not_wait_for(
    project: Path, copy: Project
) -> None:
    shutil.rmtree(copy.path / "data")
    (copy.path / "data_prep").mkdir()
    for file in ("__init__.py", "fetch.py"):
        shutil.copy(project / "data_prep" / file, copy.path / "data_prep" / file)
    (copy.path / "data_prep" / "demo.py").write_text(textwrap.dedent(PREPARES))
    end = copy.run()  # a deadlock ends in its time limit
    assert end.returncode == 0, end.stderr
    assert (copy.path / "data" / "demo" / "text" / "train" / "manifest.json").is_file()
    assert copy.started()["alone"]["argv"]


def test_a_synthetic_data_set_is_not_trained_on_as_the_demos(copy: Project) -> None:
    (copy.path / "data" / "demo" / "demo.json").write_text(json.dumps({"kind": "synthetic"}))
    (copy.path / "data_prep").mkdir()
    (copy.path / "data_prep" / "demo.py").write_text("import sys; sys.exit('another data set is there')")
    end = copy.run()
    assert end.returncode != 0 and "another data set is there" in end.stderr
    assert copy.started() == {}
    assert copy.run("data.recipe=null").returncode == 0
    assert copy.started()["alone"]["argv"][1:] == ["data.recipe=null"]


def test_overrides_alone_go_to_the_demo(copy: Project) -> None:
    assert copy.run("train.steps=60", "data.sources.text.main_language=a b").returncode == 0
    assert copy.started()["alone"]["argv"][1:] == ["train.steps=60", "data.sources.text.main_language=a b"]


def test_a_config_is_found_from_where_the_caller_stands(copy: Project, tmp_path: Path) -> None:
    end = copy.run("run/demo.yaml", cwd=copy.path / "configs")
    assert end.returncode == 0, end.stderr
    started = copy.started()["alone"]
    assert started["argv"] == [str(copy.path / "configs/run/demo.yaml")]
    assert started["cwd"] == str(copy.path)


def test_the_exit_code_is_the_runs_own(copy: Project) -> None:
    assert copy.run("name=fails").returncode == 7


def test_a_signal_reaches_the_run(copy: Project) -> None:
    assert copy.signalled(signal.SIGTERM, "name=waits") == 0
    assert copy.signals() == ["SIGTERM"]


def test_two_ranks_start_and_both_get_the_signal(copy: Project) -> None:
    copy.signalled(signal.SIGUSR1, "name=waits", "parallel.dp=2", ranks=2)
    started = copy.started()
    assert sorted(started) == ["0", "1"]
    assert {one["WORLD_SIZE"] for one in started.values()} == {"2"}
    assert copy.signals() == ["SIGUSR1", "SIGUSR1"]


def test_a_job_starts_its_ranks_through_srun_and_passes_signals_on(copy: Project, slurm: dict[str, str]) -> None:
    copy.signalled(signal.SIGUSR1, "configs/run/demo.yaml", "name=waits", "parallel.tp=2", ranks=2, **slurm)
    started = copy.started()
    assert sorted(started) == ["0", "1"]
    assert {one["MASTER_PORT"] for one in started.values()} == {str(20000 + 41234 % 20000)}
    assert {one["MASTER_ADDR"] for one in started.values()} == {"localhost"}
    assert "--ntasks=1" in (copy.path / "started.srun").read_text().split("\n")
    assert copy.signals() == ["SIGUSR1", "SIGUSR1"]


def test_a_job_script_in_the_spool_works_in_the_folder_of_submission(
    copy: Project, slurm: dict[str, str], tmp_path: Path
) -> None:
    spool = tmp_path / "spool" / "slurm_script"
    spool.parent.mkdir()
    shutil.copy(copy.path / "slurm" / "pretrain.sh", spool)
    command = ["bash", str(spool), "configs/run/demo.yaml", "train.step=5"]
    end = subprocess.run(command, cwd=spool.parent, env=copy.environment(**slurm), capture_output=True, text=True)
    assert (end.returncode, end.stderr.count("\n")) == (2, 1)
    assert "nearest is train.steps" in end.stderr


def test_a_job_that_was_not_prepared_says_which_command_to_run(copy: Project, slurm: dict[str, str]) -> None:
    shutil.rmtree(copy.path / "data" / "demo" / "images")
    end = copy.run("configs/run/demo.yaml", "name=fails", **slurm)
    assert end.returncode == 2
    assert f"bash {copy.path}/slurm/prepare.sh " in end.stderr and "data/demo/images/train" in end.stderr
    bare = copy.run("configs/run/demo.yaml", **slurm, MATFORMER_PYTHON="")
    assert bare.returncode == 2
    assert "no .venv" in bare.stderr
    assert copy.started() == {}


def test_a_job_submitted_from_elsewhere_is_refused(copy: Project, slurm: dict[str, str], tmp_path: Path) -> None:
    end = copy.run("configs/run/demo.yaml", **(slurm | {"SLURM_SUBMIT_DIR": str(tmp_path)}))
    assert end.returncode == 2
    assert "submitted from the project's folder" in end.stderr


def test_nodes_that_do_not_divide_the_ranks_are_refused(copy: Project, slurm: dict[str, str]) -> None:
    end = copy.run("configs/run/demo.yaml", "parallel.dp=2", **(slurm | {"SLURM_JOB_NUM_NODES": "3"}))
    assert end.returncode == 2
    assert "got 2 and 3" in end.stderr
    assert copy.started() == {}


def test_the_plan_door_says_the_ranks_alone(project: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "matformer.plan",
        "configs/run/demo.yaml",
        "parallel.tp=2",
        "parallel.pp=2",
        "model.atto.layers=4",
        "--ranks",
    ]
    assert subprocess.run(command, cwd=project, capture_output=True, text=True).stdout == "4\n"


def test_the_plan_door_does_not_import_torch(project: Path) -> None:
    code = "import matformer.plan, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=project).returncode == 0


def test_the_plan_door_shows_the_run(project: Path) -> None:
    sizes = ["train.global_batch=8", "data.sequence_latents=256"]
    command = [sys.executable, "-m", "matformer.plan", "configs/run/demo.yaml", "parallel.dp=2", *sizes]
    shown = subprocess.run(command, cwd=project, capture_output=True, text=True).stdout
    assert "2 = tp 1 x cp 1 x pp 1 x dp 2" in shown and "2,048" in shown
