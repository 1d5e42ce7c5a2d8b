"""Files of pictures, sound and video <-> the normalised latents that the model sees."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from matformer.autoencoders import Autoencoder, load_autoencoder
from matformer.autoencoders.preparation import SUFFIXES, Preparation, as_media
from matformer.config.schema import MediaConfig, RunConfig
from matformer.data.coders import check_accepted, coders_of
from matformer.data.holdings import latents_of, manifest_of
from matformer.data.latents import Normalisation
from matformer.data.sources import MediaSpan, media_span
from matformer.engine.video_file import write_mp4
from matformer.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MediaCodec:
    """The autoencoder of one modality, and the preparation and normalisation that its data set was written with."""

    modality: str
    media: MediaConfig
    autoencoder: Autoencoder
    normalisation: Normalisation
    preparation: Preparation

    @torch.no_grad()
    def decode(self, latent: Float[np.ndarray, "C ..."]) -> Tensor:
        """A normalised latent [C, *grid] -> the medium [c, *axes]."""
        mean = self.normalisation.inverse(latent).astype(np.float32)
        return self.autoencoder.decode(torch.from_numpy(mean)[None])[0]

    @torch.no_grad()
    def encode(self, media: Tensor) -> MediaSpan:
        """The medium [c, *axes] -> a given span. Raises DataError where its grid is no shape bucket, or it has no
        finite latent.
        """
        mean = self.autoencoder.encode(media[None]).mean[0].half().float().numpy()  # shards hold float16
        if not np.isfinite(mean).all():
            raise DataError("latents must be finite in float16, got nan or infinity; bring another medium")
        return media_span(self.normalisation.forward(mean), self.modality, media=self.media, role="given")

    @property
    def suffix(self) -> str:
        """Of the files that `write` makes: sound, pictures, video, or arrays for whatever else."""
        return SUFFIXES[self.preparation.modality][0]

    def write(self, path: Path, media: Tensor) -> None:
        """A medium as `decode` gives it into a file named by `suffix`. Raises DataError where it is not finite."""
        if not media.isfinite().all():
            raise DataError(
                f"a medium of {self.modality} must be finite to be written, got nan or infinity for {path}; prepare "
                "data.root again, its autoencoder gives no numbers"
            )
        rate = self.autoencoder.sample_rate
        if rate is not None:
            soundfile.write(path, media.clamp(-1, 1).T.numpy(), rate, subtype="PCM_16")
        elif path.suffix == ".mp4":
            write_mp4(path, media.movedim(1, 0), fps=self.preparation.fps)
        elif path.suffix == ".png":
            pixels = ((media + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.movedim(0, 2).contiguous().numpy()).save(path)
        else:
            np.save(path, media.numpy())

    def read(self, path: Path) -> MediaSpan:
        """A file of a kind that the autoencoder codes, prepared as the data were: a given span.

        Raises DataError, with the path, if it cannot be read or fits no shape bucket.
        """
        try:
            _, array = self.preparation.read(path.read_bytes(), suffix=path.suffix.lower())
            return self.encode(as_media([array])[0])
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except OSError as error:
            raise DataError(f"a file must be readable, got: {error}; name another") from error


def load_codec(config: RunConfig, modality: str) -> MediaCodec:
    """The codec that encoded a run's data of `modality`, found by the manifest of the first source that holds it.

    Raises DataError if no data set of the run names one, or it cannot be read.
    """
    for name, source in config.data.sources.items():
        folder = Path(config.data.root) / source.path / "train"
        manifest = manifest_of(config.data, name)
        latents, coder = latents_of(manifest, modality), coders_of(manifest).get(modality)
        if latents and coder:
            check_accepted(coder, where=folder)
            autoencoder = load_autoencoder(Path(config.data.root) / coder["folder"], fingerprint=coder["fingerprint"])
            media = config.model.media[modality]
            normalisation = Normalisation.of(config.data, modality, media=media)
            preparation = _preparation(manifest, autoencoder, modality=modality, media=media)
            return MediaCodec(modality, media, autoencoder, normalisation, preparation)
    raise DataError(
        f"a data set below {config.data.root} must hold {modality} and name its autoencoder, got none; "
        "set data.sources or prepare the data again"
    )


def _preparation(
    manifest: dict[str, Any], autoencoder: Autoencoder, *, modality: str, media: MediaConfig
) -> Preparation:
    """Of the data set, into the model's shape buckets; the defaults where the manifest does not say."""
    written = manifest.get("preparation", {})
    as_written = {name: written[name] for name in ("fit", "level", "fps") if name in written}
    keys = {"buckets": f"model.media.{modality}.buckets"}
    return Preparation.of(autoencoder, buckets=media.buckets, keys=keys, **as_written)
