"""What a checkpoint folder contains, and how it is trusted: SHA-256 of every file, written before the rename."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from matformer.errors import CheckpointError

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Name every file of the folder with size and digest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1))


def verify(folder: Path) -> None:
    """Raises CheckpointError, naming the file, unless every file is there and has its digest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {folder} has no readable {MANIFEST} ({error}); delete this folder"
        ) from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {folder} has format {manifest.get('format')}, this program reads {FORMAT}")
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} lacks its file {name}; delete this folder")
        seen = digest(path)
        if seen != entry["sha256"]:
            raise CheckpointError(
                f"checkpoint file {path} is damaged: expected SHA-256 {entry['sha256'][:12]}…, found {seen[:12]}…; "
                "delete this folder to go on from an older checkpoint"
            )
