"""The table of time conditionings: a name -> where the network is told t of a span."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from matformer.config.schema import ModelConfig, TimeConditioning


@dataclass(frozen=True, slots=True)
class Entrances:
    """Where t enters; the closed form of `Precondition` knows it in any case.

    preludio: added to each patch's row, as scale and shift of it, or as a row of its own before the span.
    coda: added to its input, or as scale, shift and gate of its blocks. atto: as scale, shift and gate of its layers.
    """

    preludio: Literal["nowhere", "added", "film", "token"] = "nowhere"
    coda: Literal["nowhere", "added", "film"] = "nowhere"
    atto: bool = False


ENTRANCES: Mapping[TimeConditioning, Entrances] = {
    "none": Entrances(),
    "add": Entrances(preludio="added", coda="added"),
    "token": Entrances(preludio="token"),
    "adaln_preludio_coda": Entrances(preludio="film", coda="film"),
    "adaln_atto": Entrances(atto=True),
}


def modulated_media(model: ModelConfig) -> tuple[str, ...]:
    """Modalities whose patches the Atto's layers modulate; with none, these layers have no such weights."""
    return tuple(name for name, media in model.media.items() if ENTRANCES[media.time_conditioning].atto)
