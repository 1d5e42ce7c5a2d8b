"""Shards: what is written is read back, by us and by plain webdataset; damage is named."""

from __future__ import annotations

import gc
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import webdataset

from matformer.data.shards import ShardReader, ShardWriter
from matformer.errors import DataError


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "set" / "train"
    with ShardWriter(out, form="pairs", shard_bytes=4096, extra={"licence": "CC0"}) as writer:
        for i in range(5):
            latent = np.full((2, 3), i, np.float16)
            writer.add(f"k{i}", {"moments.npy": npy(latent), "txt": f"caption {i}".encode(), "json": b"{}"})
    return out


def test_reader_gives_what_was_written(folder: Path) -> None:
    reader = ShardReader(folder)
    assert len(reader) == 5
    assert [reader.key(i) for i in range(5)] == [f"k{i}" for i in range(5)]
    assert reader.read(3)["txt"] == b"caption 3"
    assert (reader.array(4, "moments.npy") == 4).all()
    assert reader.array_length(4, "moments.npy") == 2
    assert reader.manifest["licence"] == "CC0"
    assert reader.manifest["samples"] == 5
    assert len(reader.manifest["shards"]) > 1


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_the_tars(folder: Path) -> None:
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    gc.collect()  # webdataset leaves its last file open: collected here, where that warning is expected
    assert [sample["__key__"] for sample in samples] == [f"k{i}" for i in range(5)]
    assert samples[2]["txt"] == b"caption 2"
    assert (np.load(io.BytesIO(samples[2]["moments.npy"])) == 2).all()


def test_a_tampered_member_is_named_with_both_digests(folder: Path) -> None:
    tar = folder / "shard-000000.tar"
    data = tar.read_bytes()
    assert data.count(b"caption 1") == 1
    tar.write_bytes(data.replace(b"caption 1", b"caption X"))
    reader = ShardReader(folder)
    with pytest.raises(DataError) as caught:
        reader.read(1)
    for part in ("shard-000000.tar", "k1", "txt"):
        assert part in str(caught.value)
    for text in (b"caption 1", b"caption X"):
        assert hashlib.sha256(text).hexdigest() in str(caught.value)
    with pytest.raises(DataError):
        reader.view(1, "txt")


def test_a_truncated_tar_is_damage(folder: Path) -> None:
    tar = folder / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(DataError, match="digest"):
        ShardReader(folder).read(1)


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path) -> None:
    out = tmp_path / "train"
    with pytest.raises(RuntimeError), ShardWriter(out, form="text") as writer:
        writer.add("a", {"txt": b"x"})
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    monkeypatch.setattr("os.fsync", lambda number: synced.add(Path(f"/proc/self/fd/{number}").readlink().name))
    with ShardWriter(tmp_path / "part", form="pairs") as writer:
        writer.add("a", {"txt": b"x"})
    assert synced == {path.name for path in (tmp_path / "part").iterdir()}


def test_keys_that_webdataset_would_split_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train", form="text") as writer:
        writer.add("a", {"txt": b"x"})
        for key in ("a", "b.c", "b/c", ""):
            with pytest.raises(DataError):
                writer.add(key, {"txt": b"x"})


def test_a_missing_data_set_names_root_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root.*data_prep\.demo"):
        ShardReader(tmp_path / "nowhere")
