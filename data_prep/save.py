"""A trained thing -> a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from matformer.errors import DataError
from matformer.files import whole_folder


class Savable(Protocol):
    """What writes itself into a folder."""

    def save(self, folder: Path) -> None: ...


def save_whole(model: Savable, folder: Path) -> None:
    """Whole or not at all, in the place of what was there. Raises DataError if the folder cannot be written."""
    try:
        with whole_folder(folder) as beside:
            model.save(beside)
    except OSError as error:
        raise DataError(f"{folder} must be a folder that can be written, got: {error}; change --out") from error
