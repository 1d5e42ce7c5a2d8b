"""Text shards -> the same with next-symbol entropies and entropy patches; picks the threshold for a wanted mean patch.

    python -m data_prep.score_entropy --data data/demo/text --model data/demo/entropy --out data/demo/text-entropy \
        (--mean-patch 4.0 | --threshold 1.9) [--monotonic] [--max-patch-bytes 16] [--processes 2]

Blocks are scored by several processes and kept beside OUT, so that a killed command goes on where it stood. OUT appears
whole or not at all; the last lines say what to put into a config.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data_prep.write import npy
from matformer.data.entropy import entropies, load_entropy_model
from matformer.data.matching import pick_threshold
from matformer.data.patching import EntropyPatcher
from matformer.data.shards import ShardReader, ShardWriter
from matformer.data.texts import open_texts, texts_of
from matformer.door import door
from matformer.errors import DataError
from matformer.files import write_whole

log = logging.getLogger("data_prep.score_entropy")

SPLITS = ("train", "heldout")
SAMPLE_BLOCKS = 4
"""Blocks of train that a threshold is picked on: about 4 MB."""


@dataclass(frozen=True)
class Job:
    """One block of one split, to be scored into `file`."""

    folder: Path
    block: int
    file: Path
    model: Path
    num_bytes: int


@door
def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    asked = _parser().parse_args(arguments)
    try:
        if asked.out.exists():
            raise DataError(f"{asked.out} must not exist yet, got a folder or file; remove it or change --out")
        work = asked.out.with_name(f".{asked.out.name}.scoring")
        fingerprint = load_entropy_model(asked.model).fingerprint
        jobs = {split: _jobs(asked.data / split, work=work, model=asked.model, tag=fingerprint) for split in SPLITS}
        work.mkdir(parents=True, exist_ok=True)
        score([job for split in SPLITS for job in jobs[split]], processes=asked.processes)
        patcher = _patcher(asked, jobs["train"])
        for split in SPLITS:
            mean = write(asked.data / split, work / "whole" / split, jobs[split], patcher=patcher)
            log.info("%s: %.3f symbols a patch", asked.out / split, mean)
        os.replace(work / "whole", asked.out)
        shutil.rmtree(work)
    except OSError as error:
        sys.stderr.write(
            f"{asked.out} must be a folder that can be written, got: {error}; free space or change --out\n"
        )
        return 2
    kind = patcher.identity()["kind"]
    log.info(
        "data.patcher.kind=%s data.patcher.threshold=%r data.patcher.max_patch_bytes=%d data.patcher.entropy_model=%s",
        kind, patcher.threshold, patcher.max_patch_bytes, asked.model,
    )  # fmt: skip
    return 0


def score(jobs: Sequence[Job], *, processes: int) -> None:
    """Entropies of every block that has none yet, in its file."""
    missing = [job for job in jobs if not job.file.is_file()]
    columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("scoring", total=sum(job.num_bytes for job in missing))
        for job in _done(missing, processes=processes):
            progress.advance(task, job.num_bytes)


def _done(jobs: Sequence[Job], *, processes: int) -> Iterator[Job]:
    if processes <= 1 or len(jobs) <= 1:
        yield from map(score_block, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(score_block, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def score_block(job: Job) -> Job:
    """Write the block's entropies (float32, one a symbol), whole or not at all."""
    model = load_entropy_model(job.model)
    nats = np.concatenate(entropies(model, texts_of(ShardReader(job.folder), job.block)))
    write_whole(job.file, npy(nats))
    return job


def write(source: Path, folder: Path, jobs: Sequence[Job], *, patcher: EntropyPatcher) -> float:
    """The data set again, each block with its entropies and its patches; gives the mean patch in symbols."""
    reader = ShardReader(source)
    written = ("format", "form", "samples", "bytes", "shards")
    extra = {key: value for key, value in reader.manifest.items() if key not in written}
    symbols = patches = 0
    with ShardWriter(folder, form="text", extra=extra | {"patcher": patcher.identity()}) as writer:
        for job in jobs:
            nats = _scored(job)
            documents = _split(reader, job.block, nats=nats)
            lengths = np.concatenate([patcher.lengths_of(data, nats=own) for data, own in documents])
            members = reader.read(job.block) | {
                "entropies.npy": npy(nats.astype(np.float16)),
                "patches.npy": npy(lengths),
            }
            writer.add(reader.key(job.block), members)
            symbols, patches = symbols + len(nats), patches + len(lengths)
    return symbols / max(patches, 1)


def _split(
    reader: ShardReader, block: int, *, nats: Float[np.ndarray, " n1"]
) -> Iterator[tuple[bytes, Int[np.ndarray, " n1"]]]:
    first = 0
    for data in texts_of(reader, block):
        yield data, nats[first : first + len(data) + 1]
        first += len(data) + 1


def _jobs(folder: Path, *, work: Path, model: Path, tag: str) -> list[Job]:
    """The file's name says what was scored and by whom: work left by another model or text is not taken."""
    reader = open_texts(folder)
    jobs = []
    for block in range(len(reader)):
        data = reader.view(block, "bytes")
        name = hashlib.sha256(data).hexdigest()[:32]
        jobs.append(Job(folder, block, work / f"{name}-{tag[:16]}.npy", model, len(data)))
    return jobs


def _patcher(asked: argparse.Namespace, jobs: Sequence[Job]) -> EntropyPatcher:
    """With the threshold that was asked for, or that gives the mean patch that was asked for on the first blocks."""
    model, longest = load_entropy_model(asked.model), asked.max_patch_bytes
    patcher = EntropyPatcher(
        model, threshold=asked.threshold or 1.0, max_patch_bytes=longest, monotonic=asked.monotonic
    )
    sample = [
        one for job in jobs[:SAMPLE_BLOCKS] for one in _split(ShardReader(job.folder), job.block, nats=_scored(job))
    ]
    if asked.threshold is None:
        patcher.threshold = pick_threshold(sample, patcher=patcher, mean_patch=asked.mean_patch)
    elif (largest := max(patcher.largest_excess(nats) for _, nats in sample)) <= 0:
        raise DataError(
            f"a threshold must let patches begin, got {asked.threshold:g} where the largest value is "
            f"{asked.threshold + largest:.3f} nats; change --threshold"
        )
    return patcher


def _scored(job: Job) -> Float[np.ndarray, " symbols"]:
    return np.load(io.BytesIO(job.file.read_bytes()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="text data set, holding train/ and heldout/")
    parser.add_argument("--model", type=Path, required=True, help="folder of data_prep.train_entropy_model")
    parser.add_argument("--out", type=Path, required=True, help="data set to be written")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--mean-patch", type=float, help="symbols a patch in the mean: picks the threshold")
    how.add_argument("--threshold", type=float, help="nats")
    parser.add_argument("--monotonic", action="store_true", help="a rise of the entropy instead of its height")
    parser.add_argument("--max-patch-bytes", type=int, default=16)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    return parser


if __name__ == "__main__":
    sys.exit(main())
