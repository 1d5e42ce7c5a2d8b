"""What a checkpoint folder contains, and how it is trusted: SHA-256 of every file, written before the rename."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matformer.errors import CheckpointError

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entries_of(files: Sequence[Path]) -> dict[str, dict[str, str | int]]:
    """What the manifest says of these files, by name: size and digest."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in files}


def write_manifest(folder: Path, entries: Mapping[str, Mapping[str, str | int]]) -> None:
    """Name the folder's files with size and digest."""
    in_order = dict(sorted(entries.items()))
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": in_order}, indent=1))


def verify(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Raises CheckpointError, naming the file, unless every file is there and has its digest.

    parts: of so many that share the files out, `part` alone is looked at here.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {folder} has no readable {MANIFEST} ({error}); delete this folder"
        ) from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {folder} has format {manifest.get('format')}, this program reads {FORMAT}")
    files = manifest["files"]
    for number, (name, entry) in enumerate(files.items()):
        if number * parts // len(files) != part:
            continue
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} lacks its file {name}; delete this folder")
        seen = digest(path)
        if seen != entry["sha256"]:
            raise CheckpointError(
                f"checkpoint file {path} is damaged: expected SHA-256 {entry['sha256'][:12]}…, found {seen[:12]}…; "
                "delete this folder to go on from an older checkpoint"
            )
