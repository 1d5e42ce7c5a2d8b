"""Frames -> an MP4 file, through PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from matformer.autoencoders.video_frames import require_av
from matformer.errors import DataError

CODECS = ("libx264", "mpeg4")
"""The first that PyAV's FFmpeg has."""


def write_mp4(path: Path, frames: Float[Tensor, "T 3 y x"], *, fps: float) -> None:
    """Frames between -1 and 1, of even sides: the others lose their last row or column, which MP4's colours need.

    Raises DataError if PyAV is missing, or has neither codec.
    """
    av = require_av()
    codec = next((name for name in CODECS if name in av.codecs_available), None)
    if codec is None:
        raise DataError(f"PyAV must have one of the codecs {', '.join(CODECS)}, got neither; install another PyAV")
    pixels = ((frames + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, 3).numpy()
    pixels = np.ascontiguousarray(pixels[:, : pixels.shape[1] // 2 * 2, : pixels.shape[2] // 2 * 2])
    with av.open(path, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
