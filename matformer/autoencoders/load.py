"""A saved autoencoder's folder -> the autoencoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch

from matformer.autoencoders.base import SETTINGS_FILE, WEIGHTS_FILE, Autoencoder
from matformer.autoencoders.clip_pca import ClipPCA
from matformer.autoencoders.convolutional import ConvolutionalAutoencoder
from matformer.autoencoders.from_diffusers import is_diffusers_folder, load_diffusers
from matformer.autoencoders.mdct_pca import MDCTPCA
from matformer.autoencoders.motion_field import MotionField
from matformer.autoencoders.patch_pca import PatchPCA
from matformer.errors import DataError

KINDS: dict[str, Callable[..., Autoencoder]] = {
    PatchPCA.kind: PatchPCA,
    MDCTPCA.kind: MDCTPCA,
    ClipPCA.kind: ClipPCA,
    MotionField.kind: MotionField,
    ConvolutionalAutoencoder.kind: ConvolutionalAutoencoder,
}


def load_autoencoder(folder: Path, *, fingerprint: str | None = None) -> Autoencoder:
    """Read what `Autoencoder.save` or diffusers wrote; with `fingerprint`, insist that it is that very one.

    Raises DataError if a file is missing or damaged, the kind is unknown, or the fingerprint differs.
    """
    autoencoder = load_diffusers(folder) if is_diffusers_folder(folder) else _load_own(folder)
    if fingerprint is not None and autoencoder.fingerprint != fingerprint:
        raise DataError(
            f"the autoencoder in {folder} must have fingerprint {fingerprint}, got {autoencoder.fingerprint}; "
            "use the one that encoded the data set, or prepare data.root again"
        )
    return autoencoder.eval()


def _load_own(folder: Path) -> Autoencoder:
    try:
        record = json.loads((folder / SETTINGS_FILE).read_bytes())
        kind, settings = str(record["kind"]), dict(record["settings"])
        state = safetensors.torch.load((folder / WEIGHTS_FILE).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise DataError(
            f"{folder} must hold a readable {SETTINGS_FILE} and {WEIGHTS_FILE}, got {error!r}; prepare data.root again"
        ) from error
    if kind not in KINDS:
        raise DataError(f"an autoencoder must be one of {sorted(KINDS)}, got {kind!r} in {folder}; check data.root")
    try:
        autoencoder = KINDS[kind](**settings)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise DataError(
            f"{SETTINGS_FILE} in {folder} must hold the settings of {kind}, got {error!r}; prepare data.root again"
        ) from error
    try:
        autoencoder.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(
            f"the weights in {folder} must fit their settings, got {error}; prepare data.root again"
        ) from error
    return autoencoder
