"""What a run makes, as parts of a page: images, sound, captions, text. Inputs are the lists of samples.json."""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from matformer.observe import page

log = logging.getLogger(__name__)

Tree = dict[str, Any]


def pictures(samples: Tree, folder: Path) -> str:
    """Real, reconstructed and generated images."""
    title = "Images"
    listed = samples.get("image", [])
    if not listed:
        return page.missing(title, "No images here: samples/samples.json lists none.")
    kinds = _kinds(listed)
    cards = []
    for one in listed:
        words = page.text(one.get("caption", ""))
        cards.append(f"<figure>{_trio(folder, one, kinds=kinds)}<figcaption>{words}</figcaption></figure>")
    lead = "A held-out picture as the data keep it, through the autoencoder, and what the model draws from the caption."
    return page.section(title, page.grid(cards, cell="260px"), lead=lead)


_KINDS = ("real", "reconstructed", "generated")


def _kinds(listed: list[Tree]) -> list[str]:
    """Columns that any sample fills: data that were only kept as latents have nothing real to show."""
    return [kind for kind in _KINDS if any(one.get(kind) for one in listed)] or ["generated"]


def _trio(folder: Path, one: Tree, *, kinds: list[str]) -> str:
    cells = [f"<div>{_picture(folder, one.get(kind), alt=kind)}<span>{kind}</span></div>" for kind in kinds]
    return f'<div class="trio">{"".join(cells)}</div>'


def _picture(folder: Path, name: str | None, *, alt: str) -> str:
    source = page.data_uri(folder / name) if name else None
    return f'<img alt="{page.text(alt)}" src="{source}">' if source else '<div class="none">–</div>'


def films(samples: Tree, folder: Path) -> str:
    """Clips of video, and pictures that fields of motion move; nothing where a run has neither."""
    leads = {
        "video": ("Video", "A held-out clip through the autoencoder, and what the model makes of its text."),
        "motion": (
            "Motion",
            "A held-out picture moved by the vectors of its own video, and by those that the model draws after it.",
        ),
    }
    parts = []
    for name, (title, lead) in leads.items():
        listed = samples.get(name, [])
        cards = [f"<h3>{page.text(one.get('caption', ''))}</h3>{_films(folder, one, listed=listed)}" for one in listed]
        parts += [page.section(title, page.grid(cards, cell="420px"), lead=lead)] if cards else []
    return "".join(parts)


def _films(folder: Path, one: Tree, *, listed: list[Tree]) -> str:
    cells = [f"<div>{_film(folder, one.get(kind))}<span>{kind}</span></div>" for kind in _kinds(listed)]
    return f'<div class="trio">{"".join(cells)}</div>'


def _film(folder: Path, name: str | None) -> str:
    source = page.data_uri(folder / name) if name else None
    if source is None:
        return '<div class="none">–</div>'
    return f'<video controls loop muted autoplay playsinline src="{source}"></video>'


def sounds(samples: Tree, folder: Path) -> str:
    """Players of real, reconstructed and generated sound."""
    title = "Sound"
    listed = samples.get("audio", [])
    if not listed:
        return page.missing(title, "No sound here: samples/samples.json lists none.")
    cards = []
    for one in listed:
        players = "".join(_player(folder, one.get(kind), kind=kind) for kind in _kinds(listed))
        cards.append(f'<h3>{page.text(one.get("transcript", ""))}</h3><div class="players">{players}</div>')
    lead = "A held-out recording as the data keep it, through the autoencoder, and what the model says from its text."
    return page.section(title, page.grid(cards, cell="100%"), lead=lead)


def _player(folder: Path, name: str | None, *, kind: str) -> str:
    path = folder / name if name else None
    source = page.data_uri(path) if path else None
    if path is None or source is None:
        return f"<div><span>{kind}: none</span></div>"
    return f'<div><span>{kind}</span>{_wave(path)}<audio controls preload="metadata" src="{source}"></audio></div>'


def _wave(path: Path, *, bars: int = 90) -> str:
    """The sound's outline; nothing for a file that is no sound."""
    try:
        wave, _ = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        log.warning("%s has no outline in the report: %s", path, error)
        return ""
    edges = np.linspace(0, len(wave), bars + 1).astype(int)
    peaks = [float(np.abs(wave[a:b]).max()) if b > a else 0.0 for a, b in zip(edges[:-1], edges[1:], strict=True)]
    top = max(max(peaks), 1e-6)
    lines = "".join(f"M{4 * i + 2} {20 - 18 * p / top:.1f}V{20 + 18 * p / top:.1f}" for i, p in enumerate(peaks))
    return (
        f'<svg class="wave" viewBox="0 0 {4 * bars} 40" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="{lines}" stroke="currentColor" stroke-width="2" stroke-linecap="round"/></svg>'
    )


def texts(samples: Tree, _: Path) -> str:
    """Continuations with their patches."""
    title = "Text"
    listed = samples.get("text", [])
    if not listed:
        return page.missing(title, "No text here: samples/samples.json lists none.")
    key = '<p class="quiet"><span class="key">prompt</span> &nbsp; <span class="key new">continuation</span></p>'
    cards = [f"<h3>{page.text(one.get('label', ''))}</h3>{_text_sample(one)}" for one in listed]
    lead = "Each change of tint is a patch: one latent of the Atto. After the arrow the model writes alone."
    return page.section(title, key + page.grid(cards, cell="460px"), lead=lead)


def _text_sample(one: Tree) -> str:
    patches, given = one.get("patches", []), one.get("prompt_patches", 0)
    if not patches:
        return f'<p class="sample">{page.text(one.get("prompt", ""))}</p>'
    parts = []
    for place, patch in enumerate(patches):
        arrow = "<b>▸</b>" if place == given else ""
        parts.append(f"<i{' class=new' if place >= given else ''}>{arrow}{_patch(patch)}</i>")
    return f'<p class="sample">{"".join(parts)}</p>'


def _patch(patch: str | Tree) -> str:
    """A patch's text, line ends marked; bytes that are no UTF-8 by themselves as hexadecimal."""
    if isinstance(patch, str):
        return page.text(patch).replace("\n", "<u>↵</u>\n")
    data = base64.b64decode(patch.get("bytes", ""))
    return f"<u>{' '.join(f'{byte:02x}' for byte in data)}</u>"


def captions(samples: Tree, folder: Path) -> str:
    """What the model says of held-out pictures."""
    title = "Captions"
    listed = samples.get("caption", [])
    if not listed:
        return page.missing(title, "No captions here: samples/samples.json lists none.")
    cards = [
        f'<div class="pair"><div class="picture">{_picture(folder, one.get("image"), alt="picture")}</div><div>'
        f"<small>the model</small>{page.text(one.get('generated', ''))}"
        f"<small>the data</small>{page.text(one.get('truth', ''))}</div></div>"
        for one in listed
    ]
    return page.section(
        title, page.grid(cards), lead="A held-out picture, what the model says of it, and what the data say."
    )
