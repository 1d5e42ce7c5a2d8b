"""The on-disk format: WebDataset tars, an index of digests beside each, one manifest a data set; writer and reader."""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from matformer.errors import DataError

FORMAT = "matformer-shards-1"
MANIFEST = "manifest.json"
_HEADERS_IN_MEMORY = 256


class Member(NamedTuple):
    """Where one member's bytes lie in its tar, and what they must hash to (SHA-256, hex)."""

    offset: int
    size: int
    sha256: str


class ShardWriter:
    """Write samples to `folder`; a context manager: the folder appears whole at a clean exit, or not at all.

    A new shard begins once the present one holds `shard_bytes`. `extra` goes into the manifest as it is
    (provenance, latents' statistics, patcher); it may be completed through `extra` until the exit.
    """

    def __init__(
        self, folder: Path, *, form: str, shard_bytes: int = 64 << 20, extra: dict[str, Any] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.form = form
        self.shard_bytes = shard_bytes
        self.extra = dict(extra or {})
        self._beside = self.folder.with_name(f".{self.folder.name}.writing-{os.getpid()}")
        self._keys: set[str] = set()
        self._shards: list[dict[str, Any]] = []
        self._samples: list[dict[str, Any]] = []
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> ShardWriter:  # noqa: PYI034 (the shape checker of the tests refuses Self)
        shutil.rmtree(self._beside, ignore_errors=True)
        self._beside.mkdir(parents=True)
        return self

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample; keys are unique and hold neither dots nor slashes (WebDataset splits there)."""
        if not key or "." in key or "/" in key or key in self._keys:
            raise DataError(f"a sample's key must be new and without dots or slashes, got {key!r}; rename the sample")
        if not members:
            raise DataError(f"a sample must have at least one member, got none for key {key!r}; leave the sample out")
        self._keys.add(key)
        tar = self._open_shard()
        index = {name: _append(tar, f"{key}.{name}", data=bytes(data)) for name, data in members.items()}
        self._samples.append({"key": key, "members": index})
        if tar.offset >= self.shard_bytes:
            self._close_shard()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._tar is not None:
                self._tar.close()
            shutil.rmtree(self._beside, ignore_errors=True)
            return
        self._close_shard()
        manifest = {
            **self.extra,
            "format": FORMAT,
            "form": self.form,
            "samples": sum(shard["samples"] for shard in self._shards),
            "bytes": sum(shard["bytes"] for shard in self._shards),
            "shards": self._shards,
        }
        _write_json(self._beside / MANIFEST, manifest)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.replace(self._beside, self.folder)

    def _open_shard(self) -> tarfile.TarFile:
        if self._tar is None:
            name = f"shard-{len(self._shards):06d}.tar"
            self._tar = tarfile.open(self._beside / name, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        return self._tar

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        name = f"shard-{len(self._shards):06d}"
        with (self._beside / f"{name}.tar").open(
            "rb"
        ) as file:  # a rename may outlive a power cut that its bytes do not
            os.fsync(file.fileno())
        text = _write_json(self._beside / f"{name}.index.json", {"samples": self._samples})
        size = sum(member.size for sample in self._samples for member in sample["members"].values())
        digest = hashlib.sha256(text).hexdigest()
        self._shards.append({"name": name, "samples": len(self._samples), "bytes": size, "index_sha256": digest})
        self._samples = []


class ShardReader:
    """Samples of one data set in their written order, memory-mapped and checked against their digests."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = _read_manifest(self.folder)
        self._maps: dict[int, mmap.mmap] = {}
        self._samples: list[tuple[int, str, dict[str, Member]]] = []
        self._checked: set[tuple[int, str]] = set()
        self._headers: dict[bytes, tuple[np.dtype, tuple[int, ...], int]] = {}
        for number, shard in enumerate(self.manifest["shards"]):
            for sample in self._read_index(shard):
                members = {name: Member(*where) for name, where in sample["members"].items()}
                self._samples.append((number, sample["key"], members))

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, i: int) -> str:
        """The key of sample i."""
        return self._samples[i][1]

    def names(self, i: int) -> tuple[str, ...]:
        """Names of sample i's members."""
        return tuple(self._samples[i][2])

    def read(self, i: int) -> dict[str, bytes]:
        """All members of sample i, their digests verified. Raises DataError that names shard, key and digests."""
        return {name: bytes(self._verified(i, name)) for name in self._samples[i][2]}

    def view(self, i: int, name: str) -> memoryview:
        """One member without a copy; its digest is verified at the first view only. Raises DataError."""
        if (i, name) in self._checked:
            return self._raw(i, name)
        data = self._verified(i, name)
        self._checked.add((i, name))
        return data

    def array(self, i: int, name: str) -> np.ndarray:
        """A `.npy` member as a read-only array over the memory map. Raises DataError."""
        data = self.view(i, name)
        dtype, shape, start = self._array_header(data, i=i, name=name)
        return np.frombuffer(data, dtype=dtype, count=int(np.prod(shape)), offset=start).reshape(shape)

    def array_length(self, i: int, name: str) -> int:
        """First dim of a `.npy` member, from its header alone (no digest is checked). Raises DataError."""
        return self._array_header(self._raw(i, name), i=i, name=name)[1][0]

    def _array_header(self, data: memoryview, *, i: int, name: str) -> tuple[np.dtype, tuple[int, ...], int]:
        start = bytes(data[: 10 + int.from_bytes(data[8:10], "little")])  # version 1.0: magic, version, length, header
        if start not in self._headers:  # numpy parses a header as Python source: slow, and most are equal
            self._headers[start] = self._parse_header(data, i=i, name=name)
            if len(self._headers) > _HEADERS_IN_MEMORY:
                self._headers.pop(next(iter(self._headers)))
        return self._headers[start]

    def _parse_header(self, data: memoryview, *, i: int, name: str) -> tuple[np.dtype, tuple[int, ...], int]:
        head = io.BytesIO(data[:4096])
        try:
            version = np.lib.format.read_magic(head)
            if version != (1, 0):
                raise ValueError(f"npy version {version}")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
        except ValueError as error:
            raise DataError(f"{self.where(i, name)} must be a .npy array of version 1.0, got: {error}") from error
        if fortran or dtype.hasobject:
            raise DataError(f"{self.where(i, name)} must be a plain array in C order, got {dtype}, fortran={fortran}")
        return dtype, shape, head.tell()

    def where(self, i: int, name: str) -> str:
        """A member of sample i by key and shard, for errors."""
        number, key, _ = self._samples[i]
        return f"member {name} of key {key} in shard {self.folder / self.manifest['shards'][number]['name']}.tar"

    def _raw(self, i: int, name: str) -> memoryview:
        number, _, members = self._samples[i]
        if name not in members:
            raise DataError(f"{self.where(i, name)} must exist, got members {sorted(members)}; prepare the data again")
        start = members[name].offset
        return memoryview(self._map(number))[start : start + members[name].size]

    def _verified(self, i: int, name: str) -> memoryview:
        data = self._raw(i, name)
        expected, seen = self._samples[i][2][name].sha256, hashlib.sha256(data).hexdigest()
        if expected != seen:
            where = self.where(i, name)
            raise DataError(f"{where} must have digest {expected}, got {seen}; prepare the data set again")
        return data

    def _map(self, number: int) -> mmap.mmap:
        if number not in self._maps:
            path = self.folder / f"{self.manifest['shards'][number]['name']}.tar"
            try:
                with path.open("rb") as file:
                    self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
                raise DataError(f"shard {path} must be readable, got: {error}; prepare the data set again") from error
        return self._maps[number]

    def _read_index(self, shard: dict[str, Any]) -> list[dict[str, Any]]:
        path = self.folder / f"{shard['name']}.index.json"
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"index {path} must be readable, got: {error}; prepare the data set again") from error
        expected, seen = shard["index_sha256"], hashlib.sha256(text).hexdigest()
        if expected != seen:
            raise DataError(f"index {path} must have digest {expected}, got {seen}; prepare the data set again")
        return json.loads(text)["samples"]


def _append(tar: tarfile.TarFile, name: str, *, data: bytes) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return Member(tar.offset - padded, len(data), hashlib.sha256(data).hexdigest())


def _write_json(path: Path, value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return text


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"a data set must have a readable {path}, got: {error}; set data.root, or prepare the demo's data "
            "with `bash slurm/pretrain.sh` or `python -m data_prep.demo --out ROOT`"
        ) from error
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path} must have format {FORMAT}, got {manifest.get('format')!r}; prepare the data set again")
    return manifest
