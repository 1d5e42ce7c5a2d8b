"""Pictures of one kind -> documents in which words and pictures take turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data_prep.records import Picture, number_of

SPREAD = 3
STYLE_NAMES = {"twemoji": "Twemoji", "fluent3d": "Fluent", "noto": "Noto"}


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture's place in an album."""

    picture: Picture
    role: Literal["given", "generate"]


@dataclass(frozen=True, slots=True)
class Album:
    """Text and pictures in reading order."""

    key: str
    language: str
    parts: tuple[str | Shown, ...]


def all_albums(pictures: Sequence[Picture]) -> list[Album]:
    """Albums of one split's pictures: a concept by several hands, and a few concepts of one kind by one hand."""
    albums = _same_concept(pictures) + _same_kind(pictures)
    return sorted(albums, key=lambda album: number_of(album.key))


def _same_concept(pictures: Sequence[Picture]) -> list[Album]:
    """The first picture is given, the others are to be drawn in a named style."""
    by_concept: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_concept[picture.concept].append(picture)
    albums = []
    for concept, several in sorted(by_concept.items()):
        if len(several) > 1 and "en" in several[0].texts and concept == several[0].base:
            ordered = sorted(several, key=lambda picture: number_of(f"order:{picture.key}"))
            parts: list[str | Shown] = [f"{_style(ordered[0])} draws {several[0].texts['en']} like this:\n"]
            parts.append(Shown(ordered[0], "given"))
            for picture in ordered[1:]:
                parts += [f"\nAnd {_style(picture)} draws it like this:\n", Shown(picture, "generate")]
            albums.append(Album(f"styles-{concept.lower()}", "en", tuple(parts)))
    return albums


def _same_kind(pictures: Sequence[Picture]) -> list[Album]:
    """Up to three concepts of one group and style, named one after the other; every second album is not in English."""
    by_kind: dict[tuple[str, str], list[Picture]] = defaultdict(list)
    for picture in pictures:
        if picture.concept == picture.base:
            by_kind[picture.style, picture.group].append(picture)
    albums = []
    for (style, group), several in sorted(by_kind.items()):
        ordered = sorted(several, key=lambda picture: number_of(f"kind:{picture.key}"))
        for start in range(0, len(ordered) - 1, SPREAD):
            chosen = ordered[start : start + SPREAD]
            key = f"kind-{style}-{group.replace('/', '-')}-{start // SPREAD}"
            albums.append(_listing(chosen, key=key, kind=group.rsplit("/", 1)[-1].replace("-", " ")))
    return albums


def _listing(chosen: Sequence[Picture], *, key: str, kind: str) -> Album:
    shared = sorted(set.intersection(*(set(picture.texts) for picture in chosen)) - {"en"})
    language = shared[number_of(key) % len(shared)] if shared and number_of(f"language:{key}") % 2 else "en"
    names = [picture.texts.get(language, picture.main_text) for picture in chosen]
    opening = f"{len(chosen)} pictures, {kind}. First {names[0]}:\n" if language == "en" else f"{names[0]}\n"
    joint = "\nNow {}:\n" if language == "en" else "\n{}\n"
    parts: list[str | Shown] = [opening, Shown(chosen[0], "generate")]
    for picture, name in zip(chosen[1:], names[1:], strict=True):
        parts += [joint.format(name), Shown(picture, "generate")]
    return Album(key, language, tuple(parts))


def _style(picture: Picture) -> str:
    return STYLE_NAMES.get(picture.style, picture.style)
