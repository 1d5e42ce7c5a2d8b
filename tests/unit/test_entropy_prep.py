"""The doors of the entropy patchers: a model is trained, text is scored and cut, work goes on where it stood."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from data_prep import score_entropy, train_entropy_model
from matformer.config.schema import DataConfig, PatcherConfig, SourceConfig
from matformer.data.entropy import entropies, load_entropy_model
from matformer.data.patching import EntropyPatcher, text_symbols
from matformer.data.shards import ShardReader
from matformer.data.sources import TextSpan, open_source
from tests.made import tiny_model, write_text

WORDS = b"the cat sat on a mat and the dog lay under the table while rain fell".split()
STEPS = 60


class Killed(BaseException):
    """What ends a process, as far as the code under test can see."""


def texts(number: int) -> list[bytes]:
    draws = np.random.default_rng(number)
    return [b" ".join(draws.choice(WORDS, size=draws.integers(1, 60)).tolist()) for _ in range(30)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of two blocks, and a model that learned from it."""
    root = tmp_path_factory.mktemp("entropy")
    write_text(root / "text" / "train", blocks=[texts(0), texts(1)])
    write_text(root / "text" / "heldout", blocks=[texts(2)])
    trained = ["--data", str(root / "text"), "--out", str(root / "model"), "--steps", str(STEPS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_entropy_model, "BATCH_SYMBOLS", 2048)
        assert train_entropy_model.main(trained) == 0
    return root


def score(root: Path, out: str, *more: str) -> int:
    asked = ["--data", str(root / "text"), "--model", str(root / "model"), "--out", str(root / out)]
    return score_entropy.main([*asked, "--processes", "1", *more])


def test_the_model_learned_the_text(root: Path) -> None:
    model = load_entropy_model(root / "model")
    bits = train_entropy_model.bits_per_byte(model, iter(texts(3) * 9), num_bytes=20_000)
    assert bits < 4.0  # a byte of it under its own frequencies alone: 4.1


def test_scored_text_has_the_patches_that_were_asked_for(root: Path) -> None:
    assert score(root, "scored", "--mean-patch", "3") == 0
    reader = ShardReader(root / "scored" / "train")
    identity = reader.manifest["patcher"]
    assert identity["kind"] == "entropy" and reader.manifest["origin"] == "made"
    model = load_entropy_model(root / "model")
    patcher = EntropyPatcher(model, threshold=identity["threshold"], max_patch_bytes=16)
    assert patcher.identity() == identity
    lengths = [np.load(io.BytesIO(reader.read(i)["patches.npy"])) for i in range(len(reader))]
    assert np.concatenate(lengths).mean() == pytest.approx(3, rel=0.05)
    for block in range(len(reader)):
        nats = np.load(io.BytesIO(reader.read(block)["entropies.npy"]))
        documents = score_entropy.texts_of(reader, block)
        np.testing.assert_allclose(nats, np.concatenate(entropies(model, documents)), atol=3e-3)
        alone = [patcher.lengths(text_symbols(one)) for one in documents]
        assert np.array_equal(np.concatenate(alone), lengths[block])
    assert not list(root.glob(".scored*"))


def test_a_run_takes_the_stored_patches(root: Path) -> None:
    assert score(root, "taken", "--threshold", "1.5", "--monotonic") == 0
    patcher = PatcherConfig(kind="entropy_monotonic", threshold=1.5, entropy_model=str(root / "model"))
    source = SourceConfig(path="taken", form="text", weight=1.0)
    data = DataConfig(
        root=str(root), recipe=None, lanes=1, sequence_latents=64, patcher=patcher, sources={"text": source}
    )
    opened = open_source("text", data=data, model=tiny_model(), split="heldout")
    assert opened._stored  # pyright: ignore
    span = opened.pick(7).spans[0]
    assert isinstance(span, TextSpan)
    assert np.array_equal(span.patch_lengths, opened.patcher.lengths(text_symbols(span.data)))


def test_what_is_scored_is_not_scored_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = score_entropy.score_block

    def killed(job: score_entropy.Job) -> score_entropy.Job:
        if len(seen) == 2:
            raise Killed
        seen.append(job.block)
        return whole(job)

    monkeypatch.setattr(score_entropy, "score_block", killed)
    with pytest.raises(Killed):
        score(root, "again", "--threshold", "1.5")
    assert not (root / "again").exists()
    seen.clear()
    assert score(root, "again", "--threshold", "1.5") == 0
    assert seen == [0]  # of three blocks two were there
    monkeypatch.undo()
    assert score(root, "at-once", "--threshold", "1.5") == 0
    for split in ("train", "heldout"):
        for one, other in zip(*(sorted((root / n / split).iterdir()) for n in ("again", "at-once")), strict=True):
            assert one.read_bytes() == other.read_bytes(), one


def test_two_processes_write_the_same_bytes_as_one(root: Path) -> None:
    for out, processes in (("one", "1"), ("two", "2")):
        assert score(root, out, "--mean-patch", "3", "--processes", processes) == 0
    for split in ("train", "heldout"):
        for one, other in zip(*(sorted((root / out / split).iterdir()) for out in ("one", "two")), strict=True):
            assert one.read_bytes() == other.read_bytes(), one


def test_text_without_documents_cannot_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "text" / "train", blocks=[])
    asked = ["--data", str(tmp_path / "text"), "--out", str(tmp_path / "model"), "--steps", "1"]
    assert train_entropy_model.main(asked) == 2
    assert "must hold documents, got none" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--threshold", "50"), "a threshold must let patches begin, got 50"),
        (("--mean-patch", "40"), "a threshold must give patches of 40 symbols"),
        (("--mean-patch", "3", "--model", "nowhere"), "must hold an entropy model"),
        (("--mean-patch", "3", "--data", "nowhere"), "must have a readable nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    root: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], words: str
) -> None:
    assert score(root, "wrong", *more) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert not (root / "wrong").exists()


def test_a_folder_that_stands_there_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(root, "text", "--threshold", "1.5") == 2
    assert "must not exist yet" in capsys.readouterr().err


def test_a_damaged_block_is_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "text" / "train", blocks=[texts(0)])
    write_text(tmp_path / "text" / "heldout", blocks=[texts(2)])
    tar = tmp_path / "text" / "train" / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    asked = ["--data", str(tmp_path / "text"), "--model", str(root / "model"), "--out", str(tmp_path / "out")]
    assert score_entropy.main([*asked, "--threshold", "1.5", "--processes", "1"]) == 2
    assert "must have digest" in capsys.readouterr().err
