"""A film -> short clips: square windows with a field of motion for each frame, and small ones of several shapes.

Two kinds of window: of the film itself (with its own vectors where its file has no B-frames, and encoded again at
half its height), and pans, where a window slides over one frame of the film: rendered motion over a real picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from data_prep.motion_vectors import Moved, decoded, encoded
from data_prep.records import number_of
from matformer.autoencoders.motion_field import INTRA, MACROBLOCK

Style = Literal["film", "pan"]
STEPS = 8
"""Frames that follow a clip's first."""
MOVES = 0.5
"""Pixels a frame from which a macroblock counts as moving."""
SPEEDS = (2.0, 4.0, 7.0)
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """key: without dots and slashes. frames: 1 + T. fields: of the T frames after the first."""

    key: str
    style: Style
    frames: UInt8[np.ndarray, "n Y X 3"]
    fields: Float[np.ndarray, "T 3 y x"]

    @property
    def origin(self) -> str:
        """`own` (the film's own vectors), `half` (encoded again at half its height), `pan`."""
        return self.key.split("-", 1)[0]

    @property
    def text(self) -> str:
        """What is measured of it, in words."""
        subject = "Big Buck Bunny" if self.style == "film" else "A picture"
        return f"{subject}: {words_of(self.fields)}."


def words_of(fields: Float[np.ndarray, "T 3 y x"]) -> str:
    """How much of a clip moves, where to (what it shows, not the camera) and how fast; by its vectors alone."""
    inter = fields[:, INTRA] < 0.5
    moving = inter & (np.hypot(fields[:, 0], fields[:, 1]) >= MOVES)
    share = moving.mean()
    if share < 0.03:
        return "nothing moves"
    # a block shows what stood at its vector: what it shows has moved the other way
    x, y = (-float(fields[:, axis][moving].mean()) for axis in (0, 1))
    speed = np.hypot(x, y)
    much = "all moves" if share > 0.7 else "much moves" if share > 0.3 else "a little moves"
    if speed < MOVES:
        return f"{much}, to all sides"
    where = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")
    return f"{much}, {where}, {'fast' if speed > 5 else 'slowly' if speed < 3 else 'steadily'}"


def film_clips(moved: Sequence[Moved], *, name: str, side: int, every: int) -> Iterator[Clip]:
    """Windows of `side` macroblocks, half overlapping, a clip each `every` frames; key frames stand only first."""
    height, width = (size // MACROBLOCK for size in moved[0].pixels.shape[:2])
    corners = list(itertools.product(_places(height, side=side), _places(width, side=side)))
    for start in range(0, len(moved) - STEPS, every):
        part = moved[start : start + STEPS + 1]
        fields = [one.field for one in part[1:] if one.field is not None]
        if len(fields) < STEPS:
            continue
        for row, column in corners:
            rows, columns = slice(row, row + side), slice(column, column + side)
            in_pixels = [slice(MACROBLOCK * one.start, MACROBLOCK * one.stop) for one in (rows, columns)]
            yield Clip(
                key=f"{name}-{start:05d}-{row}-{column}",
                style="film",
                frames=np.stack([one.pixels[in_pixels[0], in_pixels[1]] for one in part]),
                fields=np.stack([field[:, rows, columns] for field in fields]),
            )


def pans(frames: Sequence[UInt8[np.ndarray, "Y X 3"]], *, name: str, side: int, count: int, fps: int) -> Iterator[Clip]:
    """Windows that slide over a frame each, in four directions at three speeds; x264 finds the vectors."""
    pixels = side * MACROBLOCK
    for number in range(count):
        key = f"{name}-{number:04d}"
        dice = np.random.default_rng(number_of(f"pan:{key}"))
        frame = frames[int(dice.integers(len(frames)))]
        step = np.array(list(DIRECTIONS.values())[number % 4]) * SPEEDS[number // 4 % 3]
        room = np.abs(step) * STEPS
        free = np.array([frame.shape[1], frame.shape[0]]) - pixels - room
        if free.min() < 0:
            continue
        # what is shown moves along `step`, so the window goes against it
        corner = dice.uniform(0, 1, 2) * free + np.where(step > 0, room, 0)
        shown = [_cut(frame, corner - step * at, pixels=pixels) for at in range(STEPS + 1)]
        moved = list(decoded(encoded(shown, fps=fps)))
        fields = [one.field for one in moved[1:] if one.field is not None]
        yield Clip(key, "pan", np.stack([one.pixels for one in moved]), np.stack(fields))


def small_clips(
    moved: Sequence[Moved], *, name: str, shapes: Iterable[tuple[int, int, int]], every: int
) -> Iterator[tuple[str, str, UInt8[np.ndarray, "t y x 3"]]]:
    """(key, words, frames) of whole frames made small: cut to each shape's proportion, at three places."""
    for frames, height, width in shapes:
        for start in range(0, len(moved) - frames, every):
            part = moved[start : start + frames]
            rows, columns = part[0].pixels.shape[:2]
            across, down = min(columns, rows * width / height), min(rows, columns * height / width)
            fields = [one.field for one in part[1:] if one.field is not None]
            for place in ("left", "middle", "right") if across < columns else ("middle",):
                left = (columns - across) * {"left": 0.0, "middle": 0.5, "right": 1.0}[place]
                top = (rows - down) / 2
                box = (left, top, left + across, top + down)
                chosen = [
                    np.asarray(Image.fromarray(one.pixels).resize((width, height), Image.Resampling.LANCZOS, box=box))
                    for one in part
                ]
                text = f"Big Buck Bunny, {place}: {words_of(np.stack(fields))}."
                yield f"{name}-{frames}x{height}x{width}-{start:05d}-{place}", text, np.stack(chosen)


def _places(size: int, *, side: int) -> list[int]:
    """Corners of windows that half overlap, the last at the edge."""
    last = size - side
    return sorted({*range(0, last + 1, side // 2), last}) if last >= 0 else []


def _cut(frame: UInt8[np.ndarray, "Y X 3"], corner: np.ndarray, *, pixels: int) -> UInt8[np.ndarray, "y x 3"]:
    x, y = (int(round(float(value))) for value in corner)
    return np.ascontiguousarray(frame[y : y + pixels, x : x + pixels])
