"""Pictures or sounds -> a small convolutional autoencoder that was trained on them in a minute or two.

    python -m data_prep.train_autoencoder (--data MEDIA | --demo CACHE) --medium image --buckets 8x8 --out FOLDER \
        [--size 8] [--channels 32] [--steps 300] [--seed 0]

MEDIA is as for encode_latents. One in ten samples is held out by the hash of its key; the last lines say how well these
come back, by the closed-form autoencoder that training starts from and by the trained one. The same command on the same
machine gives the same weights. The folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress, TextColumn
from torch import Tensor

from data_prep.accept_autoencoder import add_preparation, preparation_from
from data_prep.fetch import fetch
from data_prep.media_items import parts_of
from data_prep.pictures import all_pictures
from data_prep.quality import mel_distance, psnr, snr
from data_prep.records import is_held_out
from data_prep.save import save_whole
from data_prep.speech import SAMPLE_RATE, all_prompts, spoken_names
from matformer.autoencoders import Autoencoder, ConvolutionalAutoencoder
from matformer.autoencoders.preparation import SUFFIXES, as_media
from matformer.door import door, positive
from matformer.errors import DataError

log = logging.getLogger("data_prep.train_autoencoder")

HELD_OUT_ONE_IN = 10
MOST_SAMPLES = 20_000
"""Training holds its samples in memory."""
FITTED, SCORED = 2000, 128
LEARNING_RATE, WARM_UP = 2e-3, 20
KL_WEIGHT = 1e-4
CROP_CELLS = 64
Samples = list[tuple[str, np.ndarray]]


@door
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    asked = _parser().parse_args(arguments)
    if asked.out.exists():
        raise DataError(f"{asked.out} must not exist yet, got a folder or file; remove it or change --out")
    start = _untrained(asked)
    samples = _demo(asked) if asked.demo else _media(asked, start)
    train_on, held = _split(samples)
    trained = train(train_on, like=start, steps=asked.steps, batch=asked.batch, seed=asked.seed, scores=held[:SCORED])
    save_whole(trained, asked.out)
    log.info("%s: fingerprint %s", asked.out, trained.fingerprint[:16])
    return 0


def train(
    samples: Sequence[np.ndarray], *, like: ConvolutionalAutoencoder, steps: int, batch: int, seed: int,
    scores: Sequence[np.ndarray] = (),
) -> ConvolutionalAutoencoder:  # fmt: skip
    """Squared error and a light Kullback-Leibler term, AdamW, from the closed-form one. `like` gives the sizes."""
    torch.manual_seed(seed)
    autoencoder = ConvolutionalAutoencoder.fit([_for_fit(one) for one in samples[:FITTED]], **like.settings())
    crop = like.media_axes((CROP_CELLS,))[0] if like.medium == "audio" else None
    batches = _batches(samples, batch=batch, seed=seed, crop=crop)
    first = next(batches)
    autoencoder.set_gains(first)
    spread = float(first.square().mean() if crop else first.var())
    _log_scores("closed form", autoencoder, scores)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[error]:.4f} of the variance"))
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("autoencoder", total=steps, error=1.0)
        for step, media in enumerate(itertools.islice(batches, steps)):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min((step + 1) / WARM_UP, 1.0, 1.5 * (steps - step) / steps)
            error, divergence = _losses(autoencoder, media)
            optimizer.zero_grad()
            (error / spread + KL_WEIGHT * divergence).backward()
            torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
            optimizer.step()
            progress.update(task, advance=1, error=float(error.detach()) / spread)
    autoencoder.eval().requires_grad_(False)
    _log_scores("trained", autoencoder, scores)
    return autoencoder


@torch.no_grad()
def score(autoencoder: Autoencoder, samples: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean over samples: PSNR of pictures in dB; SNR and log-mel distance of sounds in dB."""
    found: dict[str, list[float]] = {}
    for array in samples:
        media = as_media([array])
        decoded = autoencoder(media)[..., : media.shape[-1]]
        if autoencoder.sample_rate is None:
            found.setdefault("psnr_db", []).append(float(psnr(decoded.clamp(-1, 1), media)))
        else:
            found.setdefault("snr_db", []).append(float(snr(decoded, media)))
            distance = mel_distance(decoded, media, rate=autoencoder.sample_rate)
            found.setdefault("mel_db", []).append(float(distance))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _losses(autoencoder: ConvolutionalAutoencoder, media: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of media decoded from a draw; divergence from a Gaussian of each channel's own mean variance."""
    moments = autoencoder.encode(media)
    assert moments.logvar is not None
    drawn = moments.mean + torch.randn_like(moments.mean) * (0.5 * moments.logvar).exp()
    error = (autoencoder.decode(drawn)[..., : media.shape[-1]] - media).square().mean()
    gain = autoencoder.latent_gain.reshape(-1, *[1] * (media.ndim - 2))
    mean, logvar = moments.mean * gain, moments.logvar + 2 * gain.log()
    return error, 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean()


def _batches(samples: Sequence[np.ndarray], *, batch: int, seed: int, crop: int | None) -> Iterator[Tensor]:
    """Endless, in an order of the seed's; sound is cut to `crop` at a random place, or filled up with silence."""
    for epoch in itertools.count():
        draws = np.random.default_rng((seed, epoch))
        order = draws.permutation(len(samples)).tolist()
        order = (order * -(-batch // len(order)))[: max(len(order) // batch, 1) * batch]
        for first in range(0, len(order), batch):
            chosen = [samples[i] for i in order[first : first + batch]]
            yield as_media(chosen if crop is None else [_cut(one, size=crop, draws=draws) for one in chosen])


def _cut(wave: np.ndarray, *, size: int, draws: np.random.Generator) -> np.ndarray:
    start = int(draws.integers(0, max(wave.shape[1] - size, 0) + 1))
    piece = wave[:, start : start + size]
    return np.pad(piece, ((0, 0), (0, size - piece.shape[1])))


def _for_fit(sample: np.ndarray) -> Tensor:
    return torch.from_numpy(sample if sample.dtype == np.uint8 else sample[0])


def _log_scores(name: str, autoencoder: Autoencoder, samples: Sequence[np.ndarray]) -> None:
    if samples:
        found = score(autoencoder, samples)
        log.info("%s: %s on %d held-out samples", name, _said(found), len(samples))


def _said(found: dict[str, float]) -> str:
    return ", ".join(f"{measure.removesuffix('_db')} {value:.2f} dB" for measure, value in found.items())


def _untrained(asked: argparse.Namespace) -> ConvolutionalAutoencoder:
    rate = asked.sample_rate if asked.medium == "audio" else None
    return ConvolutionalAutoencoder(
        medium=asked.medium, size=asked.size, channels=asked.channels, width=asked.width, blocks=asked.blocks,
        sample_rate=rate,
    )  # fmt: skip


def _demo(asked: argparse.Namespace) -> Samples:
    files = fetch(asked.demo)
    pictures = all_pictures(files)
    if asked.medium == "image":
        return [(one.base, np.ascontiguousarray(one.pixels.transpose(2, 0, 1))) for one in pictures]
    if asked.sample_rate != SAMPLE_RATE:
        raise DataError(f"the demo's sounds have {SAMPLE_RATE} Hz, got {asked.sample_rate}; change --sample-rate")
    sounds = itertools.chain(all_prompts(files), spoken_names(pictures))
    return [(sound.base, sound.wave[None]) for sound in itertools.islice(sounds, MOST_SAMPLES)]


def _media(asked: argparse.Namespace, like: Autoencoder) -> Samples:
    """What can be read, up to MOST_SAMPLES; the rest is named and left out."""
    if not asked.buckets:
        raise DataError("shapes must be given with --data, got none; set --buckets, such as 8x8")
    preparation = preparation_from(asked, like)
    if asked.medium == "image" and len(preparation.buckets) > 1:
        raise DataError(f"pictures must have one shape in training, got {asked.buckets}; change --buckets")
    samples: Samples = []
    parts = parts_of(asked.data, suffixes=SUFFIXES[preparation.modality], samples=256)
    for item in itertools.islice((item for part in parts for item in part.items()), MOST_SAMPLES):
        try:
            if item.media is not None:
                samples.append((item.key, preparation.read(item.media.read(), suffix=item.suffix)[1]))
        except DataError as error:
            log.warning("left out %s of %s: %s", item.key, item.shard, error)
    return samples


def _split(samples: Samples) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Train and held-out. Raises DataError where there is nothing to train on."""
    held = [array for key, array in samples if is_held_out(key, one_in=HELD_OUT_ONE_IN)]
    kept = [array for key, array in samples if not is_held_out(key, one_in=HELD_OUT_ONE_IN)]
    if not kept:
        raise DataError(f"training needs samples, got {len(samples)} in all; change --data")
    order = np.random.default_rng(0).permutation(len(kept)).tolist()
    return [kept[i] for i in order], held


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data", type=Path, help="folder of media, or of WebDataset tars of them")
    where.add_argument("--demo", type=Path, metavar="CACHE", help="the demo's pictures or sounds, from its downloads")
    parser.add_argument("--out", type=Path, required=True, help="folder of the autoencoder")
    parser.add_argument("--medium", choices=("image", "audio"), required=True)
    parser.add_argument("--size", type=positive, default=8, help="pixels of a cell's side; samples of a cell of sound")
    parser.add_argument("--channels", type=positive, default=32)
    parser.add_argument("--width", type=positive, default=96)
    parser.add_argument("--blocks", type=positive, default=3)
    parser.add_argument("--sample-rate", type=positive, default=SAMPLE_RATE)
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--seed", type=int, default=0)
    add_preparation(parser, required=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
