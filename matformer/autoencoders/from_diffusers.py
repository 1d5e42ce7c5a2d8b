"""Autoencoders of the diffusers library, from a local folder as its `save_pretrained` writes one."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors
import torch
from jaxtyping import Float
from torch import Tensor, nn

from matformer.autoencoders.base import LOGVAR_RANGE, Autoencoder, Moments
from matformer.errors import DataError

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class Facts:
    """What our interface asks and each diffusers class keeps somewhere else.

    causal_time: the first frame has a cell of its own, each further one holds `downsampling[0]` frames.
    """

    channels: int
    downsampling: tuple[int, ...]
    media_channels: int
    sample_rate: int | None = None
    stochastic: bool = True
    causal_time: bool = False
    shift: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None


def _kl(config: Mapping[str, Any]) -> Facts:
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return Facts(
        channels=config["latent_channels"],
        downsampling=(factor, factor),
        media_channels=config["in_channels"],
        shift=(config.get("shift_factor") or 0.0,),
        scale=(config["scaling_factor"],),
    )


def _dc(config: Mapping[str, Any]) -> Facts:
    factor = 2 ** (len(config["encoder_block_out_channels"]) - 1)
    return Facts(
        channels=config["latent_channels"],
        downsampling=(factor, factor),
        media_channels=config["in_channels"],
        stochastic=False,
        shift=(0.0,),
        scale=(config["scaling_factor"],),
    )


def _wan(config: Mapping[str, Any]) -> Facts:
    factor = 2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1)
    patch = config.get("patch_size") or 1
    return Facts(
        channels=config["z_dim"],
        downsampling=(2 ** sum(config["temperal_downsample"]), factor, factor),
        media_channels=config["in_channels"] // patch**2,
        causal_time=True,
        shift=tuple(config["latents_mean"]),
        scale=tuple(1 / deviation for deviation in config["latents_std"]),
    )


def _oobleck(config: Mapping[str, Any]) -> Facts:
    hop = 1
    for ratio in config["downsampling_ratios"]:
        hop *= ratio
    return Facts(
        channels=config["decoder_input_channels"],
        downsampling=(hop,),
        media_channels=config["audio_channels"],
        sample_rate=config["sampling_rate"],
    )


CLASSES: dict[str, Callable[[Mapping[str, Any]], Facts]] = {
    "AutoencoderKL": _kl,
    "AutoencoderDC": _dc,
    "AutoencoderKLWan": _wan,
    "AutoencoderOobleck": _oobleck,
}


@final
class DiffusersAutoencoder(Autoencoder):
    """One of `CLASSES` behind our interface; its kind is `diffusers.` and the name of its class."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401  the library is optional, so are its types
        super().__init__()
        name = type(model).__name__
        if name not in CLASSES:
            raise DataError(f"an autoencoder of diffusers must be one of {sorted(CLASSES)}, got {name}; use another")
        self.kind = f"diffusers.{name}"
        self.model: Any = model
        facts = CLASSES[name](model.config)
        self.channels, self.downsampling, self.stochastic = facts.channels, facts.downsampling, facts.stochastic
        self.media_channels, self.sample_rate = facts.media_channels, facts.sample_rate
        self.shift, self.scale = facts.shift, facts.scale
        self.causal_time = facts.causal_time

    def encode(self, media: Float[Tensor, "B c *axes"]) -> Moments:
        """Raises DataError unless the media are whole cells (else diffusers pads or drops silently)."""
        self._check(media)
        coded = self.model.encode(media)
        if not self.stochastic:
            return Moments(mean=coded.latent)
        return Moments(coded.latent_dist.mean, coded.latent_dist.logvar.clamp(*LOGVAR_RANGE))

    def decode(self, latent: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B c *axes"]:
        return self.model.decode(latent).sample

    def media_axes(self, grid: Sequence[int]) -> tuple[int, ...]:
        """See Autoencoder; with causal time, frames are one more than a multiple of the factor."""
        axes = super().media_axes(grid)
        return (1 + (grid[0] - 1) * self.downsampling[0], *axes[1:]) if self.causal_time else axes

    def settings(self) -> dict[str, Any]:
        """What its config sets otherwise than its class would: so a newer diffusers' new keys change no fingerprint."""
        defaults = inspect.signature(type(self.model).__init__).parameters
        set_here = {name: _plain(value) for name, value in self.model.config.items() if name in defaults}
        return {name: value for name, value in set_here.items() if value != _plain(defaults[name].default)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of kind, settings, and each tensor's name, type, shape and bytes: no second copy of the weights."""
        digest = hashlib.sha256(json.dumps([self.kind, self.settings()], sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # a bfloat16 tensor has no numpy type of its own
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """As diffusers does, so that diffusers reads it too."""
        self.model.save_pretrained(folder)

    def _check(self, media: Tensor) -> None:
        axes = tuple(media.shape[2:])
        first = int(self.causal_time)
        whole = len(axes) == len(self.downsampling) and all(
            (size - (first if axis == 0 else 0)) % factor == 0
            for axis, (size, factor) in enumerate(zip(axes, self.downsampling, strict=True))
        )
        if media.shape[1] != self.media_channels or not whole:
            raise DataError(
                f"media of {self.kind} must have {self.media_channels} channels and axes in multiples of "
                f"{self.downsampling}{' plus one frame' * first}, got shape {tuple(media.shape[1:])}; change --buckets"
            )


def _plain(value: Any) -> Any:  # noqa: ANN401
    """As JSON would give it back: tuples are lists."""
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def is_diffusers_folder(folder: Path) -> bool:
    """Whether `save_pretrained` of a diffusers model wrote it."""
    try:
        found = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "_class_name" in found


def load_diffusers(folder: Path) -> DiffusersAutoencoder:
    """Read a local folder, in float32. Raises DataError where diffusers is missing or cannot read it."""
    try:
        import diffusers  # noqa: PLC0415  optional: the extra `media`
    except ImportError as error:
        raise DataError(
            f"the autoencoder in {folder} needs diffusers, got {error}; install the extra with "
            "`pip install -e '.[media]'` in the project's folder"
        ) from error
    name = json.loads((folder / CONFIG_FILE).read_bytes())["_class_name"]
    if name not in CLASSES:
        raise DataError(
            f"an autoencoder of diffusers must be one of {sorted(CLASSES)}, got {name} in {folder}; name another folder"
        )
    try:
        model: nn.Module
        model, info = getattr(diffusers, name).from_pretrained(
            folder, local_files_only=True, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{folder} must be a whole folder of {name}.save_pretrained, got {reason}; copy it again"
        ) from error
    if fresh := sorted(info["missing_keys"]):  # diffusers draws them and goes on; of a wrong shape it refuses itself
        raise DataError(
            f"{folder} must hold every tensor of {name}, got none for {len(fresh)}, such as {fresh[0]}; copy it again"
        )
    return DiffusersAutoencoder(model.eval().requires_grad_(False))
