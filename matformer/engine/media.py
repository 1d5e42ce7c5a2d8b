"""Files of pictures, sound and video <-> the normalised latents that the model sees."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from matformer.autoencoders import Autoencoder, load_autoencoder
from matformer.config.schema import MediaConfig, RunConfig
from matformer.data.coders import check_accepted, coders_of
from matformer.data.holdings import latents_of, manifest_of
from matformer.data.latents import Normalisation
from matformer.data.sources import MediaSpan, media_span
from matformer.engine.video_file import write_mp4
from matformer.errors import ConfigError, DataError

log = logging.getLogger(__name__)

SUFFIXES = {"audio": ".wav", "image": ".png", "video": ".mp4", "tensor": ".npy"}
"""Of a sample's file, by what the autoencoder codes; arrays for whatever is none of the three."""
FPS = 8.0
"""Frames a second of video whose data set does not say."""
LOUDNESS, PEAK, SILENCE = 0.08, 0.99, 0.002  # as the demo's speech was prepared: full scale is 1


@dataclass(frozen=True)
class MediaCodec:
    """The autoencoder of one modality and the normalisation that its data set was written with."""

    modality: str
    media: MediaConfig
    autoencoder: Autoencoder
    normalisation: Normalisation
    fps: float = FPS

    @torch.no_grad()
    def decode(self, latent: Float[np.ndarray, "C ..."]) -> Tensor:
        """A normalised latent [C, *grid] -> the medium [c, *axes]."""
        mean = self.normalisation.inverse(latent).astype(np.float32)
        return self.autoencoder.decode(torch.from_numpy(mean)[None])[0]

    @torch.no_grad()
    def encode(self, media: Tensor) -> MediaSpan:
        """The medium [c, *axes] -> a given span. Raises DataError where its grid is no shape bucket."""
        mean = self.autoencoder.encode(media[None]).mean[0].half().float().numpy()  # shards hold float16
        return media_span(self.normalisation.forward(mean), self.modality, media=self.media, role="given")

    def axes(self, bucket: int) -> tuple[int, ...]:
        """Pixels or samples of the medium in a shape bucket."""
        return tuple(self.decode(np.zeros((self.media.channels, *self.media.buckets[bucket]), np.float32)).shape[1:])

    @property
    def suffix(self) -> str:
        """Of the files that `write` makes: sound, pictures, video, or arrays for whatever else."""
        return SUFFIXES[self.autoencoder.modality]

    def write(self, path: Path, media: Tensor) -> None:
        """A medium as `decode` gives it into a file named by `suffix`."""
        rate = self.autoencoder.sample_rate
        if rate is not None:
            wave = media[0].clamp(-1, 1).numpy()
            soundfile.write(path, wave, rate, subtype="PCM_16")
        elif path.suffix == ".mp4":
            write_mp4(path, media.movedim(1, 0), fps=self.fps)
        elif path.suffix == ".png":
            pixels = ((media + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.movedim(0, 2).contiguous().numpy()).save(path)
        else:
            np.save(path, media.numpy())

    def read(self, path: Path) -> MediaSpan:
        """A file of any kind that pillow or libsndfile opens, prepared as the data were.

        Raises DataError if it cannot be read or is too long, ConfigError if the modality is neither of the two.
        """
        if self.suffix == ".png":
            return self.encode(self._picture(path))
        if self.suffix == ".wav":
            return self.encode(self._sound(path))
        raise ConfigError(f"a file must be a picture or sound, got {path} for {self.modality}; leave it out")

    def _picture(self, path: Path) -> Float[Tensor, "3 y x"]:
        """Centred on white in the bucket whose sides are in the nearest proportion."""
        try:
            with Image.open(path) as file:
                drawing = file.convert("RGBA")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise DataError(
                f"a picture must be a file that pillow opens, got {path} ({error}); name another"
            ) from error
        buckets = [self.axes(bucket) for bucket in range(len(self.media.buckets))]
        width, height = drawing.size
        rows, columns = min(buckets, key=lambda sides: abs(math.log(sides[0] * width / (sides[1] * height))))
        canvas = max(width, -(-height * columns // rows)), max(height, -(-width * rows // columns))
        white = Image.new("RGBA", canvas, (255, 255, 255, 255))
        white.alpha_composite(drawing, ((canvas[0] - width) // 2, (canvas[1] - height) // 2))
        pixels = np.array(white.convert("RGB").resize((columns, rows), Image.Resampling.LANCZOS))
        return torch.from_numpy(pixels).movedim(2, 0).float() / 127.5 - 1.0

    def _sound(self, path: Path) -> Float[Tensor, "1 samples"]:
        """Mixed down, resampled, trimmed, levelled, and filled up with silence to the next bucket."""
        rate = self.autoencoder.sample_rate
        assert rate is not None
        try:
            wave, found = soundfile.read(path, dtype="float32", always_2d=True)
        except (OSError, soundfile.LibsndfileError) as error:
            raise DataError(
                f"a sound must be a file that libsndfile opens, got {path} ({error}); name another"
            ) from error
        wave = levelled(trimmed(resampled(wave.mean(1), found, to=rate)))
        if not len(wave):
            raise DataError(f"a sound must be louder than {SILENCE} of full scale somewhere, got {path}; name another")
        sizes = [self.axes(bucket)[0] for bucket in range(len(self.media.buckets))]
        size = next((size for size in sizes if size >= len(wave)), None)
        if size is None:
            raise DataError(
                f"a sound must last at most {max(sizes) / rate:.2f} s, got {len(wave) / rate:.2f} s in {path}; "
                f"cut it, or set model.media.{self.modality}.buckets"
            )
        return torch.from_numpy(np.pad(wave, (0, size - len(wave))))[None]


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
            media, fps = config.model.media[modality], float(manifest.get("preparation", {}).get("fps", FPS))
            normalisation = Normalisation.of(config.data, modality, media=media)
            return MediaCodec(modality, media, autoencoder, normalisation, fps)
    raise DataError(
        f"a data set below {config.data.root} must hold {modality} and name its autoencoder, got none; "
        "set data.sources or prepare the data again"
    )


def resampled(wave: Float[np.ndarray, " n"], rate: int, *, to: int) -> Float[np.ndarray, " m"]:
    """Another sampling rate, by cutting or padding the spectrum."""
    ratio = Fraction(to, rate)
    up, down = ratio.numerator, ratio.denominator
    if up == down:
        return wave
    blocks = -(-len(wave) // (down * 16)) * 16  # a length of small prime factors: the transform is far faster
    spectrum = np.fft.rfft(wave, blocks * down)[: blocks * up // 2 + 1]
    return np.fft.irfft(spectrum, blocks * up)[: len(wave) * up // down] * (up / down)


def trimmed(wave: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """Without the silence at either end; empty if there is nothing else."""
    loud = np.flatnonzero(np.abs(wave) > SILENCE)
    return wave[loud[0] : loud[-1] + 1] if len(loud) else wave[:0]


def levelled(wave: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """At a root mean square of 0.08 of full scale, less where the peak would pass 0.99."""
    if not len(wave):
        return wave.astype(np.float32)
    power, peak = float(np.sqrt(np.square(wave).mean())), float(np.abs(wave).max())
    return (wave * min(LOUDNESS / power, PEAK / peak)).astype(np.float32)
