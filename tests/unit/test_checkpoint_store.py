"""Checkpoints: what is saved is what is loaded, damage is named and passed over, a full disk costs nothing older."""

from __future__ import annotations

import logging
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from matformer.checkpoint.manifest import verify
from matformer.checkpoint.store import Checkpoint, complete, newest_good, save
from matformer.config.schema import RunConfig
from matformer.engine.average import Average
from matformer.engine.step import optimizer_step
from matformer.errors import CheckpointError
from matformer.hosts.plain import PlainHost
from tests.made import plain_host, tiny_run, with_audio, with_both


def tensors_of(host: PlainHost, average: Average) -> dict[str, Tensor]:
    state = host.state()
    tensors = {f"weights/{name}": value for name, value in state.weights.items()}
    for moment, values in state.moments.items():
        tensors |= {f"{moment}/{name}": value for name, value in values.items()}
    return tensors | {f"ema/{name}": value for name, value in average.state().items()}


def trained(config: RunConfig, *, steps: int) -> tuple[PlainHost, Average]:
    host = plain_host(config)
    average = Average(host, decay=0.9)
    train(host, average, first=0, steps=steps)
    return host, average


def train(host: PlainHost, average: Average, *, first: int, steps: int) -> list[float]:
    norms = []
    for step in range(first, first + steps):
        norms.append(optimizer_step(host, [with_both(step), with_audio(step)], config=host.config, step=step).grad_norm)
        average.update(step + 1)
    return norms


def save_small(folder: Path, step: int, *, size: int = 100, keep: int = 9) -> Path:
    """A checkpoint of one tensor."""
    return save(folder, step, tensors={"weights/x": torch.full((size,), float(step))}, state={"step": step}, keep=keep)


def test_stopped_and_resumed_is_never_stopped_bit_for_bit(tmp_path: Path) -> None:
    config = tiny_run()
    host, average = trained(config, steps=2)
    path = save(tmp_path, 2, tensors=tensors_of(host, average), state={"step": 2, "lane": [1, 2]}, keep=2)
    on = train(host, average, first=2, steps=2)

    again = plain_host(config, stirred=False)
    mean = Average(again, decay=0.9)
    checkpoint = Checkpoint(path)
    assert checkpoint.state == {"step": 2, "lane": [1, 2]}
    again.load(checkpoint.read, step=checkpoint.state["step"])
    mean.load(checkpoint.read)
    assert train(again, mean, first=2, steps=2) == on
    expected, found = tensors_of(host, average), tensors_of(again, mean)
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert again.state().step == 4


def test_the_newest_are_kept_and_nothing_half_written_has_a_name(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_small(tmp_path, step, keep=2)
    assert [path.name for path in complete(tmp_path)] == ["step-000002", "step-000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000010"]
    assert newest_good(tmp_path) == tmp_path / "step-000010"


def test_past_a_million_steps_the_newest_is_the_newest(tmp_path: Path) -> None:
    for step in (999_000, 999_500, 1_000_000, 1_000_500):
        save_small(tmp_path, step, keep=2)
    assert [path.name for path in complete(tmp_path)] == ["step-1000000", "step-1000500"]
    assert newest_good(tmp_path) == tmp_path / "step-1000500"


def test_only_folders_named_by_a_step_are_checkpoints(tmp_path: Path) -> None:
    path = save_small(tmp_path, 1)
    path.rename(tmp_path / "step-000001.kept")
    assert complete(tmp_path) == []


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "none") is None
    assert newest_good(tmp_path) is None


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save_small(tmp_path, 3)
    path = save(tmp_path, 3, tensors={"weights/x": torch.ones(2)}, state={"step": 3}, keep=2)
    assert Checkpoint(path).read(["weights/x"])["weights/x"].tolist() == [1.0, 1.0]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def tensor_file(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def test_one_flipped_bit_is_named_and_the_older_checkpoint_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save_small(tmp_path, 1), save_small(tmp_path, 2)
    verify(newer)
    flip_a_bit(tensor_file(newer))
    with caplog.at_level(logging.WARNING):
        assert newest_good(tmp_path) == older
    assert str(tensor_file(newer)) in caplog.text and "SHA-256" in caplog.text


@pytest.mark.parametrize("lost", ["manifest.json", "state.json", "*.safetensors"])
def test_a_lost_file_is_named(lost: str, tmp_path: Path) -> None:
    path = save_small(tmp_path, 1)
    gone = next(path.glob(lost))
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        verify(path)


def test_a_cut_manifest_is_damage_and_not_a_crash(tmp_path: Path) -> None:
    older, newer = save_small(tmp_path, 1), save_small(tmp_path, 2)
    (newer / "manifest.json").write_text('{"format": 1, "files": {')
    assert newest_good(tmp_path) == older


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_bit(tensor_file(save_small(tmp_path, step)))
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        newest_good(tmp_path)


def test_a_checkpoint_of_another_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    host, average = trained(tiny_run(layers=2), steps=1)
    checkpoint = Checkpoint(save(tmp_path, 1, tensors=tensors_of(host, average), state={"step": 1}, keep=1))
    with pytest.raises(
        CheckpointError, match=r"atto\.layers\.2\.\S+: it belongs to another model; .* model\.\*"
    ) as error:
        plain_host(tiny_run(layers=3)).load(checkpoint.read, step=1)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_other_widths_is_refused_in_one_sentence(tmp_path: Path) -> None:
    config = tiny_run()
    host, average = trained(config, steps=1)
    checkpoint = Checkpoint(save(tmp_path, 1, tensors=tensors_of(host, average), state={"step": 1}, keep=1))
    atto = config.model.atto.model_copy(update={"ffn_width": 64})
    wider = config.model_copy(update={"model": config.model.model_copy(update={"atto": atto})})
    with pytest.raises(CheckpointError, match="another model"):
        plain_host(wider).load(checkpoint.read, step=1)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside, no file of this process grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way_leaves_the_older_checkpoint_and_no_rubbish(tmp_path: Path) -> None:
    older = save_small(tmp_path, 1)
    with largest_file(100_000), pytest.raises(CheckpointError, match=r"could not be written .* run\.folder"):
        save_small(tmp_path, 2, size=100_000, keep=1)
    assert newest_good(tmp_path) == older
    assert [path.name for path in tmp_path.iterdir()] == [older.name]
    assert newest_good(tmp_path) == older
    save_small(tmp_path, 2, size=100_000, keep=1)  # and the next attempt works


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_said_before_anything_is_written(small_disk: Path) -> None:
    older = save_small(small_disk, 1)
    with pytest.raises(CheckpointError, match=r"disk full: 2\.0 MB needed, 1\.0 MB free"):
        save_small(small_disk, 2, size=500_000, keep=1)
    assert newest_good(small_disk) == older
    assert [path.name for path in small_disk.iterdir()] == [older.name]
