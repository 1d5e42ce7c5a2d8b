"""What the model is told of its data before it sees them: the variance of each latent channel."""

from __future__ import annotations

from matformer.config.schema import DataConfig, MediaConfig, RunConfig
from matformer.data.holdings import latents_of, manifest_of, scored_sources
from matformer.errors import DataError

FLOOR = 1e-4
"""Smallest variance of a channel, where the mean over channels is 1: what is smaller is scaled up no further."""


def with_statistics(config: RunConfig) -> RunConfig:
    """The config with `channel_variance` of every latent modality filled in, where it is asked for and known.

    Raises DataError if a manifest cannot be read or has other channels than the model.
    """
    media = {name: _known(name, media, data=config.data) for name, media in config.model.media.items()}
    return config.model_copy(update={"model": config.model.model_copy(update={"media": media})})


def _known(name: str, media: MediaConfig, *, data: DataConfig) -> MediaConfig:
    if media.precondition != "channel" or media.channel_variance is not None:
        return media
    for source in scored_sources(data, name):
        variance = _variances(name, source, data=data)
        if len(variance) != media.channels:
            raise DataError(
                f"latents of {name} must have model.media.{name}.channels = {media.channels} channels, got "
                f"{len(variance)} in data.sources.{source}; change one of them"
            )
        return media.model_copy(update={"channel_variance": variance})
    return media


def _variances(modality: str, source: str, *, data: DataConfig) -> tuple[float, ...]:
    """Of normalised channels, from a source's manifest."""
    latents = latents_of(manifest_of(data, source), modality) or {}
    try:
        return tuple(max(FLOOR, value * latents["scale"] ** 2) for value in latents["channel_variance"])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"the manifest of data.sources.{source} must hold the latents' statistics of {modality}, got: {error!r}; "
            "set data.root or prepare the data again"
        ) from error
