"""Encoding of files to shards against the bare autoencoder on tensors that are ready: one process, in turn.

python tools/bench/encoding.py [--rounds 5] [--json]

Cases: a KL autoencoder of Stable Diffusion's widths halved (random weights: the speed is the same) on JPEGs that are
cropped to 128 x 128, and the demo's small convolutional one on PNGs of 64 x 64. Timed from files on disk to the part's
shard, reading, decoding, resizing, digests and writing included. CPU seconds count where each core has a process of its
own, as by default; seconds on the clock (`wall_...`) say what a core to spare hides, and nothing on a busy machine.
`memory_mb` is the growth of the process's peak between the first half of the parts and all of them.
"""

from __future__ import annotations

import argparse
import io
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import cpu_seconds, finish, in_turn, ratios, shown
from PIL import Image
from rich.table import Table

from data_prep.encode_part import Coder, Job, PartEncoder
from data_prep.media_items import Part, parts_of
from matformer.autoencoders import Autoencoder, ConvolutionalAutoencoder
from matformer.autoencoders.from_diffusers import DiffusersAutoencoder
from matformer.autoencoders.preparation import Preparation, as_media
from matformer.parallel.process import settle

BATCH = 16


def kl() -> Autoencoder:
    """Half the widths of Stable Diffusion's, its depth and its factor of 8."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "block_out_channels": (64, 128, 256, 256),
        "layers_per_block": 2,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    model = AutoencoderKL(**settings)
    return DiffusersAutoencoder(model.eval().requires_grad_(False))


def convolutional() -> Autoencoder:
    """The demo's size."""
    torch.manual_seed(0)
    return ConvolutionalAutoencoder(medium="image", size=8, channels=32).eval().requires_grad_(False)


def pictures(folder: Path, *, count: int, size: tuple[int, int], suffix: str) -> None:
    """Smooth random pictures as files, each with a caption."""
    draws = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(draws.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        stream = io.BytesIO()
        coarse.resize(size, Image.Resampling.BICUBIC).save(stream, format={"jpg": "jpeg"}.get(suffix, suffix))
        (folder / f"p{number:05d}.{suffix}").write_bytes(stream.getvalue())
        (folder / f"p{number:05d}.txt").write_text(f"picture {number}")


@torch.inference_mode()
def bare(autoencoder: Autoencoder, media: list[torch.Tensor]) -> None:
    """What the ratio is against: moments of batches that lie in memory."""
    for batch in media:
        moments = autoencoder.encode(batch)
        assert moments.logvar is not None
        torch.cat([moments.mean, moments.logvar], 1).half()


@contextmanager
def case(
    autoencoder: Autoencoder, *, count: int, size: tuple[int, int], suffix: str, bucket: tuple[int, int]
) -> Iterator[tuple[dict[str, Callable[[], None]], Callable[[Part], None], Path]]:
    """The two arms, and how to encode any part."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "media").mkdir()
        pictures(root / "media", count=count, size=size, suffix=suffix)
        preparation = Preparation.of(autoencoder, buckets=[bucket], fit="crop")
        encoder = PartEncoder(Coder(root, preparation, BATCH), autoencoder=autoencoder)
        (part,) = parts_of(root / "media", suffixes=(f".{suffix}",), samples=count)
        arrays = [
            preparation.read(item.media.read(), suffix=item.suffix)[1]
            for item in part.items()
            if item.media is not None
        ]
        media = [as_media(arrays[first : first + BATCH]) for first in range(0, count, BATCH)]

        def encode(part: Part) -> None:
            encoder.encode(Job(part, root / "part"))
            shutil.rmtree(root / "part")

        yield {"encoding": lambda: encode(part), "bare": lambda: bare(autoencoder, media)}, encode, root / "media"


def timed(
    arms: dict[str, Callable[[], None]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:  # fmt: skip
    """Seconds of CPU and on the clock of each arm, called in turn after one round to warm up."""
    wall: dict[str, list[float]] = {name: [] for name in arms}

    def once(name: str) -> float:
        began = time.perf_counter()
        seconds = cpu_seconds(arms[name])
        wall[name].append(time.perf_counter() - began)
        return seconds

    cpu = in_turn({name: lambda _, name=name: once(name) for name in arms}, rounds, warm_up=1)
    return cpu, {name: seconds[1:] for name, seconds in wall.items()}


def growth(encode: Callable[[Part], None], folder: Path, *, suffix: str, samples: int) -> float:
    """MB that the peak grows by in the second half of many small parts."""
    parts = parts_of(folder, suffixes=(f".{suffix}",), samples=samples)
    peaks = []
    for part in parts * 8:
        encode(part)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return peaks[-1] - peaks[len(peaks) // 2]


def main() -> int:
    """Prints a table; with --json one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    settle(1)
    cases: list[dict[str, Any]] = []
    table = Table("autoencoder", "seconds", "encoding, samples a second", "bare", "throughput's ratio", "memory, MB")
    for name, make, count, size, suffix, bucket in (
        ("AutoencoderKL, 128 x 128", kl, 32, (200, 160), "jpg", (16, 16)),
        ("convolutional, 64 x 64", convolutional, 256, (64, 64), "png", (8, 8)),
    ):
        with case(make(), count=count, size=size, suffix=suffix, bucket=bucket) as (arms, encode, folder):
            cpu, wall = timed(arms, asked.rounds)
            grown = growth(encode, folder, suffix=suffix, samples=count // 4)
        result = {
            "case": name,
            "encoding_per_cpu_s": count / statistics.median(cpu["encoding"]),
            "bare_per_cpu_s": count / statistics.median(cpu["bare"]),
            "encoding_per_wall_s": count / statistics.median(wall["encoding"]),
            "bare_per_wall_s": count / statistics.median(wall["bare"]),
            "memory_mb": grown,
            **ratios(cpu["bare"], cpu["encoding"]),
            **{f"wall_{key}": value for key, value in ratios(wall["bare"], wall["encoding"]).items()},
        }
        cases.append(result)
        for kind, seconds in (("cpu", cpu), ("wall", wall)):
            speeds = [f"{result[f'{arm}_per_{kind}_s']:.1f}" for arm in ("encoding", "bare")]
            ratio = shown(ratios(seconds["bare"], seconds["encoding"]))
            table.add_row(name, kind, *speeds, ratio, f"{grown:.1f}")
    return finish(table, {"cases": cases}, as_json=asked.json)


if __name__ == "__main__":
    raise SystemExit(main())
