"""Media -> shards of latents with their captions, by any autoencoder that was accepted.

    python -m data_prep.encode_latents --autoencoder FOLDER --data MEDIA --out data/mine/images --buckets 8x8 \
        [--processes 2] [--batch 16] [--device cpu] [--max-bad-samples 16] [--heldout-one-in 50]

MEDIA is a folder of pictures, sounds or videos, or of WebDataset tars of them; a sample's caption is the `.txt` beside
it (and `texts` in its `.json` captions in several languages). Folders train/ and heldout/ inside are the splits, else
one in so many keys is held out by its hash. `data_prep.accept_autoencoder` comes before. Parts are kept beside OUT, so
that a killed command goes on where it stood; OUT appears whole or not at all, with the autoencoder in it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.accept_autoencoder import add_preparation, preparation_from
from data_prep.encode_part import Coder, Job, PartEncoder
from data_prep.media_items import parts_of
from data_prep.records import is_held_out
from data_prep.working_folder import WHOLE, place, working_folder
from matformer.autoencoders import Autoencoder, load_autoencoder
from matformer.autoencoders.acceptance import RECORD_FOLDER, Acceptance, require_accepted
from matformer.autoencoders.preparation import SUFFIXES
from matformer.data.shards import ShardReader, ShardWriter
from matformer.door import door, natural, positive
from matformer.errors import DataError

log = logging.getLogger("data_prep.encode_latents")

SPLITS = ("train", "heldout")
AUTOENCODER = "autoencoder"
BAD_FILE = "bad_samples.json"


class DamagedPart(DataError):
    """A part that was whole once; it can be encoded again."""

    def __init__(self, folder: Path, error: DataError) -> None:
        super().__init__(str(error))
        self.folder = folder


@dataclass(slots=True)
class BadCount:
    """Samples that were left out: reported, counted, too many stop the command."""

    limit: int
    seen: list[dict[str, str]] = field(default_factory=list)

    def add(self, found: Iterable[dict[str, str]]) -> None:
        """Raises DataError beyond the limit."""
        for one in found:
            self.seen.append(one)
            log.warning("left out %s of %s (%d so far): %s", one["key"], one["shard"], len(self.seen), one["reason"])
        if len(self.seen) > self.limit:
            last = self.seen[-1]
            raise DataError(
                f"at most {self.limit} samples may be bad, got {len(self.seen)}, the last: {last['key']} of "
                f"{last['shard']}: {last['reason']}; repair them, or run the same command with a higher "
                "--max-bad-samples (it goes on where it stood; without their files, later parts are made anew)"
            )


class ChannelSums:
    """What the manifest says of latents, from running sums: memory does not grow with the data set."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.total, self.square = np.zeros(channels), np.zeros(channels)
        self.least, self.most = np.full(channels, np.inf), np.full(channels, -np.inf)
        self.noise: np.ndarray | None = None

    def add(self, moments: np.ndarray) -> None:
        """A latent as it is stored: its mean [C, *grid], or the log-variance behind it [2C, *grid]."""
        mean, logvar = moments[: len(self.total)], moments[len(self.total) :]
        cells = mean.reshape(len(mean), -1).astype(np.float64)
        self.count += cells.shape[1]
        self.total += cells.sum(1)
        self.square += np.einsum("cn,cn->c", cells, cells)
        self.least, self.most = np.minimum(self.least, cells.min(1)), np.maximum(self.most, cells.max(1))
        if len(logvar):
            drawn = np.exp(logvar.reshape(len(mean), -1).astype(np.float64)).sum(1)
            self.noise = drawn if self.noise is None else self.noise + drawn

    def manifest(self) -> dict[str, Any]:
        """A shift a channel, and one scale that makes the means' mean variance 1. Raises DataError if nothing varies.

        channel_noise: the mean of the variances stored beside the means, where there are any.
        """
        mean = self.total / max(self.count, 1)
        variance = np.maximum(self.square / max(self.count, 1) - mean**2, 0)
        if not variance.mean() > 0:
            raise DataError("latents must vary, got a variance of 0; check the media of this data set")
        return {
            "formula": "(mean - shift) * scale",
            "shift": mean.tolist(),
            "scale": float(1 / np.sqrt(variance.mean())),
            "channel_mean": mean.tolist(),
            "channel_variance": variance.tolist(),
            "channel_min": self.least.tolist(),
            "channel_max": self.most.tolist(),
            **({} if self.noise is None else {"channel_noise": (self.noise / self.count).tolist()}),
        }


@door
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    asked = _parser().parse_args(arguments)
    try:
        if asked.out.resolve().is_relative_to(asked.data.resolve()):
            raise DataError(
                f"--out must lie outside --data, whose tars are all taken for media, got {asked.out} in {asked.data}; "
                "change --out"
            )
        with working_folder(asked.out) as work:
            autoencoder = load_autoencoder(asked.autoencoder)
            record = require_accepted(autoencoder, folder=asked.autoencoder, record=asked.accepted)
            coder = Coder(asked.autoencoder, preparation_from(asked, autoencoder), asked.batch, asked.device)
            jobs = _jobs(asked, coder=coder, fingerprint=record.fingerprint, work=work)
            _encode_and_merge(asked, jobs, autoencoder=autoencoder, record=record, coder=coder, work=work)
    except OSError as error:
        sys.stderr.write(f"{asked.out} must be a folder that can be written, got: {error}; change --out\n")
        return 2
    log.info("data.root=%s data.sources.NAME.path=%s data.sources.NAME.form=pairs", asked.out.parent, asked.out.name)
    return 0


def _encode_and_merge(
    asked: argparse.Namespace,
    jobs: dict[str, list[Job]],
    *,
    autoencoder: Autoencoder,
    record: Acceptance,
    coder: Coder,
    work: Path,
) -> None:
    """Every part, then all as one; a part that turns out to be damaged is encoded again, once."""
    again: set[Path] = set()
    while True:
        bad = BadCount(asked.max_bad_samples)
        encode(
            list(itertools.chain(*jobs.values())), coder=coder, autoencoder=autoencoder, processes=asked.processes,
            bad=bad,
        )  # fmt: skip
        try:
            _finish(asked, jobs, autoencoder=autoencoder, record=record, coder=coder, bad=bad, work=work)
            return
        except DamagedPart as error:
            if error.folder in again:
                raise
            again.add(error.folder)
            _forget(error.folder, error)


def encode(
    jobs: Sequence[Job], *, coder: Coder, autoencoder: Autoencoder | None, processes: int, bad: BadCount
) -> None:
    """Every part that is not there yet. Raises DataError where too many samples are bad, or a process was killed."""
    missing = []
    for job in jobs:
        left_out = _left_out_before(job)
        if left_out is None:
            missing.append(job)
        else:
            bad.add(left_out)
    total, start = sum(job.part.count for job in missing), time.monotonic()
    rate, left_out = TextColumn("{task.fields[rate]:.1f} a second"), TextColumn("{task.fields[bad]} bad")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        rate,
        left_out,
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task, done = progress.add_task("encoding", total=total, rate=0.0, bad=len(bad.seen)), 0
        for job in _done(missing, coder=coder, autoencoder=autoencoder, processes=processes):
            done += job.part.count
            bad.add(_bad_of(job))
            rate = done / (time.monotonic() - start)
            progress.update(task, completed=done, rate=rate, bad=len(bad.seen))
    seconds = time.monotonic() - start
    log.info("encoded %d samples in %.1f s: %.1f a second", total, seconds, total / max(seconds, 1e-9))


def _done(jobs: Sequence[Job], *, coder: Coder, autoencoder: Autoencoder | None, processes: int) -> Iterator[Job]:
    if processes <= 1 or len(jobs) <= 1:
        yield from map(PartEncoder(coder, autoencoder=autoencoder).encode, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.encode_part"])  # torch is loaded once, and its memory shared
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(threads,)) as pool:
        waiting: deque[Future[Job]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(_encode_here, coder, job))
                if len(waiting) > 2 * processes:  # a window: a million parts are not a million futures
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "every process of the encoding must live to its end, got one that was killed (out of memory?); run the "
                "same command again, it goes on where it stood, with a smaller --batch or --processes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_command, daemon=True).start()


def _end_with_the_command() -> None:
    """A killed command's processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@functools.cache
def _encoder(coder: Coder) -> PartEncoder:
    """A process loads its autoencoder once."""
    return PartEncoder(coder)


def _encode_here(coder: Coder, job: Job) -> Job:
    return _encoder(coder).encode(job)


def _bad_of(job: Job) -> list[dict[str, str]]:
    return ShardReader(job.folder).manifest["bad"]


def _left_out_before(job: Job) -> list[dict[str, str]] | None:
    """Bad samples of a part that is there; None where it is to be encoded, because it is not, or damaged."""
    try:
        return _bad_of(job) if job.folder.is_dir() else None
    except DataError as error:
        _forget(job.folder, error)
        return None


def _forget(part: Path, error: DataError) -> None:
    log.warning("a part is damaged and encoded again: %s", error)
    shutil.rmtree(part)


def _jobs(asked: argparse.Namespace, *, coder: Coder, fingerprint: str, work: Path) -> dict[str, list[Job]]:
    """Parts by split; without folders of that name all are in `train`. A part's folder is named by all that made it."""
    splits = [split for split in SPLITS if (asked.data / split).is_dir()]
    roots = {split: asked.data / split for split in SPLITS} if len(splits) == 2 else {"train": asked.data}
    jobs: dict[str, list[Job]] = {}
    for split, root in roots.items():
        suffixes = SUFFIXES[coder.preparation.modality]
        parts = parts_of(root, suffixes=suffixes, samples=asked.part_samples, repeats=asked.max_bad_samples)
        by = (fingerprint, coder.preparation, coder.batch, split)
        names = [hashlib.sha256(repr((by, part.digest())).encode()).hexdigest()[:32] for part in parts]
        jobs[split] = [Job(part, work / f"part-{name}") for part, name in zip(parts, names, strict=True)]
    return jobs


def _finish(
    asked: argparse.Namespace,
    jobs: dict[str, list[Job]],
    *,
    autoencoder: Autoencoder,
    record: Acceptance,
    coder: Coder,
    bad: BadCount,
    work: Path,
) -> None:
    """All parts as one data set, renamed into place at the end."""
    whole = work / WHOLE
    shutil.rmtree(whole, ignore_errors=True)
    acceptance = {name: value for name, value in record.manifest().items() if name not in ("latents", "preparation")}
    modality = coder.preparation.modality
    identity = {"modality": modality, **autoencoder.identity(), "folder": f"{asked.out.name}/{AUTOENCODER}"}
    extra = {
        "kind": "moments" if autoencoder.stochastic else "mean",
        "modality": modality,
        "autoencoder": identity | {"acceptance": acceptance},
        "preparation": coder.preparation.manifest(),
        "origin": asked.data.name,
        "sources": [{"spec": asked.data.name, "licence": asked.licence, "attribution": asked.attribution}],
    }
    merge(jobs, out=whole, extra=extra, channels=autoencoder.channels, one_in=asked.heldout_one_in, bad=bad)
    autoencoder.save(whole / AUTOENCODER)
    record.save(whole / AUTOENCODER / RECORD_FOLDER)
    (whole / BAD_FILE).write_text(json.dumps(bad.seen, indent=1) + "\n")
    place(whole, asked.out, work=work)


def merge(
    jobs: dict[str, list[Job]], *, out: Path, extra: dict[str, Any], channels: int, one_in: int, bad: BadCount
) -> None:
    """Parts -> OUT/train and OUT/heldout, both with the statistics of train.

    Raises DamagedPart where one cannot be read, DataError if a split stays empty.
    """
    sums, counts = ChannelSums(channels), {split: Counter() for split in SPLITS}
    keys: dict[str, set[str]] = {split: set() for split in SPLITS}
    writers = {split: ShardWriter(out / split, form="pairs", extra=extra | {"split": split}) for split in SPLITS}
    with writers["train"], writers["heldout"]:
        for given, reader, i, members in _samples(jobs):
            key, facts = reader.key(i), json.loads(members["json"])
            split = given if len(jobs) > 1 else _split_of(facts["base"], one_in=one_in)
            if key in keys[split]:
                bad.add([{"shard": facts["source"], "key": key, "reason": "its key must be unique, got it twice"}])
                continue
            keys[split].add(key)
            writers[split].add(key, members)
            counts[split].update(cells=int(np.prod(facts["bucket"])), **{_language(text): 1 for text in facts["texts"]})
            if split == "train":
                sums.add(reader.array(i, "moments.npy"))
        for split in SPLITS:
            if not keys[split]:
                raise DataError(
                    f"split {split} must hold samples, got none of {sum(map(len, keys.values()))}; change "
                    "--heldout-one-in, or bring folders train and heldout"
                )
            cells = counts[split].pop("cells")
            languages = {name.removeprefix("lang:"): number for name, number in counts[split].most_common()}
            writers[split].extra |= {"latents": sums.manifest(), "cells": cells, "languages": languages}
            writers[split].extra |= {"bad_samples": len(bad.seen)}


def _samples(jobs: dict[str, list[Job]]) -> Iterator[tuple[str, ShardReader, int, dict[str, bytes]]]:
    """(given split, reader of the part, number in it, members) of every sample. Raises DamagedPart."""
    for given, job in ((given, job) for given, group in jobs.items() for job in group):
        try:
            reader = ShardReader(job.folder)
            for i in range(len(reader)):
                yield given, reader, i, reader.read(i)
        except DataError as error:
            raise DamagedPart(job.folder, error) from error


def _split_of(base: str, *, one_in: int) -> str:
    return "heldout" if is_held_out(base, one_in=one_in) else "train"


def _language(text: dict[str, str]) -> str:
    return f"lang:{text['lang']}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", type=Path, required=True, help="folder that ours or diffusers wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder of media, or of WebDataset tars of them")
    parser.add_argument("--out", type=Path, required=True, help="data set to be written; data.root is its parent")
    parser.add_argument("--accepted", type=Path, help="folder of the acceptance; AUTOENCODER/acceptance by default")
    add_preparation(parser)
    parser.add_argument("--batch", type=positive, default=16, help="samples that are encoded at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--part-samples", type=positive, default=256, help="what a kill can cost: samples of a part")
    parser.add_argument("--max-bad-samples", type=natural, default=16, help="left out before the command stops")
    parser.add_argument("--heldout-one-in", type=positive, default=50, help="where MEDIA has no train/ and heldout/")
    parser.add_argument("--licence", default="not stated", help="goes into the manifest")
    parser.add_argument("--attribution", default="not stated", help="goes into the manifest")
    return parser


if __name__ == "__main__":
    sys.exit(main())
