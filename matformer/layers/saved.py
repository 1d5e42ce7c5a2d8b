"""A small trained module as two files, settings and weights, and the fingerprint by which others remember it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Saved:
    """The bytes of the two files. settings: JSON; weights: safetensors."""

    settings: bytes
    weights: bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings, then of the weights: of every byte that `write` writes."""
        return hashlib.sha256(self.settings + self.weights).hexdigest()

    def write(self, folder: Path, *, settings_file: str, weights_file: str) -> None:
        """Into `folder`, which is made when missing."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / weights_file).write_bytes(self.weights)
        (folder / settings_file).write_bytes(self.settings)


def saved(module: nn.Module, settings: Mapping[str, Any], *, sort_keys: bool) -> Saved:
    """A module and what builds it anew. Manifests hold fingerprints of these bytes, so they must not change."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    record = json.dumps(settings, indent=1, sort_keys=sort_keys) + "\n"
    return Saved(record.encode(), safetensors.torch.save(state))
