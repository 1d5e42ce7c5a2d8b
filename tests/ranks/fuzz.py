"""Random small models under random layouts: what `tests/parity/test_fuzz.py` and `tools/parity_fuzz.py` try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from matformer.config.check import check
from matformer.config.schema import ModelConfig, PatcherConfig, RunConfig
from matformer.data.packing import Piece, Place, draw_training_noise, pack_batch
from matformer.data.sources import Document
from matformer.data.text_rows import with_masks
from matformer.errors import ConfigError
from matformer.parcels import Batch
from tests.made import as_blt, as_diffused, audio, document, image, tiny_run

LAYERS = 4
MICROBATCHES = 8
STEPS = 3
DEGREES = {"tp": (1, 1, 2, 2, 4), "cp": (1, 1, 2), "pp": (1, 1, 2, 2, 4), "dp": (1, 1, 2, 2, 4)}
# AdamW's with eps 1e-5 turns a gradient's rounding, 1e-7 of the tensor's largest, into about lr / 100 of a weight.
RATES = {"adamw": 3e-4, "sgd": 1e-3}
MOST_RANKS = 8
ROW = 80  # latents; 60 trials of seed 0 take at most 49
MOST_DRAWS = 1000

TEXTS = ("own", "own", "blt", "masked_diffusion", "block_diffusion")
MEDIA: dict[str, Sequence[Any]] = {
    "objective": ("flow", "flow", "ddpm_eps", "ddpm_v", "next_latent"),
    "time_conditioning": ("add", "token", "adaln_preludio_coda", "adaln_atto", "none"),
    "coda": ("mlp", "dit", "linear"),
    "unet_width": (0, 0, 4),
    "loss_weighting": ("none", "min_snr"),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """A run and its global batches; described in one line."""

    config: RunConfig
    steps: list[list[Batch]]
    words: str


def draw_trial(seed: int, trial: int, *, most_ranks: int = MOST_RANKS) -> Trial:
    """A model, a layout that fits it, and batches in which modalities come and go. Draws anew what a check refuses."""
    draws = np.random.default_rng([seed, trial])
    for _ in range(MOST_DRAWS):
        text, keys, layout, train = _draw_keys(draws, most_ranks=most_ranks)
        try:
            config = _config(text, keys, layout, train)
            check(config)
        except ConfigError:
            continue
        words = " ".join(
            f"{key}={value}" for part in (layout, train, {"text": text}, keys) for key, value in part.items()
        )
        return Trial(config, _steps(config.model, draws), words)
    raise AssertionError(f"of {MOST_DRAWS} drawn runs one must pass the checks")


def one_rank(config: RunConfig) -> RunConfig:
    """The same run on one rank in plain PyTorch."""
    return config.model_copy(update={"parallel": tiny_run().parallel})


def _one(draws: np.random.Generator, choices: Sequence[Any]) -> Any:  # noqa: ANN401 - whatever is chosen from
    return choices[int(draws.integers(len(choices)))]


def _draw_keys(
    draws: np.random.Generator, *, most_ranks: int
) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]:
    layout: dict[str, Any] = {}
    while not 2 <= prod(layout.values()) <= most_ranks:  # of one rank there is nothing to find
        layout = {name: _one(draws, choices) for name, choices in DEGREES.items()}
    layout["sequence_parallel"] = layout["tp"] > 1 and bool(draws.integers(2))
    layout["recompute"] = _one(draws, ("none", "none", "selective", "full"))
    if layout["pp"] > 1:
        layout["virtual_stages"] = _one(draws, (1, 2)) if layout["pp"] == 2 else 1
        if layout["pp"] == 2 and layout["virtual_stages"] == 1:
            layout["stage_layers"] = _one(draws, (None, (1, 3), (3, 1)))
    else:
        layout["zero_stage"] = _one(draws, (1, 2, 3))
        layout["offload_optimizer"] = layout["zero_stage"] > 1 and bool(draws.integers(2))
    keys = {name: _one(draws, values) for name, values in MEDIA.items()}
    keys["media_context"] = _one(draws, ("clean_copy", "clean_copy", "noised"))
    train = {"optimizer": _one(draws, ("adamw", "sgd")), "clip": _one(draws, (0.0, 1.0))}
    return _one(draws, TEXTS), keys, layout, train


def _config(text: str, keys: dict[str, Any], layout: dict[str, Any], train: dict[str, Any]) -> RunConfig:
    numbers = {"global_batch": 2 * MICROBATCHES, "lr": RATES[train["optimizer"]]}
    run = tiny_run(layers=LAYERS, train=numbers | train, **layout)
    model = as_blt(run.model) if text == "blt" else run.model
    model = as_diffused(model, text) if text.endswith("diffusion") else model
    atto = model.atto.model_copy(update={"kv_heads": 4 if layout["tp"] == 4 else 2})
    data = run.data.model_copy(
        update={"lanes": 2 * MICROBATCHES, "sequence_latents": ROW, "patcher": PatcherConfig(patch_bytes=3)}
    )
    context = keys["media_context"]
    each = {key: value for key, value in keys.items() if key != "media_context"}
    media = {name: one.model_dump() | each for name, one in model.media.items()}
    changed = {"media": media, "atto": atto.model_dump(), "media_context": context}
    return run.model_copy(update={"data": data, "model": ModelConfig.model_validate(model.model_dump() | changed)})


def _steps(model: ModelConfig, draws: np.random.Generator) -> list[list[Batch]]:
    return [[_microbatch(model, draws, step=step, number=n) for n in range(MICROBATCHES)] for step in range(STEPS)]


def _microbatch(model: ModelConfig, draws: np.random.Generator, *, step: int, number: int) -> Batch:
    """Two rows; each modality is there or not."""
    kinds = [kind for kind in ("image", "audio") if draws.integers(2)]
    rows = [[_piece(draws, kinds, key=f"{step}.{number}.{row}")] for row in range(2)]
    noise = [
        draw_training_noise(seed=0, step=step, lane=2 * number + row, blind_probability=0.3, time_shift=1.0)
        for row in range(2)
    ]
    batch = pack_batch(rows, noise, model=model, sequence_latents=ROW)
    if model.diffuses_text:
        return with_masks(batch, number=number % 16, draws=16, seed=step)
    return batch


def _piece(draws: np.random.Generator, kinds: Sequence[str], *, key: str) -> Piece:
    made = {"image": image, "audio": audio}
    spans: list[Any] = []
    for kind in kinds:
        if draws.integers(4):
            spans.append(made[kind](int(draws.integers(1000)), role=_one(draws, ("generate", "given"))))
    text = draws.bytes(int(draws.integers(1, 40)))
    spans.insert(int(draws.integers(len(spans) + 1)), text)
    one: Document = document(key, *spans)
    return Piece(one, Place(), Place(len(one.spans)))
