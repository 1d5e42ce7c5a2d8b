"""Originals above what the autoencoder keeps of them, as one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_prep.quality import MEL_FLOOR, log_mel

COLUMNS, GAP, SIDE = 8, 4, 128


def save_sheet(path: Path, originals: list[Tensor], decoded: list[Tensor], *, rate: int | None) -> None:
    """Pairs of media [c, *axes]: pictures as they are, a video's middle frame, sound as its log-mel spectrum."""
    pairs = [(_shown(one, rate=rate), _shown(other, rate=rate)) for one, other in zip(originals, decoded, strict=True)]
    height = max(drawing.height for pair in pairs for drawing in pair)
    width = max(drawing.width for pair in pairs for drawing in pair)
    rows = -(-len(pairs) // COLUMNS)
    sheet = Image.new(
        "RGB", (COLUMNS * (width + GAP) + GAP, rows * (2 * height + 3 * GAP) + GAP), (255, 255, 255)
    )  # fmt: skip
    for number, pair in enumerate(pairs):
        row, column = divmod(number, COLUMNS)
        for below, drawing in enumerate(pair):
            sheet.paste(
                drawing, (GAP + column * (width + GAP), GAP + row * (2 * height + 3 * GAP) + below * (height + GAP))
            )
    sheet.save(path)


def _shown(media: Tensor, *, rate: int | None) -> Image.Image:
    if rate is not None:
        spectrum = log_mel(media[None, :1], rate=rate)[0, 0].flip(0)
        floor = float(10 * np.log10(MEL_FLOOR))
        drawing = Image.fromarray(((spectrum - floor) / -floor * 255).clamp(0, 255).to(torch.uint8).numpy())
        return drawing.convert("RGB").resize((2 * SIDE, SIDE))
    if media.ndim == 4:
        media = media[:, media.shape[1] // 2]
    pixels = ((media[:3] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(0, 2).numpy()
    drawing = Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]))
    drawing.thumbnail((2 * SIDE, 2 * SIDE))
    return drawing.convert("RGB")
