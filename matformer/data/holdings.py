"""Which sources of a run hold a latent modality, and what their manifests say of its latents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matformer.config.schema import DataConfig
from matformer.errors import DataError


def latents_of(manifest: Mapping[str, Any], modality: str) -> Mapping[str, Any] | None:
    """Statistics of a modality's latents: a manifest holds those of one, or one a modality. None if it has none."""
    entry: Mapping[str, Any] = manifest.get("latents") or {}
    if "scale" in entry:
        return entry if manifest.get("modality", modality) == modality else None
    return entry.get(modality)


def manifest_of(data: DataConfig, source: str, *, split: str = "train") -> dict[str, Any]:
    """Of a source of the config. Raises DataError if it cannot be read."""
    path = Path(data.root) / data.sources[source].path / split / "manifest.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"a data set must have a readable {path}, got: {error}; set data.root or prepare the data"
        ) from error


def scored_sources(data: DataConfig, modality: str) -> list[str]:
    """Sources whose held-out spans of a modality are scored: its pairs that show media, or without any the documents.

    Raises DataError if a manifest cannot be read.
    """
    shown = [(name, one) for name, one in data.sources.items() if one.form == "pairs" and one.shows != "caption"]
    pairs = [name for name, one in shown if one.modality in (None, modality)]
    return pairs or [
        name
        for name, one in data.sources.items()
        if one.form == "documents" and latents_of(manifest_of(data, name), modality) is not None
    ]


def latents_of_run(data: DataConfig, modality: str) -> tuple[str, Mapping[str, Any]] | None:
    """The first source that holds latents of a modality, scored ones before others, and what its manifest says of them.

    It speaks for all sources of the run: a latent is one thing to the model, whichever data set it comes from. None if
    none holds any. Raises DataError if a manifest cannot be read.
    """
    may = [name for name, one in data.sources.items() if one.form != "text" and one.modality in (None, modality)]
    for source in (*scored_sources(data, modality), *may):
        latents = latents_of(manifest_of(data, source), modality)
        if latents is not None:
            return source, latents
    return None
