"""Whole runs by their doors: every layout is one run, a disturbed run is the undisturbed one, what is wrong is said.

Starts cost seconds, so all that the chosen tests need begins at once, two at a time, and tests share what they can.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from data_prep.demo import prepare_minimal
from data_prep.speech import SAMPLE_RATE
from matformer import report, sample
from matformer.checkpoint.manifest import verify
from matformer.checkpoint.store import step_of
from tests.ranks.doors import (
    COMPILERS,
    CONFIG,
    SAVED_EVERY,
    STEPS,
    Doors,
    End,
    bare_path,
    checkpoints,
    end_of,
    flip,
    kill_family,
    metrics,
    newest_tensors,
    numbers,
    series,
    wait_for,
)
from tests.tolerances import LOSS

LAYOUTS = {
    "one": (),
    "tp2": ("parallel.tp=2",),
    "pp2": ("parallel.pp=2",),
    "tp2 pp2": ("parallel.tp=2", "parallel.pp=2"),
    "cp2": ("parallel.cp=2",),
    "dp2": ("parallel.dp=2", "run.gradients_every_steps=2"),
    "dp2 zero2": ("parallel.dp=2", "parallel.zero_stage=2"),
    "dp2 zero3": ("parallel.dp=2", "parallel.zero_stage=3"),
}
Test = TypeVar("Test", bound=Callable[..., None])
PLAIN = "parallel.host=plain"
STARTS_AT_ONCE = 2


# What happens to runs: each event has folders of its own, so that any two may happen at the same time.


class House:
    """The doors, and every event that was asked for, by name; the undisturbed run of one rank begins first."""

    def __init__(self, doors: Doors, pool: ThreadPoolExecutor) -> None:
        self.doors, self.pool = doors, pool
        self.events: dict[str, Future[Any]] = {}
        self.begin("one")

    def begin(self, name: str) -> None:
        """Let it happen, once."""
        if name not in self.events:
            self.events[name] = self.pool.submit(EVENTS[name], self)

    def __call__(self, name: str) -> Any:
        """What came of an event: waits for it."""
        self.begin(name)
        return self.events[name].result()

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.doors.run_folder(name)


def undisturbed(house: House, *, layout: str) -> End:
    """A whole run under a layout."""
    return house.doors.train(layout, *LAYOUTS[layout])


@dataclass(frozen=True)
class Stopped:
    """A run that was stopped, what it had written by then, and the end of the same command afterwards."""

    end: End
    saved: list[int]
    seen: int
    goes_on: End
    second_owner: End | None = None


def written(run: Path) -> tuple[list[int], int]:
    """Steps of the checkpoints, and of the last row of numbers."""
    return [step_of(path) for path in checkpoints(run)], metrics(run)[-1]["step"]


def killed(house: House, *, layout: str) -> Stopped:
    """SIGKILL to all of a run, one step or more after a checkpoint."""
    name = f"killed {layout}"
    run = house.run(name)
    with house.doors.start(name, *LAYOUTS[layout]) as process:
        wait_for(process, lambda: bool(checkpoints(run)) and len(series(run, "loss")) > SAVED_EVERY)
        kill_family(process.pid)
        end = end_of(process)
    saved, seen = written(run)
    return Stopped(end, saved, seen, house.doors.train(name, *LAYOUTS[layout]))


def interrupted(house: House) -> Stopped:
    """A second owner while the first lives, then one SIGINT to it."""
    run = house.run("interrupted")
    with house.doors.start("interrupted") as process:
        wait_for(process, lambda: len(series(run, "loss")) > 0)
        process.send_signal(signal.SIGSTOP)
        second = house.doors.train("interrupted")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        end = end_of(process)
    saved, seen = written(run)
    return Stopped(end, saved, seen, house.doors.train("interrupted"), second)


def again(house: House) -> tuple[End, End, End]:
    """A finished run: the same command, one with other values, and those as a branch."""
    house("one")
    same = house.doors.train("one")
    house.doors.copy("one", "changed")
    more = (f"train.steps={STEPS + 2}", "train.lr=1e-3")
    refused = house.doors.train("changed", *more)
    return same, refused, house.doors.train("changed", *more, "run.resume=branch")


def damaged_data(house: House) -> tuple[dict[str, str], End, End]:
    """Every second picture damaged: (digest by key, a run within the limit, a run beyond it)."""
    copied = Path(shutil.copytree(house.doors.data, house.doors.folder / "damaged data"))
    folder = copied / "images" / "train"
    digests = {}
    for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
        index = json.loads((folder / f"{shard['name']}.index.json").read_text())
        for one in index["samples"][::2]:
            offset, size, digests[one["key"]] = one["members"]["moments.npy"]
            flip(folder / f"{shard['name']}.tar", offset + size - 1)
    doors = replace(house.doors, data=copied)
    within = doors.train("damage within", PLAIN, "data.max_bad_samples=100")
    return digests, within, doors.train("damage beyond", PLAIN, "data.max_bad_samples=0")


def damaged_checkpoints(house: House) -> tuple[End, End]:
    """One byte of the newest checkpoint is damaged, then one of each: (end, end)."""
    house("one")
    ends = []
    for name, places in (("newest damaged", slice(-1, None)), ("all damaged", slice(None))):
        run = house.doors.copy("one", name, unfinished=True)
        for checkpoint in checkpoints(run)[places]:
            flip(next(checkpoint.glob("*.safetensors")), 100_000)
        ends.append(house.doors.train(name))
    return ends[0], ends[1]


def full_disk(house: House) -> tuple[str, End | None, list[str]]:
    """A disk with room for one checkpoint and a half: (why it was not tried, end, what lies in checkpoints/)."""
    house("one")
    needed = sum(file.stat().st_size for file in checkpoints(house.run("one"))[-1].iterdir())
    disk = house.doors.folder / "full"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={needed * 3 // 2}", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        return f"no file system may be mounted here: {mounted.stderr.strip()}", None, []
    try:
        end = house.doors.train("full")
        for checkpoint in checkpoints(house.run("full")):
            verify(checkpoint)
        return "", end, [path.name for path in (house.run("full") / "checkpoints").iterdir()]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


EVENTS: dict[str, Callable[[House], Any]] = {
    **{layout: partial(undisturbed, layout=layout) for layout in LAYOUTS},
    "killed one": partial(killed, layout="one"),
    "killed dp2": partial(killed, layout="dp2"),
    "interrupted": interrupted,
    "again": again,
    "damaged data": damaged_data,
    "damaged checkpoints": damaged_checkpoints,
    "full disk": full_disk,
}


def needs(*events: str) -> Callable[[Test], Test]:
    """Events of a test, so that they begin while others are still awaited."""

    def marked(test: Test) -> Test:
        test.__dict__["events"] = events
        return test

    return marked


@pytest.fixture(scope="module")
def house(project: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("doors")
    prepare_minimal(folder / "data")
    environment = {"PATH": str(bare_path(folder / "programs")), "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    doors = Doors(project, folder / "data", folder, environment)
    with ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
        house = House(doors, pool)
        for item in request.session.items:
            for name in getattr(getattr(item, "function", None), "events", ()):
                house.begin(name)
        yield house
        pool.shutdown(cancel_futures=True)


def only_sentence(end: End, *words: str) -> None:
    """One line on stderr that holds these words."""
    assert len(end.sentences) == 1, end.error
    assert all(word in end.error for word in words), end.error


# Layouts


@needs(*LAYOUTS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_a_layout_is_the_run_of_one_rank(house: House, layout: str) -> None:
    for name in ("one", layout):
        assert house(name).code == 0, house(name).error
    ours, theirs = metrics(house.run(layout)), metrics(house.run("one"))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for key in ("loss", "grad_norm", "image/flow_loss", "audio/flow_loss", "text/bits_per_byte", "bytes_seen"):
        assert series(house.run(layout), key) == pytest.approx(series(house.run("one"), key), rel=LOSS), key
    heldout = [key for row in theirs for key in row if key.startswith(("heldout/", "heldout_ema/"))]
    assert len(series(house.run("one"), "loss")) == STEPS and len(heldout) > 10
    for key in heldout:
        assert series(house.run(layout), key) == pytest.approx(series(house.run("one"), key), rel=LOSS), key


@needs("dp2")
def test_a_run_that_looks_at_gradients_writes_them_every_so_many_steps(house: House) -> None:
    assert house("dp2").code == 0, house("dp2").error
    rows = [row for row in metrics(house.run("dp2")) if "loss" in row]
    looked = [row for row in rows if any(key.startswith("gradients/") for key in row)]
    assert [row["step"] for row in looked] == list(range(2, STEPS + 1, 2))
    for row in looked:
        cosines = [value for key, value in row.items() if key.startswith("gradients/") and key.endswith("_cosine")]
        assert cosines and all(-1.001 <= value <= 1.001 for value in cosines)
    assert any("gradients/layer_00/text_media_norm_ratio" in row for row in looked)


@needs("one", "dp2")
@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_neither_compiler_nor_ninja_is_needed(house: House, layout: str) -> None:
    assert house(layout).code == 0, house(layout).error
    path = house.doors.environment["PATH"]
    assert [name for name in COMPILERS if shutil.which(name, path=path)] == []
    extensions = Path(house.doors.environment["TORCH_EXTENSIONS_DIR"])
    assert list(extensions.rglob("*.so")) == []


# Stopped and started again


@needs("one", "dp2", "killed one", "killed dp2")
@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_a_killed_run_goes_on_to_the_same_bytes(house: House, layout: str) -> None:
    house(layout)
    stopped = house(f"killed {layout}")
    assert stopped.end.code == -signal.SIGKILL
    assert stopped.saved[-1] < STEPS and stopped.saved[-1] < stopped.seen
    assert stopped.goes_on.code == 0, stopped.goes_on.error
    assert f"goes on after step {stopped.saved[-1]} of {STEPS}" in stopped.goes_on.error
    assert_same(house.run(f"killed {layout}"), house.run(layout))


@needs("one", "interrupted")
def test_an_interrupted_run_saves_the_step_in_hand_and_goes_on_to_the_same_bytes(house: House) -> None:
    house("one")
    stopped = house("interrupted")
    assert stopped.end.code == 130, stopped.end.error
    assert "SIGINT: the step in hand is finished and saved" in stopped.end.error
    assert stopped.saved[-1] == stopped.seen < STEPS
    assert stopped.goes_on.code == 0, stopped.goes_on.error
    assert f"goes on after step {stopped.seen} of {STEPS}" in stopped.goes_on.error
    assert_same(house.run("interrupted"), house.run("one"))


@needs("interrupted")
def test_a_run_has_one_owner(house: House) -> None:
    second = house("interrupted").second_owner
    assert second.code == 2
    only_sentence(second, "must have one owner, got a second while process")


@needs("one", "again")
def test_a_finished_run_says_so(house: House) -> None:
    same, _, _ = house("again")
    assert same.code == 0
    only_sentence(same, "is finished; see")


@needs("one", "again")
def test_a_changed_config_is_refused_by_its_keys_and_goes_on_as_a_branch(house: House) -> None:
    _, refused, branch = house("again")
    assert refused.code == 2
    only_sentence(refused, "got other values for ", "train.lr", "train.steps", "run.resume=branch")
    assert branch.code == 0, branch.error
    steps = [row["step"] for row in metrics(house.run("changed")) if "loss" in row]
    assert steps == list(range(1, STEPS + 3))
    assert numbers(house.run("changed"))[: len(numbers(house.run("one")))] == numbers(house.run("one"))


def assert_same(run: Path, undisturbed: Path) -> None:
    """The same numbers and the same last checkpoint, to the bit."""
    assert numbers(run) == numbers(undisturbed)
    ours, theirs = newest_tensors(run), newest_tensors(undisturbed)
    assert ours.keys() == theirs.keys() and len(theirs) > 50
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


# What is wrong is said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.root=nowhere"], "data.root must hold every data set of data.sources, got none at"),
        (["train.step=5"], "nearest is train.steps"),
        (["parallel.tp=3"], "must be divisible by parallel.tp, got 4 and 3"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(house: House, overrides: list[str], words: str) -> None:
    end = house.doors.train("mistake", *overrides)
    assert end.code == 2
    only_sentence(end, words)
    assert not house.run("mistake").exists()


def test_ranks_that_the_plan_does_not_have_are_refused(house: House) -> None:
    end = house.doors.door("matformer.train", CONFIG, *house.doors.overrides("ranks", "parallel.dp=2"))
    assert end.code == 3
    only_sentence(end, "parallel.tp * cp * pp * dp = 1 * 1 * 1 * 2 needs 2 ranks, but 1 were started")


@needs("damaged data")
def test_damaged_samples_are_named_and_skipped_up_to_the_limit(house: House) -> None:
    digests, within, beyond = house("damaged data")
    assert within.code == 0, within.error
    skipped = [line for line in within.sentences if line.startswith("skipped a damaged sample")]
    assert 0 < len(skipped) <= len(digests)
    for number, line in enumerate(skipped, start=1):
        assert f"({number} so far)" in line and "shard-000000.tar" in line
        key = line.split(" of key ")[1].split(" in shard ")[0]
        assert f"must have digest {digests[key]}, got " in line
    assert beyond.code == 2 and "Traceback" not in beyond.error
    assert beyond.sentences[-1].startswith("at most 0 samples may be damaged, got 1, the last: ")
    assert beyond.sentences[-1].endswith("set data.max_bad_samples")


@needs("one", "damaged checkpoints")
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(house: House) -> None:
    newest, _ = house("damaged checkpoints")
    assert newest.code == 0, newest.error
    assert "is damaged: expected SHA-256" in newest.error
    assert "goes on after step 6 of 8" in newest.error
    assert_same(house.run("newest damaged"), house.run("one"))


@needs("one", "damaged checkpoints")
def test_without_a_whole_checkpoint_a_run_does_not_begin_anew(house: House) -> None:
    _, none = house("damaged checkpoints")
    assert none.code == 2 and "Traceback" not in none.error
    assert "none of the 2 checkpoints in" in none.sentences[-1] and "is whole" in none.sentences[-1]
    assert series(house.run("all damaged"), "loss") == series(house.run("one"), "loss")


@needs("one", "full disk")
def test_a_full_disk_is_one_sentence_and_older_checkpoints_stay(house: House) -> None:
    refused, end, left = house("full disk")
    if end is None:
        pytest.skip(refused)
    assert end.code == 2 and "Traceback" not in end.error
    assert left == ["step-000003"]
    last = end.sentences[-1]
    assert "step-000006 could not be written (disk full" in last and last.endswith("free space or change run.folder")


# The other doors


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "red.png"
    Image.new("RGB", (64, 64), (220, 40, 40)).save(path)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "tone.wav"
    soundfile.write(path, np.sin(np.arange(SAMPLE_RATE) / 10), SAMPLE_RATE)
    return path


QUICK = ("--steps", "2", "--max-bytes", "24", "--max-spans", "3", "--num", "2")


def drawn(house: House, out: Path, *arguments: str, seed: int = 1) -> dict[str, bytes]:
    """What the sampling door writes, by file name."""
    assert house("one").code == 0
    torch.set_num_threads(1)
    code = sample.main([str(house.run("one")), "--out", str(out), "--seed", str(seed), *QUICK, *arguments])
    assert code == 0
    record = json.loads((out / "samples.json").read_text())
    named = {span["file"] for spans in record["samples"] for span in spans}
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "samples.json"}
    assert files.keys() == named
    return files


WANTED: dict[str, tuple[list[str], str]] = {
    "text": (["--text", "import ", "--want", "text"], ".txt"),
    "image": (["--text", "red disc", "--want", "image"], ".png"),
    "audio": (["--text", "a short low pure tone", "--want", "audio"], ".wav"),
    "caption": (["--image", "PICTURE", "--want", "text"], ".txt"),
    "transcript": (["--audio", "SOUND", "--want", "text"], ".txt"),
    "auto": (["--text", "red disc", "--want", "auto"], ""),
}


@needs("one")
@pytest.mark.parametrize("wanted", WANTED)
def test_a_seed_gives_its_sample_and_another_seed_another(
    house: House, tmp_path: Path, picture: Path, sound: Path, wanted: str
) -> None:
    named = {"PICTURE": str(picture), "SOUND": str(sound)}
    arguments, suffix = WANTED[wanted]
    arguments = [named.get(argument, argument) for argument in arguments]
    first = drawn(house, tmp_path / "first", *arguments)
    assert drawn(house, tmp_path / "again", *arguments) == first
    if suffix:
        assert [Path(name).suffix for name in first] == [suffix] * 2
        assert drawn(house, tmp_path / "other", *arguments, seed=2) != first


@needs("one")
def test_a_sample_is_the_same_in_another_process(house: House, tmp_path: Path) -> None:
    arguments = ["--text", "red disc", "--want", "image"]
    here = drawn(house, tmp_path / "here", *arguments)
    run, there = str(house.run("one")), tmp_path / "there"
    end = house.doors.door("matformer.sample", run, "--out", str(there), "--seed", "1", *QUICK, *arguments)
    assert (end.code, end.error) == (0, "")
    assert {name: (there / name).read_bytes() for name in here} == here


@needs("one")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--want", "video"], "--want must be one of text, image, audio, auto, got 'video'"),
        (["--want", "image", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["--want", "text", "--image", "nowhere.png"], "--image must name a file, got nowhere.png"),
        (["--want", "text", "--image", "NOT A PICTURE"], "must be a"),
        (["--want", "text", "--audio", "NOT A PICTURE"], "must be a"),
    ],
)
def test_a_sample_that_cannot_be_is_one_sentence(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    house("one")
    other = tmp_path / "other.txt"
    other.write_text("neither seen nor heard")
    arguments = [str(other) if argument == "NOT A PICTURE" else argument for argument in arguments]
    assert sample.main([str(house.run("one")), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_what_is_no_run_is_one_sentence(house: House, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert sample.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "a run must be a folder with a config.yaml" in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 2
    assert "a run folder must hold config.yaml or metrics.jsonl" in capsys.readouterr().err


@needs("one")
def test_evaluation_and_report_read_what_a_run_left(house: House) -> None:
    house("one")
    run = house.run("one")
    end = house.doors.door("matformer.evaluate", str(run), "--json")
    assert end.code == 0, end.error
    found = json.loads(end.out.splitlines()[-1])
    last = next(row for row in reversed(metrics(run)) if "heldout/text/bits_per_byte" in row)
    assert found["step"] == STEPS
    for key in ("heldout/text/bits_per_byte", "heldout/image/flow_loss", "heldout/audio/flow_loss"):
        assert found[key] == pytest.approx(last[key], rel=LOSS)
    assert found["baselines"]
    end = house.doors.door("matformer.report", str(run))
    assert (end.code, end.error, end.out.strip()) == (0, "", str(run / "report.html"))
    assert "</html>" in (run / "report.html").read_text()
