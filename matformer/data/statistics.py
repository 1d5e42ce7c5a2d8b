"""What the model is told of its data before it sees them: the variance of each latent channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from matformer.config.schema import DataConfig, MediaConfig, RunConfig
from matformer.data.holdings import latents_of_run, scored_sources
from matformer.data.latents import FLOOR, Normalisation
from matformer.errors import DataError


def with_statistics(config: RunConfig) -> RunConfig:
    """The config with `channel_variance` of every latent modality filled in, where it is asked for and known.

    Raises DataError if a manifest cannot be read or has other channels than the model.
    """
    media = {name: _known(name, media, data=config.data) for name, media in config.model.media.items()}
    return config.model_copy(update={"model": config.model.model_copy(update={"media": media})})


def _known(name: str, media: MediaConfig, *, data: DataConfig) -> MediaConfig:
    if media.precondition != "channel" or media.channel_variance is not None:
        return media
    scored = scored_sources(data, name)
    if not scored:
        return media
    source, latents = latents_of_run(data, name) or (scored[0], {})
    if "channel_variance" not in latents:
        raise DataError(
            f"the manifest of data.sources.{source} must hold the latents' statistics of {name}, got no "
            "channel_variance; set data.root or prepare the data again"
        )
    variance = _variance_as_read(latents, media=media, scale=Normalisation.of(data, name, media=media).scale)
    if len(variance) != media.channels:
        raise DataError(
            f"latents of {name} must have model.media.{name}.channels = {media.channels} channels, got "
            f"{len(variance)} in data.sources.{source}; change one of them"
        )
    return media.model_copy(update={"channel_variance": tuple(variance.tolist())})


def _variance_as_read(
    latents: Mapping[str, Any], *, media: MediaConfig, scale: Float[np.ndarray, " C"]
) -> Float[np.ndarray, " C"]:
    """Of the means, and of what is drawn onto them."""
    drawn = latents.get("channel_noise", 0.0) if media.latent_noise == "moments" else 0.0
    stored = np.asarray(latents["channel_variance"], np.float64) + np.asarray(drawn)
    return np.maximum(FLOOR, stored * scale**2 + media.fixed_noise**2)
