"""Members of wheels, tarballs and Debian packages, read in place: nothing is unpacked to disk."""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from matformer.errors import DataError

log = logging.getLogger(__name__)


def members(path: Path, *, suffix: str | tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the regular files whose name ends in `suffix`, in the archive's order.

    Raises DataError if the archive cannot be read.
    """
    try:
        if path.suffix == ".whl":
            yield from _zip_members(path, suffix=suffix)
        elif path.suffix == ".deb":
            yield from _tar_members(io.BytesIO(_payload(path)), suffix=suffix)
        else:
            with path.open("rb") as file:
                yield from _tar_members(file, suffix=suffix)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        raise DataError(
            f"the download {path} must be a readable archive, got {error}; delete it and try again"
        ) from error


def can_open(path: Path) -> bool:
    """Whether this machine has what the archive needs: Debian packages need dpkg-deb."""
    if path.suffix != ".deb" or shutil.which("dpkg-deb"):
        return True
    log.info("dpkg-deb is not installed here: doing without %s", path.name)
    return False


def _payload(path: Path) -> bytes:
    return subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True, capture_output=True).stdout


def _zip_members(path: Path, *, suffix: str | tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(suffix):
                yield name, archive.read(name)


def _tar_members(file: BinaryIO, *, suffix: str | tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=file) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(suffix):
                content = archive.extractfile(member)
                assert content is not None
                yield member.name.removeprefix("./"), content.read()
