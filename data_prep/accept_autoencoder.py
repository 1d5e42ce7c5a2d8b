"""Is this autoencoder good enough for this data set? Numbers, a contact sheet, and a record that encoding asks for.

    python -m data_prep.accept_autoencoder --autoencoder FOLDER --data MEDIA --buckets 8x8 [--samples 64] \
        [--min-psnr 20] [--min-ssim 0.6] [--max-mel 8] [--min-snr 20] [--out FOLDER/acceptance]

MEDIA is a folder of files or of WebDataset tars. Writes acceptance.json and contact_sheet.png; exit code 2 if it is not
accepted. `--buckets` are grids in latent cells (8x8 for pictures, 64 for sound, 3x8x8 for video).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from data_prep.contact_sheet import save_sheet
from data_prep.media_items import Item, parts_of
from data_prep.quality import SSIM_WINDOW, channel_statistics, mel_distance, psnr, snr, ssim, variance_snr
from matformer.autoencoders import Autoencoder, load_autoencoder
from matformer.autoencoders.acceptance import RECORD_FOLDER, Acceptance
from matformer.autoencoders.preparation import SUFFIXES, Preparation, as_media
from matformer.door import amount, door, positive
from matformer.errors import DataError

log = logging.getLogger("data_prep.accept_autoencoder")

SHOWN = 24
DEFAULTS = {
    "image": {"min_psnr_db": 20.0, "min_ssim": 0.6},
    "video": {"min_psnr_db": 20.0, "min_ssim": 0.6},
    "audio": {"max_mel_db": 8.0},
    "tensor": {"min_snr_db": 20.0},
}


@dataclass
class Findings:
    """Measures by sample, latents [C, cells] by sample, and the pairs that are shown."""

    quality: dict[str, list[float]] = field(default_factory=dict)
    latents: list[Tensor] = field(default_factory=list)
    originals: list[Tensor] = field(default_factory=list)
    decoded: list[Tensor] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        """The mean over samples of each measure, of PSNR the 5th percentile too; SNR of variance and error in all."""
        found = {name: float(np.mean(values)) for name, values in self.quality.items()}
        if "variance" in self.quality:
            found["snr_db"] = variance_snr(found["error"], variance=found["variance"])
        if "psnr_db" in self.quality:
            found["psnr_db_5th_percentile"] = float(np.percentile(self.quality["psnr_db"], 5))
        return found


@door
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    asked = _parser().parse_args(arguments)
    try:
        autoencoder = load_autoencoder(asked.autoencoder)
        preparation = preparation_from(asked, autoencoder)
        items = sample_items(asked.data, suffixes=SUFFIXES[preparation.modality], count=asked.samples)
        findings = measure(autoencoder, items, preparation=preparation)
        thresholds = _thresholds(asked, modality=preparation.modality)
        record = judged(autoencoder, findings, thresholds=thresholds, preparation=preparation)
        out = asked.out or asked.autoencoder / RECORD_FOLDER
        out.mkdir(parents=True, exist_ok=True)
        save_sheet(
            out / "contact_sheet.png", findings.originals, findings.decoded, rate=preparation.sample_rate
        )  # fmt: skip
        record.save(out)  # last: nothing is accepted without a sheet to look at
        Console(stderr=True).print(_table(record))
        if not record.accepted:
            raise DataError(
                f"the autoencoder in {asked.autoencoder} must meet its thresholds, got {'; '.join(record.failed)} "
                f"(see {out}); use a better one, or change --min-psnr, --min-ssim, --max-mel or --min-snr"
            )
    except OSError as error:
        sys.stderr.write(f"the record must be written, got: {error}; free space or change --out\n")
        return 2
    log.info("accepted; the record is in %s", out)
    return 0


def preparation_from(asked: argparse.Namespace, autoencoder: Autoencoder) -> Preparation:
    """As the options of `add_preparation` say."""
    try:
        buckets = [tuple(int(size) for size in bucket.split("x")) for bucket in asked.buckets.split(",")]
    except ValueError as error:
        raise DataError(f"--buckets must be shapes like 8x8,6x10, got {asked.buckets!r}") from error
    return Preparation.of(autoencoder, buckets=buckets, fit=asked.fit, level=asked.level, fps=asked.fps)


def add_preparation(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Options that say how media become arrays."""
    parser.add_argument("--buckets", required=required, help="grids in latent cells, such as 8x8,6x10 or 32,64,128")
    parser.add_argument("--fit", choices=("pad", "crop", "exact"), default="pad", help="pictures, frames: to a bucket")
    parser.add_argument(
        "--level", choices=("speech", "as-is"), help="sound: trim and level, or not; speech by default if mono"
    )
    parser.add_argument("--fps", type=amount, default=8.0, help="video: frames a second")


def sample_items(root: Path, *, suffixes: tuple[str, ...], count: int) -> list[Item]:
    """About `count` samples, spread evenly over the data set."""
    parts = parts_of(root, suffixes=suffixes, samples=max(1, count // 8))
    step = max(1.0, len(parts) * parts[0].count / count)
    chosen = sorted({int(number * step) for number in range(len(parts)) if int(number * step) < len(parts)})
    return [item for number in chosen for item in parts[number].items()][:count]


@torch.inference_mode()
def measure(autoencoder: Autoencoder, items: Sequence[Item], *, preparation: Preparation) -> Findings:
    """Through the mean of the latents as float16 keeps it, and back; what cannot be read is left out with a warning."""
    findings = Findings()
    for item in track(items, "accepting", console=Console(stderr=True), transient=True):
        try:
            if item.media is None:
                raise DataError("a sample must have a medium, got none; bring it")
            _, array = preparation.read(item.media.read(), suffix=item.suffix)
            media = as_media([array])
            mean = autoencoder.encode(media).mean.half().float()
            decoded = autoencoder.decode(mean)
        except DataError as error:
            log.warning("left out %s of %s: %s", item.key, item.shard, error)
            continue
        for name, value in _measures(decoded, media, preparation=preparation).items():
            findings.quality.setdefault(name, []).append(value)
        findings.latents.append(mean[0].flatten(1))
        if len(findings.originals) < SHOWN:
            findings.originals.append(media[0])
            findings.decoded.append(decoded[0])
    if not findings.latents:
        raise DataError("an acceptance needs at least one sound sample, got none; change --data")
    return findings


def judged(
    autoencoder: Autoencoder, findings: Findings, *, thresholds: dict[str, float], preparation: Preparation
) -> Acceptance:
    """The record: accepted where every threshold is met and every channel is finite and varies."""
    quality = findings.means()
    latents = torch.cat(findings.latents, 1)
    statistics = channel_statistics(latents)
    failed = []
    for name, bound in thresholds.items():
        side, _, measure = name.partition("_")
        if measure not in quality or np.isnan(quality[measure]):
            failed.append(f"{measure} is undefined")
        elif (quality[measure] < bound) if side == "min" else (quality[measure] > bound):
            failed.append(f"{measure} {quality[measure]:.3f} where {side}. {bound:g} was asked")
    if not latents.isfinite().all():
        failed.append("latents are not finite")
    elif flat := [channel for channel, std in enumerate(statistics["std"]) if not std > 0]:
        failed.append(f"channels {flat} never vary")
    return Acceptance(
        fingerprint=autoencoder.fingerprint,
        kind=autoencoder.kind,
        samples=len(findings.latents),
        quality=quality,
        thresholds=thresholds,
        failed=failed,
        latents=statistics,
        preparation=preparation.manifest(),
    )


def _measures(decoded: Tensor, media: Tensor, *, preparation: Preparation) -> dict[str, float]:
    if preparation.sample_rate is not None:
        distance = mel_distance(decoded, media, rate=preparation.sample_rate)
        return {"mel_db": float(distance), "snr_db": float(snr(decoded, media))}
    if preparation.modality == "tensor":  # of no known range
        return {"error": float((decoded - media).square().mean()), "variance": float(media.var(correction=0))}
    shown = decoded.clamp(-1, 1)
    found = {"psnr_db": float(psnr(shown, media))}
    frames = [one[0].movedim(1, 0) if one.ndim == 5 else one for one in (shown, media)]
    if min(media.shape[-2:]) >= SSIM_WINDOW:
        found["ssim"] = float(ssim(*frames).mean())
    return found


def _thresholds(asked: argparse.Namespace, *, modality: str) -> dict[str, float]:
    given = {
        "min_psnr_db": asked.min_psnr, "min_ssim": asked.min_ssim, "max_mel_db": asked.max_mel,
        "min_snr_db": asked.min_snr,
    }  # fmt: skip
    return {name: given[name] if given[name] is not None else bound for name, bound in DEFAULTS[modality].items()}


def _table(record: Acceptance) -> Table:
    verdict = "accepted" if record.accepted else "NOT accepted"
    table = Table("measure", "value", title=f"{record.kind}: {verdict}, {record.samples} samples")
    for name, value in record.quality.items():
        table.add_row(name, f"{value:.3f}")
    for name, values in record.latents.items():
        table.add_row(f"latents' {name}, by channel", f"{min(values):.3g} … {max(values):.3g}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", type=Path, required=True, help="folder that ours or diffusers wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder of media, or of WebDataset tars of them")
    parser.add_argument("--samples", type=positive, default=64)
    parser.add_argument("--out", type=Path, help="folder of the record; AUTOENCODER/acceptance by default")
    parser.add_argument("--min-psnr", type=float, help="dB, mean over pictures or videos")
    parser.add_argument("--min-ssim", type=float)
    parser.add_argument("--max-mel", type=float, help="dB, mean distance of log-mel spectra")
    parser.add_argument("--min-snr", type=float, help="dB, arrays: their variance over the squared error")
    add_preparation(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
