"""Fields of motion after a picture -> the frames they make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from matformer.autoencoders import MotionField
from matformer.autoencoders.motion_field import MACROBLOCK, warp
from matformer.data.sources import MediaSpan, TextSpan
from matformer.engine.media import MediaCodec


def animated(
    spans: Sequence[TextSpan | MediaSpan], codec: Callable[[str], MediaCodec]
) -> tuple[Float[Tensor, "T 3 y x"], float] | None:
    """The last picture that fields of motion follow, moved by each of them in turn, and frames a second.

    None where no field fits a picture before it. `codec` gives a modality's.
    """
    picture: Tensor | None = None
    fields: list[Tensor] = []
    fps = 0.0
    for span in spans:
        if isinstance(span, TextSpan):
            continue
        found = codec(span.modality)
        if not isinstance(found.autoencoder, MotionField):
            if found.suffix == ".png":
                picture, fields = found.decode(span.latent), []
        elif picture is not None and _fits(span, picture):
            fields.append(found.decode(span.latent))
            fps = found.preparation.fps
    if picture is None or not fields:
        return None
    return torch.cat((picture[None], warp(picture, torch.stack(fields)))), fps


def _fits(span: MediaSpan, picture: Tensor) -> bool:
    return tuple(MACROBLOCK * size for size in span.latent.shape[1:]) == tuple(picture.shape[1:])
