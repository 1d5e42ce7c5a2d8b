"""What a budget of latents costs: the loss where pictures take fewer latents, against as many as they have patches.

    python tools/ablate/budgeted_patches.py [--arms full,half,...] [--seeds 0,1,2] [--steps 250] [--spans 256]
        [--jobs 2] [--out runs/ablation/budget] [--document docs/results/budgeted_patches.md] [--json] [key=value ...]

Arms are the files of configs/ablation/budget. The ordinary loader fills sequences, so that an arm with fewer latents
would see more documents a step; here every arm of a kind has the same documents in each step, each a row of its own.
A killed command goes on where it stood, a run at a time; to begin anew remove --out.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from budgeted_patches_document import CLEAN, NOISED, write
from doors import add_arguments, made, run_door
from jobs import Job, arm_file, finished, load_checked
from scores import Asked, columns, score_all
from tables import difference_by_document, loss_a_unit

from matformer.config.load import load_run, save_resolved
from matformer.config.schema import RunConfig
from matformer.data.copies import num_latents
from matformer.data.loader import heldout_documents, pack_documents, training_noise
from matformer.data.packing import Piece, Place, document_positions, pack_batch
from matformer.data.sources import Document, MediaSpan, open_source
from matformer.data.statistics import with_statistics
from matformer.engine.document_sums import document_sums, gather_documents
from matformer.engine.evaluate import media_by_document
from matformer.engine.loop import build_host, build_model, num_parameters
from matformer.engine.step import optimizer_step
from matformer.engine.tree_arms import trees_by_document
from matformer.errors import ConfigError
from matformer.hosts.base import Host
from matformer.model import Matformer
from matformer.parallel.seeds import Permutation
from matformer.parcels import Batch
from matformer.shapes import END

log = logging.getLogger("ablate")

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ablation" / "budget"
ARMS = (*CLEAN, *NOISED)
GIVEN, DRAWN, MEDIUM = "given", "drawn", "image"
"""Sources: pictures before their captions, and behind them."""
FILE = "by_document.json"

Run = Mapping[str, Any]  # what `learn_and_score` says


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or the error's with one sentence on stderr."""
    return run_door(_parser().parse_args(arguments), ablate=ablate, write=write)


def ablate(asked: argparse.Namespace) -> dict[str, Any]:
    """Train and score what is missing; the results. Raises any of our errors."""
    for kind in (CLEAN, NOISED):
        reference, *others = kind
        alone = [arm for arm in asked.arms if arm in others and reference not in asked.arms]
        if alone:
            raise ConfigError(
                f"--arms must hold {reference}, which {alone[0]} is held against, got {','.join(asked.arms)}"
            )
    configs = {arm: load_arm(arm, asked.overrides) for arm in asked.arms}
    jobs = {arm: [_job(arm, seed, asked) for seed in asked.seeds] for arm in asked.arms}
    every = [jobs[arm][place] for place in range(len(asked.seeds)) for arm in asked.arms]  # whole seeds come first
    for job in every:
        lay_out(job)
    found = score_all(every, learn_and_score, asked={"spans": asked.spans}, file=FILE, at_once=asked.jobs)
    runs = {arm: [found[job] for job in own] for arm, own in jobs.items()}
    return {
        "made": made("budgeted_patches.py", asked) | {"steps": asked.steps, **_heldout(runs)},
        "arms": {arm: _facts(configs[arm], own) for arm, own in runs.items()},
        "losses": {arm: _losses(own) for arm, own in runs.items()},
        "differences": _differences(runs),
    }


def load_arm(arm: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked config of an arm. Raises ConfigError."""
    return load_checked(arm_file(arm, arms=ARMS, folder=FOLDER), overrides)


def lay_out(job: Job) -> None:
    """A folder with the run's config; the numbers of a run under another config are forgotten."""
    if finished(job):
        return
    for name in ("finished", FILE):
        (job.folder / name).unlink(missing_ok=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    save_resolved(with_statistics(load_run(job.config, job.keys)), job.folder / "config.yaml")


def learn_and_score(folder: Path, asked: Asked) -> dict[str, Any]:
    """Train the run of a folder; `parts` of its last weights, columns of held-out documents, and what it took.

    Weights are not kept: a run takes a minute, and what is asked of it is asked at once.
    """
    config = load_run(folder / "config.yaml")
    host, began = build_host(config), time.process_time()
    model = build_model(host, config)
    assert isinstance(model, Matformer), "one stage"
    latents = documents = 0
    for step, batch in enumerate(islice(training_batches(config), config.train.steps)):
        optimizer_step(host, [batch], config=config, step=step)
        latents += int((batch.grid.document_BS >= 0).sum())
        documents += batch.num_documents
    seconds = (time.process_time() - began) / config.train.steps
    found = {"parts": {part: columns(one) for part, one in scored(host, model, config, spans=asked["spans"]).items()}}
    found |= {"latents": latents_of_a_picture(config, spans=asked["spans"]), "latents_a_document": latents / documents}
    found |= {"seconds_a_step": seconds, "seconds": time.process_time() - began}
    (folder / "finished").touch()
    return found


def training_batches(config: RunConfig) -> Iterator[Batch]:
    """Of each step, `weight` documents of each source in its shuffled order, a row each; drawn by the run's seed."""
    data, walks = config.data, []
    for name, source in data.sources.items():
        opened = open_source(name, data=data, model=config.model, split="train")
        order = Permutation(len(opened), config.seed, "budget", name)
        walks.append((opened, order, int(source.weight)))
    step = 0
    while True:
        picked = [
            opened.pick(order[(step * many + at) % len(opened)]) for opened, order, many in walks for at in range(many)
        ]
        yield _in_rows(picked, config=config, step=step)
        step += 1


def _in_rows(documents: Sequence[Document], *, config: RunConfig, step: int) -> Batch:
    """Each document a row, as long as the longest."""
    draws = [training_noise(config, step=step, lane=lane) for lane in range(len(documents))]
    rows = [[Piece(one, Place(), Place(len(one.spans)))] for one in documents]
    length = max(document_positions(one, model=config.model) for one in documents)
    return pack_batch(rows, draws, model=config.model, sequence_latents=length)


def scored(host: Host, model: Matformer, config: RunConfig, *, spans: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Part -> held-out document -> its loss and its size.

    captions: bits and bytes of given pictures' captions. flow: errors and scalars of pictures behind their captions;
    where noised copies stand in trees, one part for each tree that they can stand in.
    """
    amount = config.eval.model_copy(update={"media_spans": spans // 2})
    drawn = config.data.model_copy(update={"sources": {DRAWN: config.data.sources[DRAWN]}})
    alone = config.model_copy(update={"eval": amount, "data": drawn})
    found = {}
    if GIVEN in config.data.sources:
        found["captions"] = captions_by_document(host, config, spans=spans)
    if config.model.media[MEDIUM].noises_trees:
        return found | trees_by_document(host, model, alone, modality=MEDIUM)
    return found | {"flow": media_by_document(host, alone, modality=MEDIUM)}


def captions_by_document(host: Host, config: RunConfig, *, spans: int) -> dict[str, tuple[float, float]]:
    """Key of each of the first held-out documents of given pictures -> its caption's bits and bytes."""
    documents = list(islice(heldout_documents(config, GIVEN, direction="given"), spans))
    table = gather_documents(pack_documents(documents, config=config), num_rows=config.train.micro_batch)
    bits = document_sums(host, [table])[0]["text"] / math.log(2)
    sizes = table.count(lambda batch: (batch.text.document_U, batch.text.symbol_U != END))
    return dict(zip(table.keys, zip(bits.tolist(), sizes.tolist(), strict=True), strict=True))


def latents_of_a_picture(config: RunConfig, *, spans: int) -> float:
    """Latents of the copy that the arm is about, mean over held-out pictures: of the clean one if any are given."""
    media, found = config.model.media[MEDIUM], []
    clean = GIVEN in config.data.sources
    for document in islice(heldout_documents(config, GIVEN if clean else DRAWN, direction=None), spans):
        pictures = [span for span in document.spans if isinstance(span, MediaSpan)]
        trees = [span.tree if clean else span.noised_tree for span in pictures]
        found.append(sum(num_latents(span, tree, media=media) for span, tree in zip(pictures, trees, strict=True)))
    return statistics.fmean(found)


def _losses(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Part -> bits a byte, or squared error a scalar, a number a seed."""
    return {part: [loss_a_unit(run["parts"][part]) for run in runs] for part in runs[0]["parts"]}


def _differences(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """Arm -> part -> its loss less the reference's; what is predicted in a tree, less what is without one."""
    found: dict[str, dict[str, Any]] = {}
    for reference, *others in (CLEAN, NOISED):
        for arm in (arm for arm in others if arm in runs):
            found[arm] = {
                part: difference(
                    [run["parts"][part] for run in runs[arm]],
                    [run["parts"]["captions" if part == "captions" else "flow"] for run in runs[reference]],
                )
                for part in runs[arm][0]["parts"]
            }
    return found


def difference(runs: Sequence[Run], reference: Sequence[Run]) -> dict[str, Any]:
    """Loss above the reference's on the same documents, seed against seed, with the error over documents of each."""
    by_seed = [
        difference_by_document([one], [other], loss="losses", size="sizes")["stderr"]
        for one, other in zip(runs, reference, strict=True)
    ]
    return difference_by_document(runs, reference, loss="losses", size="sizes") | {"stderr_by_seed": by_seed}


def _facts(config: RunConfig, runs: Sequence[Run]) -> dict[str, Any]:
    mean = {name: statistics.fmean(run[name] for run in runs) for name in ("latents", "latents_a_document")}
    seconds = {name: [run[name] for run in runs] for name in ("seconds_a_step", "seconds")}
    patches = math.prod(config.model.media[MEDIUM].grid(0))
    return {"parameters": num_parameters(config), "patches": patches, **mean, **seconds}


def _heldout(runs: Mapping[str, Sequence[Run]]) -> dict[str, float]:
    """What everything is scored on."""
    parts = {part: one for own in runs.values() for part, one in own[0]["parts"].items()}
    found: dict[str, float] = {}
    if "captions" in parts:
        found = {"captions": len(parts["captions"]["keys"]), "bytes": sum(parts["captions"]["sizes"])}
    return found | {"pictures": len(parts["flow"]["keys"])}


def _job(arm: str, seed: int, asked: argparse.Namespace) -> Job:
    return Job(arm, seed, asked.steps, FOLDER / f"{arm}.yaml", asked.out / "runs", tuple(asked.overrides))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out, document = Path("runs/ablation/budget"), Path("docs/results/budgeted_patches.md")
    add_arguments(parser, arms=ARMS, out=out, document=document)
    parser.add_argument("--steps", type=int, default=250, help="of every arm")
    parser.add_argument("--spans", type=int, default=256, help="held-out captions, and half as many pictures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
