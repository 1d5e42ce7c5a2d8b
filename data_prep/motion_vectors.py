"""Motion as a codec sees it: H.264 without B-frames by x264, and the vectors that FFmpeg exports while it decodes.

A frame's vectors become a field [3, y, x] (dx, dy, intra), a cell a macroblock (matformer.autoencoders.motion_field).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from matformer.autoencoders.damage import DAMAGE
from matformer.autoencoders.motion_field import DX, DY, INTRA, MACROBLOCK, STEP
from matformer.autoencoders.video_frames import open_video, require_av, upright
from matformer.errors import DataError

X264 = "bframes=0:ref=1:partitions=none:weightp=0:keyint=infinite:scenecut=0:me=umh:merange=32:subme=7:threads=1"
"""One vector a macroblock, always from the frame before: what a field can hold without loss."""
QUALITY = "18"
B_FRAME = 3


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """A decoded frame, and the field that leads to it from the frame before; None for a key frame."""

    pixels: UInt8[np.ndarray, "y x 3"]
    field: Float[np.ndarray, "3 v u"] | None


def encoded(frames: Sequence[UInt8[np.ndarray, "y x 3"]], *, fps: int) -> bytes:
    """An MP4 file of these frames, the first a key frame, all others predicted from the one before.

    Raises DataError where PyAV or its x264 is missing, or sides are not multiples of a macroblock.
    """
    av = require_av()
    height, width = frames[0].shape[:2]
    if height % MACROBLOCK or width % MACROBLOCK:
        raise DataError(f"sides must be multiples of {MACROBLOCK} pixels, got {height} x {width}; resize the frames")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=fps, options={"crf": QUALITY, "x264-params": X264})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def decoded(data: bytes) -> Iterator[Moved]:
    """Frames of an H.264 file with their fields. Raises DataError where it is damaged, or has B-frames."""
    av = require_av()
    try:
        with open_video(data) as container:
            stream: Any = container.streams.video[0]
            stream.codec_context.options = {"flags2": "+export_mvs"}
            for frame in container.decode(stream):
                if int(frame.pict_type) == B_FRAME:
                    raise DataError(
                        "a video must have no B-frames, because a field leads from the frame before; encode it again"
                    )
                yield Moved(frame.to_ndarray(format="rgb24"), _field(frame))
    except (av.FFmpegError, *DAMAGE) as error:
        raise DataError(f"a video must be a whole file that FFmpeg opens, got: {error!r}; repair it") from error


def field_of(vectors: np.ndarray, *, grid: tuple[int, int]) -> Float[np.ndarray, "3 y x"]:
    """FFmpeg's vectors (AVMotionVector) -> one a macroblock: the mean over its parts by their area, in quarter pixels.

    A macroblock of which less than half is predicted is intra, and its vector is zero.
    """
    area, moved = np.zeros(grid), np.zeros((2, *grid))
    past = vectors[vectors["source"] < 0]
    cell = past["dst_y"] // MACROBLOCK, past["dst_x"] // MACROBLOCK  # of the part's centre
    size = past["w"].astype(np.float64) * past["h"]
    np.add.at(area, cell, size)
    for axis, name in ((DX, "motion_x"), (DY, "motion_y")):
        np.add.at(moved[axis], cell, size * past[name] / past["motion_scale"])
    intra = area < MACROBLOCK**2 / 2
    mean = np.where(intra, 0.0, moved / np.maximum(area, 1))
    field = np.empty((3, *grid), np.float32)
    field[:INTRA], field[INTRA] = np.round(mean / STEP) * STEP, intra
    return field


def _field(frame: Any) -> Float[np.ndarray, "3 y x"] | None:  # noqa: ANN401
    if frame.key_frame:
        return None
    grid = -(-frame.height // MACROBLOCK), -(-frame.width // MACROBLOCK)
    exported = frame.side_data.get("MOTION_VECTORS")
    if exported is None:  # every macroblock is intra
        return np.concatenate([np.zeros((INTRA, *grid), np.float32), np.ones((1, *grid), np.float32)])
    return field_of(exported.to_ndarray(), grid=grid)


def read_film(data: bytes) -> tuple[list[UInt8[np.ndarray, "y x 3"]], float, bool]:
    """All frames, frames a second, and whether fields cannot be had from the file: B-frames, turned, or not H.264.

    Raises DataError if it is damaged.
    """
    av = require_av()
    try:
        with open_video(data) as container:
            stream = container.streams.video[0]
            fps, foreign = float(stream.average_rate or 25), stream.codec_context.name != "h264"
            read = [
                (upright(frame), int(frame.pict_type) == B_FRAME or frame.rotation != 0)
                for frame in container.decode(stream)
            ]
    except (av.FFmpegError, *DAMAGE) as error:
        raise DataError(f"a video must be a whole file that FFmpeg opens, got: {error!r}; repair it") from error
    if not read:
        raise DataError("a video must hold frames, got none; bring another")
    return [frame for frame, _ in read], fps, foreign or any(other for _, other in read)
