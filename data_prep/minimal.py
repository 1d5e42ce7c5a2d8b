"""A tiny SYNTHETIC data set that needs no network: drawn shapes, pure tones, and the standard library's text.

For tests of the layout and of the machinery; nothing can be said about a model's quality from it.
"""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from data_prep.records import Document, Picture, Sound
from data_prep.speech import SAMPLE_RATE
from data_prep.texts import standard_library
from matformer.autoencoders.sound import levelled

SIDE = 64
MODULES = 60
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "black": (20, 20, 20),
    "orange": (240, 150, 30),
}
FRENCH = {
    "red": "rouge",
    "green": "vert",
    "blue": "bleu",
    "black": "noir",
    "orange": "orange",
    "disc": "disque",
    "square": "carré",
    "triangle": "triangle",
    "ring": "anneau",
}
SHAPES = ("disc", "square", "triangle", "ring")
NOTES = {"low": 220.0, "middle": 440.0, "high": 880.0}
SECONDS = {"short": 0.4, "long": 1.1, "very long": 2.3}


def texts() -> Iterator[Document]:
    """A few modules of the standard library."""
    return itertools.islice(standard_library(Path(sysconfig.get_path("stdlib"))), MODULES)


def pictures() -> list[Picture]:
    """Every shape in every colour, filled and pale, with English and French captions."""
    return [
        Picture(
            key=f"{style}-{colour}-{shape}",
            concept=f"{colour} {shape}",
            base=f"{colour} {shape}",
            style=style,
            group=f"shapes/{shape}",
            source="synthetic",
            texts={"en": f"{colour} {shape}", "fr": f"{FRENCH[shape]} {FRENCH[colour]}"},
            pixels=_drawn(_mask(shape), colour=COLOURS[colour], pale=style == "pale"),
        )
        for shape in SHAPES
        for colour in COLOURS
        for style in ("filled", "pale")
    ]


def sounds() -> list[Sound]:
    """Tones of three heights and lengths, pure and buzzing."""
    return [
        Sound(
            key=f"{style}-{note}-{length.replace(' ', '-')}",
            concept=f"{note} {length} {style}",
            base=f"{note} {length}",
            style=style,
            group=f"tones/{note}",
            source="synthetic",
            texts={"en": f"a {length} {note} {style} tone"},
            wave=_tone(NOTES[note], seconds=SECONDS[length], partials=1 if style == "pure" else 4),
        )
        for note in NOTES
        for length in SECONDS
        for style in ("pure", "buzzing")
    ]


def _mask(shape: str) -> Bool[np.ndarray, "64 64"]:
    y, x = np.mgrid[0:SIDE, 0:SIDE] - (SIDE - 1) / 2
    radius = np.hypot(y, x)
    return {
        "disc": radius < 24,
        "square": (abs(y) < 20) & (abs(x) < 20),
        "triangle": (y < 20) & (y > -24) & (abs(x) < (y + 24) * 0.6),
        "ring": (radius < 26) & (radius > 14),
    }[shape]


def _drawn(mask: Bool[np.ndarray, "64 64"], *, colour: tuple[int, int, int], pale: bool) -> np.ndarray:
    ink = np.array(colour, np.float32)
    ink = (ink + 2 * 255) / 3 if pale else ink
    return np.where(mask[..., None], ink, 255).astype(np.uint8)


def _tone(hertz: float, *, seconds: float, partials: int) -> np.ndarray:
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    fade = np.minimum(1, np.minimum(time, time[::-1]) / 0.02)
    wave = sum(np.sin(2 * np.pi * hertz * n * time) / n for n in range(1, partials + 1))
    return levelled(np.asarray(wave * fade, np.float32))
