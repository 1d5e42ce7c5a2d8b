"""The demo's data set: `python -m data_prep.demo --out data/demo --cache cache`.

Raw material -> one folder of shards and autoencoders. The folder is built beside and appears by one rename, with
`demo.json` in it, so whatever is found there is whole.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_prep import minimal
from data_prep.albums import all_albums
from data_prep.clean import without_duplicates
from data_prep.demo_latents import (
    BUCKETS,
    Coded,
    encode_pictures,
    encode_sounds,
    fit_normalisation,
    fit_pictures,
    fit_sounds,
    picture_quality,
    sound_quality,
)
from data_prep.fetch import PACKAGES, fetch, sha256_of
from data_prep.pictures import all_pictures
from data_prep.records import Document, Picture, Sound, is_held_out, number_of
from data_prep.speech import SAMPLE_RATE, all_prompts, spoken_names
from data_prep.texts import all_texts
from data_prep.train_entropy_model import bits_per_byte, documents, train
from data_prep.write import write_albums, write_pairs, write_texts
from matformer.autoencoders import Autoencoder
from matformer.config.schema import PatcherConfig
from matformer.data.entropy import entropies
from matformer.data.matching import pick_threshold
from matformer.data.patching import EntropyPatcher
from matformer.data.texts import first_texts
from matformer.errors import DataError, MatformerError

log = logging.getLogger(__name__)

COMPLETE = "demo.json"
LAYOUT = 4
Kind = Literal["demo", "synthetic"]
TEXT_ONE_IN, CONCEPT_ONE_IN = 50, 10
REAL_STAGES = 6
ENTROPY_STEPS: dict[Kind, int] = {"demo": 400, "synthetic": 20}
ENTROPY_BATCH = 8192
ENTROPY_SAMPLE_BYTES = 200_000
MEAN_PATCH = 4.0
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Material:
    """All that goes into the shards, and where it came from."""

    kind: Kind
    documents: list[Document]
    pictures: list[Picture]
    sounds: list[Sound]
    sources: list[dict[str, Any]]
    missing: list[str]


@dataclass(frozen=True, slots=True)
class Latents:
    """A modality's latents by key, and what its manifests say about them."""

    modality: str
    coded: dict[str, Coded]
    manifest: dict[str, Any]


class Stages:
    """Progress of the preparation on stderr, a line a stage, and the seconds that each took."""

    def __init__(self, num_stages: int) -> None:
        self.seconds: dict[str, float] = {}
        columns = (SpinnerColumn(), TextColumn("{task.description:<40}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("preparing the demo", total=num_stages)

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one part of the preparation."""
        self._progress.update(self._task, description=f"preparing the demo: {name}")
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 2)
        log.info("%s: %.1f s", name, self.seconds[name])
        self._progress.advance(self._task)


def prepare_demo(out: Path, cache: Path) -> None:
    """Make the demo's data set in `out`, with downloads kept in `cache`; at once if `out` is complete.

    Waits for another preparation of the same folder. Raises DataError if `out` holds something else, or if the core
    packages cannot be downloaded; whatever else is missing is left out, and named in demo.json.
    """
    with _building(out, kind="demo") as folder:
        if folder is not None:
            with Stages(REAL_STAGES) as stages:
                _build(_real_material(cache, stages=stages), folder=folder, stages=stages)


def prepare_minimal(out: Path) -> None:
    """Make a tiny synthetic data set of the same layout in `out`, without network, in a few seconds.

    Raises DataError if `out` holds something else.
    """
    with _building(out, kind="synthetic") as folder:
        if folder is not None:
            material = Material(
                kind="synthetic",
                documents=list(without_duplicates(minimal.texts())),
                pictures=minimal.pictures(),
                sounds=minimal.sounds(),
                sources=[{"spec": "synthetic", "licence": "none needed", "attribution": "drawn and computed here"}],
                missing=[],
            )
            with Stages(2) as stages:
                _build(material, folder=folder, stages=stages)


def finished_kind(out: Path) -> Kind | None:
    """Which data set `out` holds, finished and of this layout; None if neither."""
    try:
        report = json.loads((out / COMPLETE).read_bytes())
    except (OSError, ValueError):
        return None
    return report.get("kind") if report.get("layout") == LAYOUT else None


@contextmanager
def _building(out: Path, *, kind: Kind) -> Iterator[Path | None]:
    """A fresh folder beside `out` that becomes `out` at a clean exit; None if there is nothing to do.

    The lock is the system's: it falls with the process that holds it.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = finished_kind(out)
        if found == kind:
            yield None
            return
        if found is not None:
            raise DataError(
                f"{out} must hold the {kind} data set, got the {found} one; delete it, choose another folder with "
                "--out and data.root, or train on it as it is with data.recipe=null"
            )
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(
                f"{out} must be empty, missing or a complete demo, got something else or an older layout; delete it or "
                "choose another folder with --out and data.root"
            )
        partial = out.parent / f".{out.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        if out.exists():
            out.rmdir()
        os.replace(partial, out)


def _real_material(cache: Path, *, stages: Stages) -> Material:
    with stages.stage("download"):
        files = fetch(cache)
    with stages.stage("text"):
        documents = list(without_duplicates(all_texts(files)))
    with stages.stage("pictures"):
        pictures = all_pictures(files)
    with stages.stage("speech"):
        with ThreadPoolExecutor(2) as pool:  # decoder and synthesiser work outside the interpreter's lock
            parts = [pool.submit(lambda: list(all_prompts(files))), pool.submit(lambda: list(spoken_names(pictures)))]
        sounds = [sound for part in parts for sound in part.result()]
    return Material(
        kind="demo",
        documents=documents,
        pictures=pictures,
        sounds=sounds,
        sources=_provenance(files, sounds=sounds),
        missing=[package.spec for package in PACKAGES if package.spec not in files],
    )


def _provenance(files: dict[str, Path], *, sounds: list[Sound]) -> list[dict[str, Any]]:
    downloaded = [
        {
            "spec": package.spec,
            "client": package.client,
            "file": files[package.spec].name,
            "bytes": files[package.spec].stat().st_size,
            "sha256": sha256_of(files[package.spec]),
            "licence": package.licence,
            "attribution": package.attribution,
        }
        for package in PACKAGES
        if package.spec in files
    ]
    python = {
        "spec": f"python {sys.version.split()[0]} standard library",
        "licence": "PSF-2.0",
        "attribution": "Copyright Python Software Foundation",
    }
    espeak = {
        "spec": "espeakng-loader",
        "licence": "GPL-3.0 (the synthesiser; the sound it makes is free of it)",
        "attribution": "eSpeak NG",
    }
    spoken = any(sound.source == espeak["spec"] for sound in sounds)
    return [*downloaded, python, *([espeak] if spoken else [])]


def _build(material: Material, *, folder: Path, stages: Stages) -> None:
    with stages.stage("write"), torch.inference_mode():
        pictures, picture_latents = _code_pictures(material, root=folder)
        sounds, sound_latents = _code_sounds(material, root=folder)
        report: dict[str, Any] = {
            "layout": LAYOUT,
            "recipe": "demo",
            "kind": material.kind,
            "text": _write_text(material, folder=folder / "text"),
            "images": _write_pairs(pictures, material=material, latents=picture_latents, folder=folder / "images"),
            "speech": _write_pairs(sounds, material=material, latents=sound_latents, folder=folder / "speech"),
            "albums": _write_albums(pictures, material=material, latents=picture_latents, folder=folder / "albums"),
        }
    with stages.stage("entropy model"):
        report["entropy"] = _entropy_model(folder, steps=ENTROPY_STEPS[material.kind])
    report |= {"sources": material.sources, "missing": material.missing, "seconds": stages.seconds}
    report["prepared_bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    (folder / COMPLETE).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _code_pictures(material: Material, *, root: Path) -> tuple[dict[str, list[Picture]], Latents]:
    pictures = split(material.pictures, name=lambda picture: picture.base, one_in=CONCEPT_ONE_IN)
    autoencoder = fit_pictures(pictures["train"])
    coded = encode_pictures(material.pictures, autoencoder=autoencoder)
    quality = picture_quality(pictures["heldout"], coded=coded, autoencoder=autoencoder)
    train = [coded[picture.key] for picture in pictures["train"]]
    return pictures, _latents("image", autoencoder, train=train, coded=coded, quality=quality, root=root)


def _code_sounds(material: Material, *, root: Path) -> tuple[dict[str, list[Sound]], Latents]:
    sounds = split(material.sounds, name=lambda sound: sound.base, one_in=CONCEPT_ONE_IN)
    autoencoder = fit_sounds(sounds["train"], sample_rate=SAMPLE_RATE)
    coded = encode_sounds(material.sounds, autoencoder=autoencoder)
    quality = sound_quality(sounds["heldout"], coded=coded, autoencoder=autoencoder)
    train = [coded[sound.key] for sound in sounds["train"] if sound.key in coded]
    return sounds, _latents("audio", autoencoder, train=train, coded=coded, quality=quality, root=root)


def _latents(
    modality: str,
    autoencoder: Autoencoder,
    *,
    train: list[Coded],
    coded: dict[str, Coded],
    quality: dict[str, float],
    root: Path,
) -> Latents:
    autoencoder.save(root / "autoencoders" / modality)
    identity = {
        "modality": modality,
        "kind": autoencoder.kind,
        "fingerprint": autoencoder.fingerprint,
        "folder": f"autoencoders/{modality}",
        "channels": autoencoder.channels,
        "downsampling": list(autoencoder.downsampling),
        "sample_rate": autoencoder.sample_rate,
        "heldout_quality": quality,
    }
    manifest = {"latents": fit_normalisation(train).manifest(), "autoencoder": identity}
    return Latents(modality, coded=coded, manifest=manifest)


def _write_text(material: Material, *, folder: Path) -> dict[str, Any]:
    parts = split(material.documents, name=lambda document: document.family, one_in=TEXT_ONE_IN)
    extra = _terms(material)
    return {
        side: write_texts(part, folder=folder / side, extra=extra | {"split": side}) for side, part in parts.items()
    }


def _entropy_model(folder: Path, *, steps: int) -> dict[str, Any]:
    """A byte model for the entropy patchers beside the text, and the threshold that gives patches of MEAN_PATCH."""
    text = folder / "text"
    model = train(documents(text / "train", seed=0), steps=steps, seed=0, batch_symbols=ENTROPY_BATCH)
    model.save(folder / "entropy")
    sample = list(first_texts(text / "train", num_bytes=ENTROPY_SAMPLE_BYTES))
    scored = list(zip(sample, entropies(model, sample), strict=True))
    patcher = EntropyPatcher(model, threshold=1.0, max_patch_bytes=PatcherConfig().max_patch_bytes)
    return {
        "threshold": pick_threshold(scored, patcher=patcher, mean_patch=MEAN_PATCH),
        "mean_patch": MEAN_PATCH,
        "heldout_bits_per_byte": bits_per_byte(model, documents(text / "heldout", seed=0), num_bytes=50_000),
    }


def _write_pairs(
    parts: dict[str, list[Picture]] | dict[str, list[Sound]], *, material: Material, latents: Latents, folder: Path
) -> dict[str, Any]:
    report: dict[str, Any] = {"autoencoder": latents.manifest["autoencoder"]}
    for side, part in parts.items():
        extra = _terms(material) | latents.manifest | {"split": side}
        counts = write_pairs(
            part,
            coded=latents.coded,
            modality=latents.modality,
            folder=folder / side,
            extra=extra,
            originals=side == "heldout",
        )
        del counts["groups"]
        kept = [sample for sample in part if isinstance(sample, Sound) and sample.key in latents.coded]
        if kept:
            counts["hours"] = round(sum(len(sound.wave) for sound in kept) / SAMPLE_RATE / 3600, 3)
            counts["buckets"] = {str(cells): _in_bucket(kept, cells=cells, latents=latents) for cells in BUCKETS}
        report[side] = counts
    return report


def _in_bucket(sounds: list[Sound], *, cells: int, latents: Latents) -> int:
    return sum(latents.coded[sound.key].bucket == [cells] for sound in sounds)


def _write_albums(
    parts: dict[str, list[Picture]], *, material: Material, latents: Latents, folder: Path
) -> dict[str, Any]:
    report = {}
    for side, part in parts.items():
        extra = _terms(material) | latents.manifest | {"split": side}
        report[side] = write_albums(all_albums(part), coded=latents.coded, folder=folder / side, extra=extra)
    return report


def _terms(material: Material) -> dict[str, Any]:
    """Licences and attributions, as every manifest carries them."""
    wanted = ("spec", "licence", "attribution")
    return {
        "origin": material.kind,
        "sources": [{name: source[name] for name in wanted} for source in material.sources],
    }


def split(items: Sequence[Item], *, name: Callable[[Item], str], one_in: int) -> dict[str, list[Item]]:
    """Train and heldout by the hash of what an item's name is; where that holds out none, the smallest hash is it."""
    held = {name(item) for item in items if is_held_out(name(item), one_in=one_in)}
    held = held or {min((name(item) for item in items), key=number_of)}
    parts: dict[str, list[Item]] = {"train": [], "heldout": []}
    for item in items:
        parts["heldout" if name(item) in held else "train"].append(item)
    return parts


def summary(out: Path) -> Table:
    """What a finished data set holds, as a table."""
    report = json.loads((out / COMPLETE).read_bytes())
    table = Table("data set", "train", "heldout", "quality", title=f"{out} ({report['kind']})", title_justify="left")
    sides = ("train", "heldout")
    text = [report["text"][side] for side in sides]
    cells = [f"{part['text_bytes'] / 1e6:.2f} MB, {part['documents']} documents" for part in text]
    table.add_row("text", *cells, f"{len(text[0]['text_bytes_by_language'])} languages")
    for name in ("images", "speech"):
        parts = report[name]
        cells = [f"{parts[side]['samples']} samples" + _hours(parts[side]) for side in sides]
        quality = ", ".join(f"{key} {value:.2f}" for key, value in parts["autoencoder"]["heldout_quality"].items())
        table.add_row(name, *cells, quality)
    entropy = report["entropy"]
    said = f"threshold {entropy['threshold']} for patches of {entropy['mean_patch']:g}"
    table.add_row("entropy model", "", f"{entropy['heldout_bits_per_byte']:.2f} bits a byte", said)
    albums = [report["albums"][side] for side in sides]
    table.add_row("albums", *(f"{part['samples']} albums, {part['pictures']} pictures" for part in albums), "")
    seconds = sum(report["seconds"].values())
    table.add_row("on disk", f"{report['prepared_bytes'] / 1e6:.0f} MB", "", f"{seconds:.0f} s to prepare")
    table.add_row("missing", ", ".join(report["missing"]) or "nothing", "", "")
    return table


def _hours(part: dict[str, Any]) -> str:
    return f", {part['hours']:.2f} h" if "hours" in part else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The door: 0, or the exit code of the error that it names."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.demo", description="Prepare the demo's data set.")
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder of the data set")
    default = Path(os.environ.get("MATFORMER_CACHE", "cache"))
    parser.add_argument("--cache", type=Path, default=default, help="downloads; MATFORMER_CACHE is its default")
    parser.add_argument("--minimal", action="store_true", help="a tiny synthetic set instead, without network")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    try:
        if options.minimal:
            prepare_minimal(options.out)
        else:
            prepare_demo(options.out, options.cache)
    except MatformerError as error:
        log.error("%s", error)
        return error.exit_code
    console.print(summary(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
