"""Where media lie: folders of files and WebDataset tars, in parts that are small enough to be done at once.

A sample is a medium with what stands beside it under the same name: `.txt` its caption, `.json` what else is known. Of
several media under one name the one is taken whose ending stands first among the modality's.
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
from typing import Any, NamedTuple

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
        except (OSError, MemoryError, OverflowError) as error:  # a damaged header of a tar may claim any size
            raise DataError(f"{self.path} must be readable, got: {error!r}; repair it") from error
        if self.size is not None and len(data) < self.size:
            raise DataError(f"{self.path} must hold {self.size} bytes at {self.offset}, got {len(data)}; copy it again")
        return data


class Member(NamedTuple):
    """A file of a sample. stem: its path up to the ending, shared by the sample. header: the byte it has in a tar."""

    stem: str
    ending: str
    place: Place
    header: int = 0


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
            texts = [{"lang": str(one["lang"]), "text": str(one["text"])} for one in known or ()]
            if said := [one for one in texts if one["text"].strip()]:
                return said
            text = self.caption.read().decode().strip() if self.caption else ""
        except (UnicodeDecodeError, KeyError, TypeError) as error:
            raise DataError(f"captions must be UTF-8 text with a language each, got: {error!r}; repair them") from error
        if not text:
            raise DataError("a sample must have a caption, got none; write one beside it as .txt")
        return [{"lang": "en", "text": text}]

    def known(self) -> dict[str, Any]:
        """What the `.json` beside it says. Raises DataError if it is none."""
        if self.facts is None:
            return {}
        try:
            known = json.loads(self.facts.read())
        except (ValueError, RecursionError) as error:
            raise DataError(f"the .json of a sample must hold JSON, got: {error!r}; repair it") from error
        if not isinstance(known, dict):
            raise DataError(f"the .json of a sample must hold an object, got {type(known).__name__}; repair it")
        return known


@dataclass(frozen=True, slots=True)
class Part:
    """`count` samples: of a tar from the header at byte `start` on, or these files below `root`."""

    root: Path
    suffixes: tuple[str, ...]
    count: int
    tar: Path | None = None
    start: int = 0
    files: tuple[Path, ...] = ()

    def items(self) -> Iterator[Item]:
        """The samples in order; where a tar is damaged, one more without a medium stands for the rest of it."""
        if self.tar is None:
            members = (Member(_stem(path, root=self.root), path.suffix, Place(path)) for path in self.files)
        else:
            members = _members(self.tar, start=self.start)
        return islice(_items(members, part=self), self.count)

    def digest(self) -> str:
        """Changes with the names, sizes and times of the files, so that work done on others is not taken for it."""
        paths = [self.tar] if self.tar else list(self.files)
        stats = [(str(path.relative_to(self.root)), *_size_and_time(path)) for path in paths]
        return hashlib.sha256(repr((self.suffixes, self.start, self.count, stats)).encode()).hexdigest()


def parts_of(root: Path, *, suffixes: tuple[str, ...], samples: int, repeats: int | None = None) -> list[Part]:
    """Everything below a folder, at most `samples` a part: the tars' if there are any, else the files'.

    Raises DataError if there is nothing, or more than `repeats` samples have the key of another.
    """
    if not root.is_dir():
        raise DataError(f"{root} must be a folder of media or of WebDataset tars, got none; change --data")
    tars = sorted(root.rglob("*.tar"))
    keys = Keys(most=repeats)
    parts = _parts_of_tars(tars, root=root, suffixes=suffixes, samples=samples, keys=keys)
    if not tars:
        parts = _parts_of_files(root, suffixes=suffixes, samples=samples, keys=keys)
    if not parts:
        raise DataError(f"{root} must hold files of {', '.join(suffixes)} or tars of them, got none; change --data")
    return parts


class Keys:
    """Those that were seen, and how often one was seen again: found here, before anything is encoded."""

    def __init__(self, *, most: int | None) -> None:
        self.most, self.repeats = most, 0
        self._seen: set[str] = set()

    def add(self, key: str) -> None:
        """Raises DataError beyond the limit; without one nothing is kept."""
        if self.most is None:
            return
        self.repeats += key in self._seen
        self._seen.add(key)
        if self.repeats > self.most:
            raise DataError(
                f"at most {self.most} samples may have the key of another, got {self.repeats}, the last {key}; rename "
                "them (dots and slashes count as _), or set a higher --max-bad-samples"
            )


def _parts_of_tars(
    tars: Iterable[Path], *, root: Path, suffixes: tuple[str, ...], samples: int, keys: Keys
) -> list[Part]:
    parts = []
    for tar in tars:
        starts = []
        for stem, group in groupby(_members(tar), key=lambda member: member.stem):
            keys.add(_plain(stem))
            starts.append(next(group).header)
        parts += [
            Part(root, suffixes, count=min(samples, len(starts) - first), tar=tar, start=starts[first])
            for first in range(0, len(starts), samples)
        ]
    return parts


def _parts_of_files(root: Path, *, suffixes: tuple[str, ...], samples: int, keys: Keys) -> list[Part]:
    wanted = {*suffixes, ".txt", ".json"}
    files = sorted(
        (path for path in root.rglob("*") if path.suffix.lower() in wanted),
        key=lambda path: (_stem(path, root=root), path.suffix),
    )
    groups = [tuple(group) for _, group in groupby(files, key=lambda path: _stem(path, root=root))]
    groups = [group for group in groups if any(path.suffix.lower() in suffixes for path in group)]
    for group in groups:
        keys.add(_plain(_stem(group[0], root=root)))
    return [
        Part(root, suffixes, count=len(chosen), files=tuple(path for group in chosen for path in group))
        for first in range(0, len(groups), samples)
        if (chosen := groups[first : first + samples])
    ]


def _stem(path: Path, *, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def _plain(name: str) -> str:
    """WebDataset splits names at dots and slashes."""
    return re.sub(r"[./]", "_", _printable(name).strip("./")) or "unnamed"


def _printable(name: str) -> str:
    """Bytes of a file's name that are no UTF-8, which Python keeps as lone surrogates, spelt out."""
    return name.encode("utf-8", "backslashreplace").decode()


def _size_and_time(path: Path) -> tuple[int, int]:
    """(-1, 0) of what cannot be looked at, such as a link to nowhere: it is a bad sample once it is read."""
    try:
        found = path.stat()
    except OSError:
        return -1, 0
    return found.st_size, found.st_mtime_ns


def _members(tar: Path, *, start: int = 0) -> Iterator[Member]:
    """By headers alone. Where the tar breaks off or a header is damaged, a last one without an ending says so."""
    end, rest = start, f"rest-of-{tar.stem}"
    try:
        size = tar.stat().st_size
        with tar.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  else it keeps every header
                    if member.isfile():
                        folder, _, name = member.name.rpartition("/")
                        stem, _, suffix = name.partition(".")
                        place = Place(tar, member.offset_data, member.size)
                        yield Member(f"{folder}/{stem}", f".{suffix}", place, member.offset)
                    end = member.offset_data + member.size
                    if end > size:
                        return  # reading it names it
                # tarfile takes what is no header for the end
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    yield Member(rest, "", Place(tar), archive.offset)
    except (OSError, tarfile.TarError, EOFError):
        yield Member(rest, "", Place(tar), end)


def _items(members: Iterable[Member], *, part: Part) -> Iterator[Item]:
    for stem, group in groupby(members, key=lambda member: member.stem):
        named = {Path(member.ending).suffix.lower() or member.ending.lower(): member.place for member in group}
        suffix = next((one for one in part.suffixes if one in named), "")
        shard = _printable(str(part.tar if part.tar else part.root))
        media = named[suffix] if suffix else None
        yield Item(_plain(stem), shard, suffix, media, caption=named.get(".txt"), facts=named.get(".json"))
