"""What manifests say of the autoencoders that made their latents, and which of them are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matformer.errors import DataError

CLOSED_FORM = ("patch_pca", "mdct_pca", "clip_pca")
"""Fitted on the very data set, their held-out quality stands in its manifest: they need no acceptance beside."""
COMMAND = "python -m data_prep.accept_autoencoder --autoencoder FOLDER --data MEDIA --buckets SHAPES"


def coders_of(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Modality -> its autoencoder's identity; a manifest holds one, or one a modality."""
    entry = manifest.get("autoencoder") or {}
    return {manifest.get("modality", entry.get("modality")): entry} if "fingerprint" in entry else dict(entry)


def check_accepted(coder: Mapping[str, Any], *, where: Path) -> None:
    """Raises DataError unless the autoencoder was accepted: it, and not another of its name."""
    record = coder.get("acceptance")
    if record is None and coder.get("kind") in CLOSED_FORM:
        return
    if not record or not record.get("accepted"):
        failed = "; ".join((record or {}).get("failed", [])) or "no record of an acceptance"
        raise DataError(
            f"the autoencoder of {where} must be accepted before its latents are used, got {failed}; run `{COMMAND}`"
        )
    if record.get("fingerprint") != coder.get("fingerprint"):
        raise DataError(
            f"the acceptance in {where} must be of fingerprint {coder.get('fingerprint')}, got "
            f"{record.get('fingerprint')}; run `{COMMAND}` on that autoencoder"
        )


def check_same(manifests: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raises DataError where two data sets of a run hold latents of one modality by different autoencoders."""
    seen: dict[str, tuple[Path, str]] = {}
    for folder, manifest in manifests.items():
        for modality, coder in coders_of(manifest).items():
            before, fingerprint = seen.setdefault(modality, (folder, coder["fingerprint"]))
            if coder["fingerprint"] != fingerprint:
                raise DataError(
                    f"all latents of {modality} in a run must be of one autoencoder, got fingerprint {fingerprint} in "
                    f"{before} and {coder['fingerprint']} in {folder}; change data.sources"
                )
