"""The folder beside a data set where its parts are kept until it is whole: what a killed command goes on from."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matformer.errors import DataError

WHOLE = "whole"
"""The data set, before it is renamed."""
LOCK = "lock"
PLACED = "placed"
"""OUT is in place, or will be by the next rename."""


@contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """The folder beside OUT where parts are kept, locked: it is left when something fails, and gone at a clean exit.

    Raises DataError if OUT exists or another command works on it.
    """
    out = out.absolute()
    work = out.with_name(f".{out.name}.encoding")
    if out.exists():
        if (work / PLACED).exists() and not (work / WHOLE).exists():  # killed once OUT was in place
            with _locked(work, out=out):
                _remove(work)
        raise DataError(f"{out} must not exist yet, got a folder or file; remove it or change --out")
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work, out=out):
        (work / PLACED).unlink(missing_ok=True)
        for left in work.glob(".*.writing-*"):  # of killed processes
            shutil.rmtree(left)
        yield work
        _remove(work)


def place(whole: Path, out: Path, *, work: Path) -> None:
    """Rename the whole data set into its place; from here on the working folder only waits to be removed."""
    (work / PLACED).touch()
    os.replace(whole, out)


@contextmanager
def _locked(work: Path, *, out: Path) -> Iterator[None]:
    with (work / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"one command at a time may encode into {out}, got another; wait for it") from error
        yield


def _remove(work: Path) -> None:
    """Folders first: while one is left, the mark that OUT is in place is too."""
    for one in work.iterdir():
        if one.is_dir():
            shutil.rmtree(one)
    (work / LOCK).unlink()
    shutil.rmtree(work)
