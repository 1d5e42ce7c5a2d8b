"""Writes the model family: `configs/model/{10m,...,70b}.yaml`, all sizes from one dial, the number of layers.

    python tools/model_family.py

The width is 256 / 3 of the layers (in steps of 256, above 2,048 of 1,024), heads have 128 numbers (64 in the smallest),
at most 8 key/value heads, feed-forward 8/3 of the width. The width of the local models of bytes is the largest of 128,
256, 512, 1,024 that is at most a quarter of the Atto's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FAMILY = {"10m": 4, "30m": 6, "200m": 12, "500m": 18, "1b": 24, "4b": 36, "8b": 44, "70b": 96}
"""Name -> layers."""

FOLDER = Path(__file__).parents[1] / "configs" / "model"


def model_of(layers: int) -> dict[str, Any]:
    """The model section of a config for this many layers."""
    step = 256 if layers <= 24 else 1024
    width = round(layers * 256 / 3 / step) * step
    head = 64 if width <= 512 else 128
    heads = width // head
    kv_heads = heads if heads <= 4 else next(n for n in (8, 4, 2) if heads % n == 0 and heads > n)
    return {
        "atto": {
            "width": width,
            "layers": layers,
            "heads": heads,
            "kv_heads": kv_heads,
            "ffn_width": rounded(width * 8 / 3, step=64 if width < 1024 else 256),
            "rotary_pairs": [14, 6, 6, 6] if head == 64 else [28, 12, 12, 12],
            "rotary_base": 10_000.0 if width < 1024 else 500_000.0,
        },
        "text": text_of(width),
        "media": media_of(width),
    }


def text_of(width: int) -> dict[str, Any]:
    """Local models of bytes for an Atto of this width."""
    local = next(size for size in (1024, 512, 256, 128) if size <= max(128, width // 4))
    return {
        "width": local,
        "heads": local // 64,
        "ffn_width": rounded(local * 8 / 3, step=64),
        "preludio_layers": 1,
        "coda_layers": 2 if local < 512 else 4,
        "window": 64 if local < 512 else 256,
        "ngram_rows": 2048 if width < 512 else 4096 * (width // 512),
    }


def media_of(width: int) -> dict[str, Any]:
    """Pictures and sound in the latents of usual autoencoders (AutoencoderDC: 32 channels; Oobleck: 64)."""
    coda, layers = max(256, min(1280, width // 2)), 2 if width < 1024 else 4
    pictures = [[16, 16], [24, 24], [32, 32]]
    sound = [[128], [256], [512]]
    return {
        "image": {
            "channels": 32,
            "rank": 2,
            "patch": 1,
            "buckets": pictures,
            "coda_width": coda,
            "coda_layers": layers,
        },
        "audio": {"channels": 64, "rank": 1, "patch": 2, "buckets": sound, "coda_width": coda, "coda_layers": layers},
    }


def rounded(number: float, *, step: int) -> int:
    """The next multiple of `step`."""
    return -(-int(number) // step) * step


def yaml_of(name: str) -> str:
    """The file: one line a part, as a person would write it."""
    model = model_of(FAMILY[name])
    media = "".join(f"  {key}: {flow(value)}\n" for key, value in model["media"].items())
    return (
        f"# one of a family, by tools/model_family.py from {FAMILY[name]} layers\n"
        f"atto: {flow(model['atto'])}\ntext: {flow(model['text'])}\nmedia:\n{media}"
    )


def flow(value: Any) -> str:
    """YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return str(value)


def main() -> None:
    """Write every file."""
    parser = argparse.ArgumentParser(description="Write configs/model/{10m,...,70b}.yaml.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    for name in FAMILY:
        (folder / f"{name}.yaml").write_text(yaml_of(name))


if __name__ == "__main__":
    main()
