"""Stored moments -> the latents that a model sees: drawn about their mean, then normalised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from matformer.config.schema import DataConfig, MediaConfig
from matformer.data.holdings import latents_of_run
from matformer.data.shards import ShardReader
from matformer.errors import DataError

FLOOR = 1e-4
"""Smallest variance of a channel, as a share of the channels' mean: what is smaller is scaled up no further."""


@dataclass(frozen=True, slots=True, eq=False)
class Normalisation:
    """normalised = (latent - shift) * scale, a number a channel each (float64; latents are float32)."""

    shift: Float[np.ndarray, " C"]
    scale: Float[np.ndarray, " C"]

    @classmethod
    def of(cls, data: DataConfig, modality: str, *, media: MediaConfig) -> Normalisation:
        """What a run's data and the model's `normalisation` make of all its latents of `modality`.

        Raises DataError if no manifest says how.
        """
        source, latents = latents_of_run(data, modality) or ("*", {})
        wanted = ("shift", "scale" if media.normalisation == "one_scale" else "channel_variance")
        missing = [name for name in wanted if name not in latents]
        if missing:
            raise DataError(
                f"the manifest of data.sources.{source} must say how latents of {modality} are normalised, got no "
                f"{missing[0]}; prepare the data again or change model.media.{modality}.normalisation"
            )
        shift = np.asarray(latents["shift"], np.float64)
        if media.normalisation == "one_scale":
            return cls(shift, np.full(len(shift), latents["scale"], np.float64))
        variance = np.asarray(latents["channel_variance"], np.float64)
        return cls(shift, np.maximum(variance, FLOOR * variance.mean()) ** -0.5)

    def forward(self, latent: Float[np.ndarray, "C ..."]) -> Float[np.ndarray, "C ..."]:
        """As the model sees it."""
        return (latent - _by_channel(self.shift, latent)) * _by_channel(self.scale, latent)

    def inverse(self, normalised: Float[np.ndarray, "C ..."]) -> Float[np.ndarray, "C ..."]:
        """As the autoencoder decodes it."""
        return normalised / _by_channel(self.scale, normalised) + _by_channel(self.shift, normalised)


def read_latent(
    reader: ShardReader, place: tuple[int, str], *, normalisation: Normalisation, media: MediaConfig,
    draws: np.random.Generator,
) -> Float[np.ndarray, "C ..."]:  # fmt: skip
    """The normalised latent [C, *grid] (float32) in member `place` of a shard; `media.latent_noise` is drawn onto it.

    Raises DataError if it cannot be read, or has other channels than the normalisation.
    """
    index, member = place
    stored = reader.array(index, member).astype(np.float32)
    both = reader.manifest.get("kind") == "moments"  # then the log-variance stands behind the mean
    channels = len(stored) // 2 if both else len(stored)
    if channels != len(normalisation.shift):
        raise DataError(
            f"a latent must have the {len(normalisation.shift)} channels of its manifest, got {channels} in "
            f"{reader.where(index, member)}; prepare the data again"
        )
    latent = stored[:channels]
    if both and media.latent_noise == "moments":
        latent = latent + np.exp(0.5 * stored[channels:]) * draws.standard_normal(latent.shape, np.float32)
    normalised = normalisation.forward(latent)
    if media.fixed_noise:
        normalised = normalised + np.float32(media.fixed_noise) * draws.standard_normal(latent.shape, np.float32)
    return normalised


def _by_channel(numbers: Float[np.ndarray, " C"], latent: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float32).reshape(-1, *[1] * (latent.ndim - 1))
