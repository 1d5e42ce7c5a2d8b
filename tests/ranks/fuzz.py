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
from matformer.data.patching import StaticPatcher, text_symbols
from matformer.data.sources import Document, MediaSpan, TextSpan, media_span
from matformer.data.text_rows import with_masks
from matformer.errors import ConfigError
from matformer.parcels import Batch
from tests.made import as_blt, as_diffused, as_tokens, audio, image, tiny_run

LAYERS = 4
MICROBATCHES = 8
STEPS = 3
DEGREES = {"tp": (1, 1, 2, 2, 4), "cp": (1, 1, 2, 4), "pp": (1, 1, 2, 2, 4), "dp": (1, 1, 2, 2, 4)}
# AdamW's with eps 1e-5 turns a gradient's rounding, 1e-7 of the tensor's largest, into about lr / 100 of a weight.
RATES = {"adamw": 3e-4, "sgd": 1e-3}
MOST_RANKS = 8
ROW = 192  # latents; of 80 trials the longest row takes 125
MOST_DRAWS = 1000

VOCABULARY = 40
PATCH_BYTES = 3
LONGEST_PATCH = 8

TEXTS = ("own", "own", "blt", "masked_diffusion", "block_diffusion", "bpe", "tokens")
CUTS = {"own": ("static", "any"), "blt": ("static", "any"), "bpe": ("any",), "tokens": ("any",)}  # the others: static
BUDGETS: Sequence[dict[str, Any]] = (
    {},
    {},
    {"patch": 1, "budget": {"share": 0.5, "levels": 2}},
    {"patch": 1, "budget": {"share": 0.6, "levels": 1, "noised_tree": "own"}},
)
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
        layout, train = _draw_layout(draws, most_ranks=most_ranks), _draw_train(draws)
        text, media = _draw_text(draws), _draw_media(draws)
        try:
            config = _config(text, media, layout, train)
            check(config)
        except ConfigError:
            continue
        words = " ".join(f"{key}={value}" for part in (layout, train, text, media) for key, value in part.items())
        return Trial(config, _steps(config.model, draws, cuts=text["cuts"]), words)
    raise AssertionError(f"of {MOST_DRAWS} drawn runs one must pass the checks")


def one_rank(config: RunConfig) -> RunConfig:
    """The same run on one rank in plain PyTorch."""
    return config.model_copy(update={"parallel": tiny_run().parallel})


def _one(draws: np.random.Generator, choices: Sequence[Any]) -> Any:  # noqa: ANN401 - whatever is chosen from
    return choices[int(draws.integers(len(choices)))]


def _draw_layout(draws: np.random.Generator, *, most_ranks: int) -> dict[str, Any]:
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
    return layout


def _draw_train(draws: np.random.Generator) -> dict[str, Any]:
    return {"optimizer": _one(draws, ("adamw", "sgd")), "clip": _one(draws, (0.0, 1.0))}


def _draw_text(draws: np.random.Generator) -> dict[str, Any]:
    text = _one(draws, TEXTS)
    return {"text": text, "cuts": _one(draws, CUTS.get(text, ("static",))), "kv_heads": _one(draws, (1, 2, 4))}


def _draw_media(draws: np.random.Generator) -> dict[str, Any]:
    keys = {name: _one(draws, values) for name, values in MEDIA.items()}
    return keys | {"media_context": _one(draws, ("clean_copy", "clean_copy", "noised"))} | _one(draws, BUDGETS)


def _config(text: dict[str, Any], media: dict[str, Any], layout: dict[str, Any], train: dict[str, Any]) -> RunConfig:
    numbers = {"global_batch": 2 * MICROBATCHES, "lr": RATES[train["optimizer"]]}
    run = tiny_run(layers=LAYERS, train=numbers | train, **layout)
    model = _with_text(run.model, text["text"])
    atto = model.atto.model_copy(update={"kv_heads": text["kv_heads"]})
    sizes = {"lanes": 2 * MICROBATCHES, "sequence_latents": ROW, "patcher": _patcher(**text)}
    context = media["media_context"]
    each = {key: value for key, value in media.items() if key != "media_context"}
    all_media = {name: one.model_dump() | each for name, one in model.media.items()}
    changed = {"media": all_media, "atto": atto.model_dump(), "media_context": context}
    return run.model_copy(
        update={
            "data": run.data.model_copy(update=sizes),
            "model": ModelConfig.model_validate(model.model_dump() | changed),
        }
    )


def _with_text(model: ModelConfig, text: str) -> ModelConfig:
    if text == "blt":
        return as_blt(model)
    if text.endswith("diffusion"):
        return as_diffused(model, text)
    if text == "tokens":
        return as_tokens(model, VOCABULARY)
    predicts = model.text.model_copy(update={"predicts_end": text == "bpe"})
    return model.model_copy(update={"text": predicts})


def _patcher(text: str, cuts: str, **_: object) -> PatcherConfig:
    """What the checks are to see; patches are cut here."""
    if text in ("bpe", "tokens"):
        return PatcherConfig(kind=text, sentencepiece="drawn")  # pyright: ignore[reportArgumentType] - one of its kinds
    return PatcherConfig(kind="static" if cuts == "static" else "space", patch_bytes=PATCH_BYTES)


def _steps(model: ModelConfig, draws: np.random.Generator, *, cuts: str) -> list[list[Batch]]:
    return [
        [_microbatch(model, draws, cuts=cuts, step=step, number=n) for n in range(MICROBATCHES)]
        for step in range(STEPS)
    ]


def _microbatch(model: ModelConfig, draws: np.random.Generator, *, cuts: str, step: int, number: int) -> Batch:
    """Two rows; each modality is there or not."""
    kinds = [kind for kind in ("image", "audio") if draws.integers(2)]
    rows = [[_piece(model, draws, kinds, cuts=cuts, key=f"{step}.{number}.{row}")] for row in range(2)]
    noise = [
        draw_training_noise(seed=0, step=step, lane=2 * number + row, blind_probability=0.3, time_shift=1.0)
        for row in range(2)
    ]
    batch = pack_batch(rows, noise, model=model, sequence_latents=ROW)
    if model.diffuses_text:
        return with_masks(batch, number=number % 16, draws=16, seed=step)
    return batch


def _piece(model: ModelConfig, draws: np.random.Generator, kinds: Sequence[str], *, cuts: str, key: str) -> Piece:
    """A document of some of the kinds, with text before, between or behind them."""
    spans: list[TextSpan | MediaSpan] = [_medium(model, draws, kind) for kind in kinds if draws.integers(4)]
    first = int(draws.integers(len(spans) + 1))
    for place in reversed(range(len(spans) + 1)):
        if place == first or draws.integers(2):
            spans.insert(place, _text(model, draws, cuts=cuts))
    one = Document(key, tuple(spans))
    return Piece(one, Place(), Place(len(one.spans)))


def _medium(model: ModelConfig, draws: np.random.Generator, kind: str) -> MediaSpan:
    """Small or large; half of it may vary less, so that its tree has leaves of several sizes."""
    large, seed = bool(draws.integers(2)), int(draws.integers(1000))
    latent = (image(seed, wide=large) if kind == "image" else audio(seed, long=large)).latent
    calm = np.where(np.arange(latent.shape[-1]) < latent.shape[-1] // 2, 1.0, _one(draws, (0.1, 1.0)))
    role = _one(draws, ("generate", "given"))
    return media_span((latent * calm).astype(np.float32), kind, media=model.media[kind], role=role)


def _text(model: ModelConfig, draws: np.random.Generator, *, cuts: str) -> TextSpan:
    """Any bytes; in patches of one length, or cut anywhere with `<end>` alone in the last."""
    data = draws.bytes(int(draws.integers(1, 40)))
    if cuts == "static":
        return TextSpan(data, StaticPatcher(PATCH_BYTES).lengths(text_symbols(data)))
    lengths: list[int] = []
    while (left := len(data) - sum(lengths)) > 0:
        lengths.append(int(draws.integers(1, min(left, LONGEST_PATCH) + 1)))
    tokens = None
    if model.text.vocabulary is not None:
        tokens = np.append(draws.integers(VOCABULARY, size=len(lengths)), VOCABULARY)
    return TextSpan(data, np.array([*lengths, 1], np.int32), tokens=tokens)
