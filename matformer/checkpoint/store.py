"""Checkpoints without a layout: global tensors by name, saved by their owners, read by whoever needs them.

`step-000200/` holds safetensors files (torch.distributed.checkpoint), `state.json` and `manifest.json`. It is written
under another name and renamed when complete, so a folder that has its name can be trusted to have been finished.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from matformer.checkpoint.manifest import STATE, entries_of, verify, write_manifest
from matformer.errors import CheckpointError
from matformer.parallel.groups import everybody

log = logging.getLogger(__name__)


def save(folder: Path, step: int, *, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Write checkpoint `step` under `folder`; keep the newest `keep`. Collective: each rank brings what it owns.

    tensors: on the CPU.

    Raises CheckpointError (on all ranks) when the disk is full; older checkpoints are untouched then.
    """
    final, writing = folder / f"step-{step:06d}", folder / f".writing-step-{step:06d}"
    try:
        _check_room(folder, sum(t.numel() * t.element_size() for t in tensors.values()))
        _on_lead(lambda: _begin(writing))
        _write_tensors(writing, tensors)
        entries = _entries(writing, wrote=bool(tensors))
        _on_lead(lambda: _commit(writing, final, state=state, entries=entries))
    except (OSError, CheckpointException) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written ({_reason(error)}); free space or change run.folder"
        ) from error
    if _rank() == 0:
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def _begin(writing: Path) -> None:
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)


def _commit(writing: Path, final: Path, *, state: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
    (writing / STATE).write_text(json.dumps(state))
    write_manifest(writing, {**entries, **entries_of([writing / STATE])})
    shutil.rmtree(final, ignore_errors=True)
    writing.rename(final)


def _on_lead(action: Callable[[], None]) -> None:
    """Rank 0 acts alone and all ranks learn whether it could: none waits for ever. Collective. OSError on all."""
    failure: OSError | None = None
    if _rank() == 0:
        try:
            action()
        except OSError as error:
            failure = error
    if _over_world(float(failure is not None)) > 0:
        raise failure or OSError(errno.EIO, "rank 0 could not write")


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a single process is a single process
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save_tensors(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())


def _entries(folder: Path, *, wrote: bool) -> dict[str, Any]:
    """What the manifest is to say of all tensor files: each rank reads the one that it wrote. Collective."""
    mine: dict[str, Any] | OSError
    try:
        mine = entries_of(list(folder.glob(f"shard-{_rank() + 1:05d}-*.safetensors")))  # torch's name for it
        assert bool(mine) == wrote
    except OSError as error:
        mine = error
    found: dict[str, Any] = {}
    for one in everybody(mine):
        if isinstance(one, OSError):
            raise one
        found |= one
    return found


def _check_room(folder: Path, needed: int) -> None:
    """Every rank says what it will write; nobody begins unless it fits."""
    total = _over_world(float(needed))
    _on_lead(lambda: _measure(folder, total))


def _measure(folder: Path, needed: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")


def _over_world(value: float) -> float:
    """A number summed over all ranks. Collective."""
    total = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        total = total.cuda() if dist.get_backend() == "nccl" else total
        dist.all_reduce(total)
    return float(total)


def _reason(error: BaseException) -> str:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in full:
        return f"disk full: {error.strerror}"
    text = " ".join(str(error).split())
    signs = [sign for number in full for sign in (os.strerror(number), f"code: {number}")]
    return "disk full" if any(sign in text for sign in signs) else text[:300]


def complete(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Steps done when the checkpoint of this folder was saved."""
    return int(path.name.removeprefix("step-"))  # names past a million have more digits: as text they sort wrong


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint whose digests hold; damaged ones are named and passed over. None if there is none at all.

    Collective: its files are dealt out to the ranks. Raises CheckpointError (on all ranks) if there are checkpoints
    but none is good: a run must not silently begin anew.
    """
    candidates = everybody(complete(folder))[0]
    for path in reversed(candidates):
        damages = [damage for damage in everybody(_damage(path)) if damage]
        if not damages:
            return path
        if _rank() == 0:
            log.warning("%s", damages[0])
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {folder} is whole; delete the folder to begin anew"
        )
    return None


def _damage(path: Path) -> str:
    """What this rank finds wrong in its part of a checkpoint's files; "" if nothing."""
    try:
        verify(path, part=_rank(), parts=dist.get_world_size() if dist.is_initialized() else 1)
    except CheckpointError as error:
        return str(error)
    return ""


class Checkpoint:
    """A finished checkpoint, read in pieces by global name.

    Each tensor is whole in one of the safetensors files, so it is taken from there: torch's own reader goes through
    the index of all tensors at every call, which over thousands of names adds up to minutes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: dict[str, Any] = json.loads((path / STATE).read_text())
        self._files = [safe_open(file, framework="pt") for file in sorted(path.glob("*.safetensors"))]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - no mapping
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Global float32 tensors. Local to the rank. Raises CheckpointError naming what the checkpoint lacks."""
        missing = [key for key in keys if key not in self.shapes]
        if missing:
            raise CheckpointError(
                f"checkpoint {self.path} holds no {missing[0]}: it belongs to another model; "
                "change model.* back or choose another run name"
            )
        return {key: self._file_of[key].get_tensor(key).float() for key in keys}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
