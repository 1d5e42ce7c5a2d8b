"""Bytes of a picture, sound, video or array -> the numbers an autoencoder takes, in one of a few shapes.

What is no such medium, or fits none of the shapes, raises DataError: encoding counts it and goes on, sampling stops.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import soundfile
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from matformer.autoencoders.base import Autoencoder
from matformer.autoencoders.damage import DAMAGE
from matformer.autoencoders.sound import SILENCE, levelled, resampled, trimmed
from matformer.autoencoders.video_frames import frames_of
from matformer.errors import DataError

Fit = Literal["pad", "crop", "exact"]
Level = Literal["speech", "as-is"]
SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy"),
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".npy"),
    "video": (".mp4", ".mkv", ".webm", ".mov", ".avi", ".npy"),
    "tensor": (".npy",),
}
"""The files that are taken for media of a modality, the one that samples are written as first; `.npy` is an array
[c, *axes] that is ready to be encoded."""
RATES = (1000, 768_000)
"""Hz that a sound's file may have."""
STREAM_BYTES = 0x7FFF_F000
"""From this size on a sound's header means that nobody knew: FFmpeg writes 0xFFFFFFFF, SoX 0x7FFFF024."""
WHITE = (255, 255, 255)
CANVAS_PIXELS = 1 << 22
"""Most that are held at once of the white canvas around a picture."""
OPTIONS = {"buckets": "--buckets", "fit": "--fit", "level": "--level", "fps": "--fps"}
"""Fields of a Preparation and the options of data_prep that set them."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """How media become arrays of a few shapes.

    buckets: grids in latent cells. axes: the media's sizes that give them. fit: of pictures and frames: `pad` centres
    on white, `crop` cuts to the shape, `exact` takes only what has it. level: of sound: `speech` cuts silence at the
    ends and levels, `as-is` does neither. fps: frames a second that a video is read at. keys: what errors tell a person
    to change, by field; a field without a key is fixed.
    """

    modality: str
    channels: int
    buckets: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[int, ...], ...]
    sample_rate: int | None = None
    fit: Fit = "pad"
    level: Level = "speech"
    fps: float = 8.0
    keys: Mapping[str, str] = field(default_factory=OPTIONS.copy, repr=False, compare=False)

    @classmethod
    def of(
        cls, autoencoder: Autoencoder, *, buckets: Sequence[Sequence[int]], fit: Fit = "pad",
        level: Level | None = None, fps: float = 8.0, keys: Mapping[str, str] = OPTIONS,
    ) -> Preparation:  # fmt: skip
        """For this autoencoder; without `level`, one channel is taken for speech.

        Raises DataError if a bucket has not its rank, or several channels are to be levelled as speech.
        """
        level = level or ("speech" if autoencoder.media_channels == 1 else "as-is")
        if level == "speech" and autoencoder.media_channels > 1 and autoencoder.sample_rate is not None:
            raise DataError(
                f"sound of {autoencoder.media_channels} channels must be taken as-is, got level speech; "
                f"{_change(keys, 'level')}"
            )
        rank = len(autoencoder.downsampling)
        for bucket in buckets:
            if len(bucket) != rank or min(bucket) < 1:
                raise DataError(
                    f"a shape bucket of {autoencoder.kind} must have {rank} positive sizes, got {tuple(bucket)}; "
                    f"{_change(keys, 'buckets')}"
                )
        return cls(
            modality=autoencoder.modality,
            channels=autoencoder.media_channels,
            buckets=tuple(tuple(bucket) for bucket in buckets),
            axes=tuple(autoencoder.media_axes(bucket) for bucket in buckets),
            sample_rate=autoencoder.sample_rate,
            fit=fit,
            level=level,
            fps=fps,
            keys=dict(keys),
        )

    def manifest(self) -> dict[str, Any]:
        """As manifests carry it."""
        return {name: value for name, value in asdict(self).items() if name != "keys"}

    def read(self, data: bytes, *, suffix: str) -> tuple[int, np.ndarray]:
        """(bucket, array [c, *axes]): uint8 of pictures and video, float32 else. Raises DataError."""
        kind = "tensor" if suffix == ".npy" else self.modality
        reading = {"tensor": self._array, "audio": self._sound, "video": self._video}.get(kind, self._picture)
        try:
            return reading(data)
        except MemoryError as error:
            raise DataError(
                f"a medium must fit into memory, got one of {len(data)} bytes that does not; leave it out"
            ) from error

    def _array(self, data: bytes) -> tuple[int, np.ndarray]:
        try:
            array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except DAMAGE as error:
            raise DataError(f"an array must be a whole .npy file, got: {error!r}; repair it or leave it out") from error
        real = array.dtype.kind in "fiub"
        if not real or array.ndim == 0 or len(array) != self.channels or array.shape[1:] not in self.axes:
            raise DataError(
                f"an array must hold real numbers in {self.channels} channels and axes among {list(self.axes)}, got "
                f"shape {array.shape} of {array.dtype}; reshape it, or {_change(self.keys, 'buckets')}"
            )
        return self.axes.index(array.shape[1:]), np.ascontiguousarray(array, np.float32)

    def _picture(self, data: bytes) -> tuple[int, np.ndarray]:
        try:
            with Image.open(io.BytesIO(data)) as file:
                ImageOps.exif_transpose(file, in_place=True)  # as a viewer turns it
                drawing = _eight_bits(file)
        except DAMAGE as error:
            raise DataError(
                f"a picture must be a whole file that pillow opens, got: {error!r}; repair it or leave it out"
            ) from error
        bucket = self._nearest(drawing.size, sides=self.axes)
        return bucket, _channels_first(self._fitted(drawing, sides=self.axes[bucket]))

    def _video(self, data: bytes) -> tuple[int, np.ndarray]:
        frames = [Image.fromarray(frame) for frame in frames_of(data, fps=self.fps, most=max(a[0] for a in self.axes))]
        fitting = [axes for axes in self.axes if axes[0] <= len(frames)]
        if not fitting:
            raise DataError(
                f"a video must have at least {min(axes[0] for axes in self.axes)} frames at {self.fps:g} a second, "
                f"got {len(frames)}; bring a longer one, or {_change(self.keys, 'fps', 'buckets')}"
            )
        longest = [axes for axes in fitting if axes[0] == max(axes[0] for axes in fitting)]
        axes = longest[self._nearest(frames[0].size, sides=[axes[1:] for axes in longest])]
        chosen = [self._fitted(frame, sides=axes[1:]) for frame in frames[: axes[0]]]
        return self.axes.index(axes), np.stack([_channels_first(frame) for frame in chosen], 1)

    def _sound(self, data: bytes) -> tuple[int, np.ndarray]:
        assert self.sample_rate is not None
        if (missing := _missing_bytes(data)) > 0:  # libsndfile takes what there is
            raise DataError(
                f"a sound must be as long as its header says, got {missing} bytes less; copy it again or leave it out"
            )
        try:
            wave, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        except DAMAGE as error:
            raise DataError(
                f"a sound must be a whole file that libsndfile opens, got: {error!r}; repair it or leave it out"
            ) from error
        if not RATES[0] <= rate <= RATES[1]:  # a damaged header would ask for any length at another rate
            raise DataError(f"a sound must have a rate within {RATES} Hz, got {rate}; repair it or leave it out")
        mixed = [wave.mean(1)] if self.channels == 1 or wave.shape[1] == 1 else list(wave.T[: self.channels])
        channels = [resampled(channel, rate=rate, to=self.sample_rate) for channel in mixed if len(channel)]
        # asked of what is left: opposite sides cancel, and tones above half the rate are gone
        if (
            not max((np.abs(channel).max(initial=0) for channel in channels), default=0) > SILENCE
        ):  # `not >`: nan is none either
            raise DataError(f"a sound must be louder than {SILENCE} of full scale somewhere, got silence; leave it out")
        if self.level == "speech":
            channels = [levelled(trimmed(channels[0]))]
        length = len(channels[0])
        bucket = min(
            (i for i, (size,) in enumerate(self.axes) if size >= length), key=self.axes.__getitem__, default=-1
        )
        if bucket < 0:
            longest = max(self.axes)[0] / self.sample_rate
            raise DataError(
                f"a sound must last at most {longest:.2f} s, got {length / self.sample_rate:.2f} s; cut it, or "
                f"{_change(self.keys, 'buckets')}"
            )
        padded = np.zeros((self.channels, *self.axes[bucket]), np.float32)
        padded[:, :length] = np.stack(channels)  # one channel fills both of a stereo autoencoder
        return bucket, padded

    def _nearest(self, size: tuple[int, int], *, sides: Sequence[Sequence[int]]) -> int:
        """The index of the sides that are in the nearest proportion; of equal ones the first."""
        width, height = size
        if self.fit == "exact":
            if (height, width) not in [tuple(pair) for pair in sides]:
                raise DataError(
                    f"a picture must have a height and width among {list(sides)}, got {(height, width)}; resize "
                    f"it, or {_change(self.keys, 'buckets', 'fit')}"
                )
            return [tuple(pair) for pair in sides].index((height, width))
        off = [abs(math.log(rows * width / (columns * height))) for rows, columns in sides]
        return off.index(min(off))

    def _fitted(self, drawing: Image.Image, *, sides: Sequence[int]) -> Image.Image:
        rows, columns = sides
        width, height = drawing.size
        if self.fit == "exact" or (width, height) == (columns, rows):
            return _on_white(drawing, canvas=drawing.size)
        if self.fit == "pad":
            return _padded(drawing, sides=sides)
        scale = min(width / columns, height / rows)
        across, down = columns * scale, rows * scale
        left, top = (width - across) / 2, (height - down) / 2
        box = (left, top, left + across, top + down)
        return _on_white(drawing, canvas=drawing.size).resize((columns, rows), Image.Resampling.LANCZOS, box=box)


def _missing_bytes(data: bytes) -> int:
    """What a WAV or AIFF file has less than its header says; 0 or less of others, and of streams, whose header cannot
    know.
    """
    order = {b"RIFF": "<I", b"FORM": ">I"}.get(data[:4])
    if order is None or len(data) < 8:
        return 0
    (size,) = struct.unpack_from(order, data, 4)
    padding = 1  # of a last chunk of odd length: counted by the header, and left out by some
    return 0 if size == 0 or size >= STREAM_BYTES else size + 8 - padding - len(data)


def as_media(arrays: Sequence[np.ndarray]) -> Float[Tensor, "B c *axes"]:
    """Prepared arrays of one bucket as the autoencoder takes them: pixels run from -1 to 1."""
    # each by its own type: a batch may hold pictures beside arrays that are ready
    return torch.stack([_signed(torch.from_numpy(array)) for array in arrays])


def _signed(media: Tensor) -> Tensor:
    return media.float().div_(127.5).sub_(1.0) if media.dtype == torch.uint8 else media


def _change(keys: Mapping[str, str], *fields: str) -> str:
    """What a person can do about `fields`."""
    named = [keys[name] for name in fields if name in keys]
    return f"change {' or '.join(named)}" if named else "prepare the data again"


def _eight_bits(file: Image.Image) -> Image.Image:
    """RGB, or RGBA where something may be transparent. Raises DataError where values have no known range."""
    if file.mode in ("I", "F"):
        raise DataError(
            f"a picture must have 8 or 16 bits a channel, got pillow's mode {file.mode}, whose white is not known; "
            "convert it or leave it out"
        )
    if file.mode.startswith("I;16"):  # pillow's own conversion takes 255 for white
        shades = np.asarray(file).astype(np.uint32)
        return Image.fromarray(((shades + 128) // 257).astype(np.uint8)).convert("RGB")
    return file.convert("RGB" if file.mode in ("RGB", "L", "CMYK", "YCbCr") else "RGBA")


def _padded(drawing: Image.Image, *, sides: Sequence[int]) -> Image.Image:
    """Centred on a white canvas of the sides' proportion, and that resized: bit for bit, without ever making it.

    The canvas of a long and flat picture would be as high as that is long. Pillow resizes lines first, which stand each
    for itself, then columns, and rounds in between: so do these two calls.
    """
    rows, columns = sides
    width, height = drawing.size
    across, down = max(width, -(-height * columns // rows)), max(height, -(-width * rows // columns))
    narrow = Image.new("RGB", (columns, down), WHITE)
    lines = max(1, CANVAS_PIXELS // across)
    for first in range(0, height, lines):
        strip = drawing.crop((0, first, width, min(first + lines, height)))
        wide = _on_white(strip, canvas=(across, strip.height))
        resized = wide.resize((columns, strip.height), Image.Resampling.LANCZOS)
        narrow.paste(resized, (0, (down - height) // 2 + first))
    return narrow.resize((columns, rows), Image.Resampling.LANCZOS)


def _on_white(drawing: Image.Image, *, canvas: tuple[int, int]) -> Image.Image:
    if drawing.mode == "RGB" and drawing.size == canvas:
        return drawing
    white = Image.new("RGB", canvas, WHITE)
    corner = ((canvas[0] - drawing.width) // 2, (canvas[1] - drawing.height) // 2)
    white.paste(drawing, corner, drawing if drawing.mode == "RGBA" else None)
    return white


def _channels_first(drawing: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(drawing).transpose(2, 0, 1))
