"""Where media lie: folders of files and WebDataset tars, in parts that are small enough to be done at once.

A sample is a medium with what stands beside it under the same name: `.txt` its caption, `.json` what else is known.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from matformer.errors import DataError


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file: all, or a stretch of them."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Raises DataError if the file is gone or shorter than it was."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read() if self.size is None else file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.path} must be readable, got: {error}; repair or remove it") from error
        if self.size is not None and len(data) < self.size:
            raise DataError(f"{self.path} must hold {self.size} bytes at {self.offset}, got {len(data)}; copy it again")
        return data


@dataclass(frozen=True, slots=True)
class Item:
    """A sample. key: without dots and slashes. shard: the tar it is in, or the folder. media: None if it has none."""

    key: str
    shard: str
    suffix: str
    media: Place | None
    caption: Place | None = None
    facts: Place | None = None

    def texts(self) -> list[dict[str, str]]:
        """Captions with their languages, main one first. Raises DataError if there is none or it is no text."""
        known = self.known().get("texts")
        try:
            if known:
                return [{"lang": str(one["lang"]), "text": str(one["text"])} for one in known]
            text = self.caption.read().decode().strip() if self.caption else ""
        except (UnicodeDecodeError, KeyError, TypeError) as error:
            raise DataError(f"captions must be UTF-8 text with a language each, got: {error!r}; repair them") from error
        if not text:
            raise DataError("a sample must have a caption, got none; write one beside it as .txt, or remove it")
        return [{"lang": "en", "text": text}]

    def known(self) -> dict[str, Any]:
        """What the `.json` beside it says. Raises DataError if it is none."""
        if self.facts is None:
            return {}
        try:
            known = json.loads(self.facts.read())
        except ValueError as error:
            raise DataError(f"the .json of a sample must hold JSON, got: {error}; repair or remove it") from error
        if not isinstance(known, dict):
            raise DataError(f"the .json of a sample must hold an object, got {type(known).__name__}; repair it")
        return known


@dataclass(frozen=True, slots=True)
class Part:
    """`count` samples: of a tar from number `first` on, or these files below `root`."""

    root: Path
    suffixes: tuple[str, ...]
    count: int
    tar: Path | None = None
    first: int = 0
    files: tuple[Path, ...] = ()

    def items(self) -> Iterator[Item]:
        """The samples in order. Raises DataError where the tar breaks off before them."""
        if self.tar is None:
            yield from _grouped(
                ((_key(path, root=self.root), path.name, Place(path)) for path in self.files), part=self
            )
            return
        yield from islice(_in_tar(self.tar, part=self), self.first, self.first + self.count)

    def digest(self) -> str:
        """Changes with the names, sizes and times of the files, so that work done on others is not taken for it."""
        paths = [self.tar] if self.tar else list(self.files)
        stats = [(str(path.relative_to(self.root)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return hashlib.sha256(repr((self.suffixes, self.first, self.count, stats)).encode()).hexdigest()


def parts_of(root: Path, *, suffixes: tuple[str, ...], samples: int) -> list[Part]:
    """Everything below a folder, at most `samples` a part: the tars' if there are any, else the files'.

    Raises DataError if there is nothing.
    """
    if not root.is_dir():
        raise DataError(f"{root} must be a folder of media or of WebDataset tars, got none; change --data")
    tars = sorted(root.rglob("*.tar"))
    parts = _parts_of_tars(tars, root=root, suffixes=suffixes, samples=samples)
    if not tars:
        parts = _parts_of_files(root, suffixes=suffixes, samples=samples)
    if not parts:
        raise DataError(f"{root} must hold files of {', '.join(suffixes)} or tars of them, got none; change --data")
    return parts


def _parts_of_tars(tars: Iterable[Path], *, root: Path, suffixes: tuple[str, ...], samples: int) -> list[Part]:
    parts = []
    for tar in tars:
        whole = Part(root, suffixes, count=0, tar=tar)
        count = sum(1 for _ in _in_tar(tar, part=whole))
        parts += [
            Part(root, suffixes, count=min(samples, count - first), tar=tar, first=first)
            for first in range(0, count, samples)
        ]
    return parts


def _parts_of_files(root: Path, *, suffixes: tuple[str, ...], samples: int) -> list[Part]:
    wanted = {*suffixes, ".txt", ".json"}
    files = sorted(
        (path for path in root.rglob("*") if path.suffix.lower() in wanted), key=lambda path: _key(path, root=root)
    )
    groups = [tuple(group) for _, group in groupby(files, key=lambda path: _key(path, root=root))]
    groups = [group for group in groups if any(path.suffix.lower() in suffixes for path in group)]
    return [
        Part(root, suffixes, count=len(chosen), files=tuple(path for group in chosen for path in group))
        for first in range(0, len(groups), samples)
        if (chosen := groups[first : first + samples])
    ]


def _key(path: Path, *, root: Path) -> str:
    return _plain(path.relative_to(root).with_suffix("").as_posix())


def _plain(name: str) -> str:
    """WebDataset splits names at dots and slashes."""
    return re.sub(r"[./]", "_", name)


def _in_tar(tar: Path, *, part: Part) -> Iterator[Item]:
    """Samples of a tar by its headers alone; where it breaks off, one more without a medium stands for the rest."""
    yield from _grouped(_members(tar), part=part)


def _members(tar: Path) -> Iterator[tuple[str, str, Place]]:
    size = tar.stat().st_size
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    yield (
                        _plain(f"{folder}/{stem}".strip("./")),
                        f".{suffix}",
                        Place(tar, member.offset_data, member.size),
                    )
                    if member.offset_data + member.size > size:
                        return
    except (tarfile.TarError, EOFError):
        yield f"rest-of-{_plain(tar.stem)}", "", Place(tar)


def _grouped(members: Iterable[tuple[str, str, Place]], *, part: Part) -> Iterator[Item]:
    for key, group in groupby(members, key=lambda member: member[0]):
        named = {Path(name).suffix.lower() or name: place for _, name, place in group}
        suffix = next((one for one in part.suffixes if one in named), "")
        shard = str(part.tar if part.tar else part.root)
        yield Item(key, shard, suffix, named.get(suffix), caption=named.get(".txt"), facts=named.get(".json"))
