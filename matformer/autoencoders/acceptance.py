"""The record that an autoencoder was looked at before a data set is encoded with it: numbers, thresholds, verdict."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matformer.autoencoders.base import Autoencoder
from matformer.errors import DataError
from matformer.files import write_whole

RECORD_FOLDER, RECORD_FILE = "acceptance", "acceptance.json"
COMMAND = "python -m data_prep.accept_autoencoder --autoencoder {folder} --data MEDIA --buckets SHAPES"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """quality: by measure. thresholds: by measure, what was asked. failed: a phrase each for what was not met.

    latents: channel statistics (mean, std, kurtosis).
    """

    fingerprint: str
    kind: str
    samples: int
    quality: dict[str, float]
    thresholds: dict[str, float]
    failed: list[str]
    latents: dict[str, list[float]]
    preparation: dict[str, Any]

    @property
    def accepted(self) -> bool:
        """Nothing failed."""
        return not self.failed

    def manifest(self) -> dict[str, Any]:
        """As manifests carry it."""
        return asdict(self) | {"accepted": self.accepted}

    def save(self, folder: Path) -> None:
        """Into `folder`, which is made when missing."""
        write_whole(folder / RECORD_FILE, (json.dumps(self.manifest(), indent=1) + "\n").encode())


def read_acceptance(folder: Path) -> Acceptance | None:
    """The record in `folder`; None if there is none. Raises DataError if it cannot be read."""
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        found.pop("accepted")
        return Acceptance(**found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} must be a record of an acceptance, got {error!r}; accept the autoencoder again"
        ) from error


def require_accepted(autoencoder: Autoencoder, *, folder: Path, record: Path | None = None) -> Acceptance:
    """The record of this very autoencoder, from `record` or beside it. Raises DataError unless it was accepted."""
    found = read_acceptance(record or folder / RECORD_FOLDER)
    command = COMMAND.format(folder=folder)
    if found is None:
        raise DataError(
            f"the autoencoder in {folder} must be accepted before it encodes, got no record; run `{command}`"
        )
    if found.fingerprint != autoencoder.fingerprint:
        raise DataError(
            f"the acceptance of {folder} must be of fingerprint {autoencoder.fingerprint}, got {found.fingerprint}; "
            f"run `{command}`"
        )
    if not found.accepted:
        raise DataError(
            f"the autoencoder in {folder} must be accepted before it encodes, got {'; '.join(found.failed)}; use a "
            f"better one, or lower the thresholds of `{command}`"
        )
    return found
