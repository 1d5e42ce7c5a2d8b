"""Draws docs/architecture.svg, the picture at the top of the README: `python tools/draw_architecture.py [OUT]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).resolve().parent.parent / "docs" / "architecture.svg"

WIDTH, HEIGHT = 1160, 690
LEFT, CELL, PITCH = 60, 44, 55.33
QUARTERS = ((0, 0), (1, 0), (0, 1), (1, 1))
COLUMNS = ((60, 330), (415, 330), (770, 330))
"""(left edge, width) of the three modalities."""

STYLE = """
.paper{fill:#fbfaf7}.card{fill:#fff;stroke:#dedad1}.ink{fill:#24262b}.muted{fill:#6d7079}.line{stroke:#a9a79f;fill:none}
.text{fill:#4a5bb8}.textsoft{fill:#e6e9f8;stroke:#4a5bb8}.image{fill:#0e8074}.imagesoft{fill:#dcf0ed;stroke:#0e8074}
.audio{fill:#b8692a}.audiosoft{fill:#f8eadb;stroke:#b8692a}.router{fill:#8c4a86}.routersoft{fill:#f4e6f3;stroke:#8c4a86}
.atto{fill:#24262b}.attoink{fill:#fbfaf7}.attomuted{fill:#b9bac0}.plain{fill:#efece5;stroke:#a9a79f}
.speck{fill:#0e8074}
@media (prefers-color-scheme:dark){
.paper{fill:#15171b}.card{fill:#1c1f24;stroke:#353940}.ink{fill:#e6e5e1}.muted{fill:#9a9da6}.line{stroke:#5d626b}
.text{fill:#9aa8f7}.textsoft{fill:#262c47;stroke:#9aa8f7}.image{fill:#55c7b8}.imagesoft{fill:#17332f;stroke:#55c7b8}
.audio{fill:#e6a063}.audiosoft{fill:#3a2b1c;stroke:#e6a063}.router{fill:#d29bcd}.routersoft{fill:#38243a;stroke:#d29bcd}
.atto{fill:#e6e5e1}.attoink{fill:#1a1c20}.attomuted{fill:#5d6069}.plain{fill:#2a2d33;stroke:#6a6e77}
.speck{fill:#55c7b8}}
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.serif{font-family:"Iowan Old Style","Palatino Linotype",Palatino,Georgia,serif}
"""


@dataclass(frozen=True)
class Position:
    """One position of the sequence: what kind it is, and what is written in it."""

    kind: str
    mark: str = ""


SEQUENCE = (
    Position("start", "●"),
    *(Position("text", patch) for patch in ("a ca", "t on", " a r", "oof¶")),
    Position("header", "◆"),
    *(Position("noised") for _ in range(4)),
    *(Position("clean") for _ in range(4)),
    Position("closing", "◇"),
    *(Position("text", patch) for patch in ("and ", "a do", "g be", "low¶")),
)
"""A document: text, an image to be generated, text that has seen it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the picture; exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    out: Path = parser.parse_args(arguments).out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(draw(), encoding="utf-8")
    return 0


def draw() -> str:
    """The whole picture."""
    parts = [inputs(), preludi(), sequence(), atto(), router(), code(), outputs()]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t d">\n'
        '<title id="t">The architecture of Matformer</title>\n'
        '<desc id="d">Bytes, images and audio become latents in small encoders, the Preludi; one large '
        "transformer, the Atto, carries all of them in one sequence; a router says what comes next; small decoders, "
        "the Code, write bytes and denoise latents.</desc>\n"
        f"<style>{STYLE}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M1 1L7 4L1 7" class="line" stroke-width="1.4"/></marker></defs>\n'
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="16"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


# Rows of the picture, from its foot to its head: what comes in stands below.

Y_OUT, Y_CODE, Y_ROUTER, Y_ATTO, Y_ROW, Y_PRELUDI, Y_IN = 26, 88, 182, 258, 378, 520, 616


def inputs() -> str:
    """What comes in: bytes, an image, sound, each already a run of units."""
    (a, aw), (b, bw), (c, cw) = COLUMNS
    parts = [
        _text(a + aw / 2, Y_IN + 20, "61 20 63 61 74 20 6f 6e …", kind="text mono", size=15, anchor="middle"),
        _picture(b + bw / 2 - 70, Y_IN),
        _text(b + bw / 2 - 24, Y_IN + 19, "autoencoder latents", kind="image", size=14),
        _wave(c + cw / 2 - 96, Y_IN + 14),
        _text(c + cw / 2 - 10, Y_IN + 19, "autoencoder latents", kind="audio", size=14),
        _text(a + aw / 2, Y_IN + 46, "bytes", kind="muted", size=13, anchor="middle"),
        _text(b + bw / 2, Y_IN + 46, "images", kind="muted", size=13, anchor="middle"),
        _text(c + cw / 2, Y_IN + 46, "audio", kind="muted", size=13, anchor="middle"),
    ]
    arrows = [_arrow(x + w / 2, Y_IN - 4, Y_PRELUDI + 58) for x, w in COLUMNS]
    return "\n".join(parts + arrows)


_SOFT = ("textsoft", "imagesoft", "audiosoft")
_FULL = ("text", "image", "audio")


def preludi() -> str:
    """The small encoders."""
    said = (
        ("local attention over bytes,", "each patch reads its own"),
        ("patches of latents, with their", "noise level t"),
        ("patches of latents, with their", "noise level t"),
    )
    return _acts("Preludio", said, top=Y_PRELUDI)


def code() -> str:
    """The small decoders."""
    said = (
        ("the next patch, byte by byte:", "cross-entropy, bits per byte"),
        ("velocity of the noised patches:", "flow matching"),
        ("velocity of the noised patches:", "flow matching"),
    )
    return _acts("Coda", said, top=Y_CODE)


def _acts(title: str, said: tuple[tuple[str, str], ...], *, top: float) -> str:
    parts = []
    for (x, w), soft, full, lines in zip(COLUMNS, _SOFT, _FULL, said, strict=True):
        parts.append(f'<rect class="{soft}" x="{x}" y="{top}" width="{w}" height="56" rx="10" stroke-width="1.3"/>')
        parts.append(_text(x + 18, top + 34, title, kind=f"{full} serif", size=20, weight=600))
        parts += [_text(x + 112, top + 24 + 18 * i, line, kind="ink", size=13) for i, line in enumerate(lines)]
    return "\n".join(parts)


def sequence() -> str:
    """The Atto's sequence of one document, and who sees whom."""
    parts = [_cell(place, position) for place, position in enumerate(SEQUENCE)]
    parts += _braces()
    parts.append(_seen(5, 9, "sees both ways, seen by nobody else"))
    parts.append(_seen(10, 14, "what the rest of the document sees"))
    centres = [x + w / 2 for x, w in COLUMNS]
    parts += [_arrow(x, Y_PRELUDI - 6, Y_ROW + 110) for x in centres]
    parts += [_arrow(x, Y_ROW - 8, Y_ATTO + 84) for x in centres]
    return "\n".join(parts)


def _x(place: float) -> float:
    return LEFT + place * PITCH


def _cell(place: int, position: Position) -> str:
    soft = {"start": "plain", "text": "textsoft"}.get(position.kind, "imagesoft")
    dashed = ' stroke-dasharray="4 3"' if position.kind == "noised" else ""
    x = _x(place)
    frame = f'x="{x:.1f}" y="{Y_ROW}" width="{CELL}" height="{CELL}" rx="7"'
    box = f'<rect class="{soft}" {frame} stroke-width="1.3"{dashed}/>'
    if position.kind in ("noised", "clean"):
        return box + _patch(x, place % 4, noised=position.kind == "noised")
    kind, size = (
        ("text mono", 12.5) if position.kind == "text" else ("muted" if position.kind == "start" else "image", 15)
    )
    shown = position.mark.replace(" ", "·")
    return box + _text(x + CELL / 2, Y_ROW + 27, shown, kind=kind, size=size, anchor="middle")


def _patch(x: float, quarter: int, *, noised: bool) -> str:
    """A quarter of the picture, patches in raster order; a noised one under specks."""
    column, row = QUARTERS[quarter]
    side = CELL - 6
    view = f'x="{x + 3:.1f}" y="{Y_ROW + 3}" width="{side}" height="{side}"'
    crop = f'viewBox="{column * side} {row * side} {side} {side}"'
    scene = f'<circle class="image" cx="{side}" cy="{side}" r="25"/>'
    if not noised:
        return f'<svg {view} {crop} opacity=".9">{scene}</svg>'
    left, top = column * side, row * side
    # an additive recurrence: scattered, yet nowhere clotted
    specks = "".join(
        f'<circle class="speck" cx="{left + side * ((0.7549 * i + 0.37 * quarter) % 1):.1f}" '
        f'cy="{top + side * ((0.5698 * i + 0.21 * quarter) % 1):.1f}" r="{1.1 + (i % 3) * 0.4:.1f}"/>'
        for i in range(26)
    )
    return f'<svg {view} {crop}><g opacity=".22">{scene}</g><g opacity=".75">{specks}</g></svg>'


def _braces() -> list[str]:
    spans = (
        (0, 0, "start", "muted"),
        (1, 4, "text: one latent a patch", "text"),
        (5, 5, "header", "image"),
        (6, 9, "noised copy", "image"),
        (10, 13, "clean copy", "image"),
        (14, 14, "closing", "image"),
        (15, 18, "text, having seen the image", "text"),
    )
    parts = []
    for first, last, label, kind in spans:
        left, right = _x(first), _x(last) + CELL
        y = Y_ROW + CELL + 9
        if last > first:
            parts.append(f'<path class="line" d="M{left:.1f} {y}v5H{right:.1f}v-5" stroke-width="1.1"/>')
        parts.append(_text((left + right) / 2, y + 23, label, kind=kind, size=12.5, anchor="middle"))
    return parts


def _seen(first: int, last: int, label: str) -> str:
    middle = (_x(first) + _x(last) + CELL) / 2
    return _text(middle, Y_ROW + CELL + 51, label, kind="muted", size=12, anchor="middle")


def atto() -> str:
    """The large transformer."""
    lines = "one transformer over all latents · causal, and both ways inside a media span"
    host = "megatron-core: tensor, sequence and pipeline parallel · DeepSpeed: ZeRO"
    return "\n".join(
        [
            f'<rect class="atto" x="{LEFT}" y="{Y_ATTO}" width="{WIDTH - 2 * LEFT}" height="82" rx="12"/>',
            _text(LEFT + 28, Y_ATTO + 52, "Atto", kind="attoink serif", size=32, weight=600),
            _text(LEFT + 128, Y_ATTO + 36, lines, kind="attoink", size=15.5),
            _text(LEFT + 128, Y_ATTO + 60, host, kind="attomuted", size=13.5),
        ]
    )


def router() -> str:
    """What comes next: one of the Code, the end, or the latent once more."""
    right = WIDTH - LEFT
    parts = [
        f'<rect class="routersoft" x="{LEFT}" y="{Y_ROUTER}" width="{right - LEFT}" height="38" rx="19" '
        'stroke-width="1.3"/>',
        _text(LEFT + 28, Y_ROUTER + 25, "router", kind="router serif", size=18, weight=600),
        _text(LEFT + 128, Y_ROUTER + 24, ROUTER_SAYS, kind="ink", size=14),
        f'<path class="line" d="M{right} {Y_ROUTER + 19}h20q12 0 12 12v{Y_ATTO - Y_ROUTER + 10}q0 12 -12 12h-18" '
        'stroke-width="1.4" stroke-dasharray="4 3" marker-end="url(#tip)"/>',
        f'<text class="muted" font-size="12" text-anchor="middle" '
        f'transform="translate({right + 48} {(Y_ROUTER + Y_ATTO) / 2 + 40}) rotate(90)">latent thought</text>',
        _arrow(WIDTH / 2, Y_ATTO - 4, Y_ROUTER + 42),
    ]
    return "\n".join(parts + [_arrow(x + w / 2, Y_ROUTER - 4, Y_CODE + 60) for x, w in COLUMNS])


ROUTER_SAYS = "asked wherever there is a choice: text, image, audio, the end of the document, or think once more?"


def outputs() -> str:
    """What comes out."""
    parts = []
    for (x, w), name, kind in zip(COLUMNS, ("bytes", "images", "audio"), _FULL, strict=True):
        parts.append(_text(x + w / 2, Y_OUT + 12, name, kind=kind, size=15, anchor="middle", weight=600))
        parts.append(_arrow(x + w / 2, Y_CODE - 4, Y_OUT + 22))
    return "\n".join(parts)


def _picture(x: float, y: float) -> str:
    return (
        f'<rect class="imagesoft" x="{x}" y="{y}" width="32" height="28" rx="4" stroke-width="1.2"/>'
        f'<circle class="image" cx="{x + 16}" cy="{y + 14}" r="8.5" opacity=".85"/>'
    )


def _wave(x: float, y: float) -> str:
    heights = (3, 7, 12, 8, 13, 9, 5, 10, 6, 3, 5, 2)
    path = "".join(f"M{x + 6 * i} {y - h}v{2 * h}" for i, h in enumerate(heights))
    return f'<path d="{path}" class="audiosoft" stroke-width="2.6" stroke-linecap="round"/>'


def _arrow(x: float, y1: float, y2: float) -> str:
    return f'<path class="line" d="M{x:.1f} {y1:.1f}V{y2:.1f}" stroke-width="1.4" marker-end="url(#tip)"/>'


def _text(x: float, y: float, words: str, *, kind: str, size: float, anchor: str = "start", weight: int = 400) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


if __name__ == "__main__":
    sys.exit(main())
