"""Frames of a video file, through PyAV."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from matformer.autoencoders.damage import DAMAGE
from matformer.errors import DataError


def frames_of(data: bytes, *, fps: float, most: int) -> list[np.ndarray]:
    """RGB frames [y, x, 3] at `fps` a second, each the one that is shown at its time, upright; at most `most`.

    Raises DataError where the file is damaged, or PyAV is missing.
    """
    av = require_av()
    try:
        with open_video(data) as container:
            shown = ((frame.time, upright(frame)) for frame in container.decode(video=0))
            return list(_sampled(shown, fps=fps, most=most))
    except (av.FFmpegError, *DAMAGE) as error:
        raise DataError(
            f"a video must be a whole file that FFmpeg opens, got: {error!r}; repair it or leave it out"
        ) from error


def _sampled(shown: Iterator[tuple[float | None, np.ndarray]], *, fps: float, most: int) -> Iterator[np.ndarray]:
    """The last frame shown at or before each of the times 0, 1 / fps, 2 / fps, ... after the first frame."""
    first, last, given = None, None, 0
    for time, frame in shown:
        first = (time or 0.0) if first is None else first
        # half a millisecond: containers round times to their own ticks
        while last is not None and given < most and given / fps < (time or 0.0) - first - 5e-4:
            yield last
            given += 1
        last = frame
        if given == most:
            return
    if last is not None and given < most:
        yield last


def upright(frame: Any) -> np.ndarray:  # noqa: ANN401
    """RGB [y, x, 3] of PyAV's frame, turned as a player turns it: telephones store what they saw as it lay."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def open_video(data: bytes) -> Any:  # noqa: ANN401
    """PyAV's container of a file in memory; its title and the like need not be UTF-8. Raises what PyAV does."""
    return require_av().open(io.BytesIO(data), "r", metadata_errors="replace")


def require_av() -> Any:  # noqa: ANN401
    """PyAV. Raises DataError where it is missing."""
    try:
        import av  # noqa: PLC0415  optional: the extra `media`
    except ImportError as error:
        raise DataError(
            f"video needs PyAV, got {error}; install the extra with `pip install -e '.[media]'` in the project's folder"
        ) from error
    return av
