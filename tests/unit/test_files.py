"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from matformer.files import whole_folder, write_whole


def test_a_file_takes_the_place_of_the_old_one_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for data in (b"one", b"other"):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(_: int) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk is full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_the_old_one_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in ("one", "other"):
        with whole_folder(folder) as beside:
            (beside / name).touch()
        assert [path.name for path in folder.iterdir()] == [name]
    with pytest.raises(KeyError), whole_folder(folder) as beside:
        (beside / "half").touch()
        raise KeyError
    assert [path.name for path in folder.iterdir()] == ["other"] and list(tmp_path.iterdir()) == [folder]
