"""What the sources hand on: documents, pictures and sounds with their captions, and who is held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8


@dataclass(frozen=True, slots=True)
class Document:
    """Text of one source. family: what must stay on one side of the split (a page in all its languages)."""

    source: str
    language: str
    key: str
    text: str
    family: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What pictures and sounds share.

    key: unique, without dots and slashes. concept: what it shows or says; base: the concept without its variants, by
    which it is held out. style: who drew or spoke. group: kind of concept. texts: language -> caption or transcript.
    """

    key: str
    concept: str
    base: str
    style: str
    group: str
    source: str
    texts: dict[str, str]

    @property
    def main_text(self) -> str:
        """English where there is any, else the first language."""
        return self.texts.get("en") or next(iter(self.texts.values()))


@dataclass(frozen=True, slots=True)
class Picture(Sample):
    """pixels: RGB, 0 .. 255."""

    pixels: UInt8[np.ndarray, "y x 3"]


@dataclass(frozen=True, slots=True)
class Sound(Sample):
    """wave: full scale is 1, at the rate of its data set."""

    wave: Float[np.ndarray, " samples"]


def number_of(name: str) -> int:
    """A stable 60-bit number of a name: for splits and for an order that depends on nothing else."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)


def is_held_out(name: str, *, one_in: int) -> bool:
    """Whether the hash of `name` falls into the held-out share 1 / one_in."""
    return number_of(f"heldout:{name}") % one_in == 0
