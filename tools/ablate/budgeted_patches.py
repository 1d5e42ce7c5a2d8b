"""What a budget of latents costs: `.venv/bin/python tools/ablate/budgeted_patches.py --seeds 0,1,2`.

Small models on the demo's pictures, one process, one thread. Every arm sees the same documents in the same order, so
many a step, whatever they take in latents. A run that stands in --out is not trained again; the tables come at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from matformer.config.check import check
from matformer.config.load import load_run
from matformer.config.schema import RunConfig
from matformer.data.loader import heldout_documents
from matformer.data.packing import Piece, Place, document_positions, draw_training_noise, draw_zeros, pack_batch
from matformer.data.packing import with_noise as noised
from matformer.data.sources import Document, MediaSpan, Role, open_source, tree_of
from matformer.data.statistics import with_statistics
from matformer.engine.baselines import TIMES
from matformer.engine.document_sums import document_sums, gather_documents, velocity_scalars
from matformer.engine.loop import build_host, build_model
from matformer.engine.step import optimizer_step
from matformer.engine.tree_arms import tree_arms
from matformer.hosts.base import Host
from matformer.parallel.process import settle
from matformer.parallel.seeds import Permutation
from matformer.parcels import Batch

log = logging.getLogger("ablate.budgets")

SOURCE, MEDIUM = "images", "image"
ROWS = 16  # documents of a held-out batch

COMMON = (
    "parallel.host=plain",
    "model.atto={width: 128, layers: 3, heads: 2, kv_heads: 2, ffn_width: 352}",
    "model.text={width: 64, ffn_width: 128, coda_layers: 1, preludio_ngrams: [3, 4], coda_ngrams: [2, 3]}",
    "model.text.ngram_rows=2048",
    "model.media.audio=null",
    "model.media.image={patch: 1, coda_width: 128}",
    "data.sources={text: null, speech: null, albums: null}",
    "data.sources.images.main_language_probability=1.0",
    "train={global_batch: 1, micro_batch: 1, warmup_steps: 20, lr: 2.0e-3}",
)


@dataclass(frozen=True)
class Arm:
    """Overrides of a run, and the documents of a step. blank: pictures are zeros, so that text has nothing of them."""

    overrides: tuple[str, ...] = ()
    given: int = 8
    generated: int = 4
    blank: bool = False


def _budget(share: float, *, levels: int = 2, noised_tree: str = "none") -> tuple[str, ...]:
    return (f"model.media.image.budget={{share: {share}, levels: {levels}, noised_tree: {noised_tree}}}",)


CLEAN = {
    "full": Arm(),
    "half": Arm(_budget(0.5)),
    "quarter": Arm(_budget(0.25)),
    "ninth": Arm(_budget(0.12, levels=3)),
    "coarse": Arm(("model.media.image.patch=2",)),
    "blank": Arm(_budget(0.25), blank=True),
}
"""Clean spans: 64 patches; 31, 16 and 7 leaves; 16 patches of four cells each; no picture at all."""

NOISED = {
    "grid": Arm(given=0, generated=8),
    "tree_half": Arm(_budget(0.5, noised_tree="own"), given=0, generated=8),
    "tree_quarter": Arm(_budget(0.25, noised_tree="own"), given=0, generated=8),
    "shuffled_quarter": Arm(_budget(0.25, noised_tree="shuffled"), given=0, generated=8),
    "coarse_grid": Arm(("model.media.image.patch=2",), given=0, generated=8),
}
"""Noised spans: 64 patches; 31 and 16 leaves; 16 leaves of another picture; 16 patches of four cells each."""
ARMS = CLEAN | NOISED


def main() -> int:
    """Train what is missing, then print the table."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--spans", type=int, default=256, help="held-out pictures")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation/budget"))
    asked = parser.parse_args()
    settle(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    for seed in asked.seeds.split(","):
        for arm in asked.arms.split(","):
            path = asked.out / f"{arm}-seed{seed}-steps{asked.steps}.json"
            if not path.is_file():
                found = run(ARMS[arm], seed=int(seed), steps=asked.steps, spans=asked.spans)
                path.write_text(json.dumps(found), encoding="utf-8")
                log.info("%s, seed %s: %s", arm, seed, {k: v for k, v in found.items() if not isinstance(v, list)})
    return 0


def run(arm: Arm, *, seed: int, steps: int, spans: int) -> dict[str, object]:
    """Train an arm and score it: numbers, and sums by held-out document for differences between arms."""
    config = with_statistics(
        load_run("configs/run/demo.yaml", [*COMMON, *arm.overrides, f"seed={seed}", f"train.steps={steps}"])
    )
    check(config)
    host = build_host(config)
    model = build_model(host, config)
    latents, seconds = 0, 0.0
    for step, documents in enumerate(_training(config, arm)):
        batch = _batch(documents, config=config, step=step)
        latents += int((batch.grid.document_BS >= 0).sum())
        began = time.process_time()
        optimizer_step(host, [batch], config=config, step=step)
        seconds += time.process_time() - began
        if step + 1 == steps:
            break
    found: dict[str, object] = {
        "latents_a_document": latents / steps / (arm.given + arm.generated),
        "seconds_a_step": seconds / steps,
        **flow(host, config, spans=spans // 2),
    }
    if arm.given:
        found |= captions(host, config, arm=arm, spans=spans)
    if config.model.media[MEDIUM].noises_trees:
        asked = config.model_copy(update={"eval": config.eval.model_copy(update={"media_spans": spans // 2})})
        found |= tree_arms(host, model, asked, modality=MEDIUM)
    return found


def _training(config: RunConfig, arm: Arm) -> Iterator[list[Document]]:
    """The documents of each step: captions of given pictures, pictures of captions."""
    source = open_source(SOURCE, data=config.data, model=config.model, split="train")
    order, place = Permutation(len(source), config.seed, "budget"), 0
    given: Role = "given"
    generated: Role = "generate"
    roles = [given] * arm.given + [generated] * arm.generated
    while True:
        picked = [source.pick(order[(place + at) % len(source)], direction=role) for at, role in enumerate(roles)]
        place += len(roles)
        yield [_blank(one, config=config) if arm.blank else one for one in picked]


def _blank(document: Document, *, config: RunConfig) -> Document:
    """The same document without what its pictures show."""
    media = config.model.media[MEDIUM]
    return replace(
        document,
        spans=tuple(
            replace(one, latent=one.latent * 0, tree=tree_of(one.latent * 0, media=media))
            if isinstance(one, MediaSpan)
            else one
            for one in document.spans
        ),
    )


def _batch(documents: Sequence[Document], *, config: RunConfig, step: int | None = None) -> Batch:
    """Each document a row, as long as the longest; noise is drawn where there is a step."""
    pieces = [[Piece(one, Place(), Place(len(one.spans)))] for one in documents]
    data = config.data
    draws = [
        draw_zeros
        if step is None
        else draw_training_noise(
            seed=config.seed,
            step=step,
            lane=lane,
            blind_probability=data.blind_probability,
            time_shift=data.time_shift,
        )
        for lane in range(len(documents))
    ]
    length = max(document_positions(one, model=config.model) for one in documents)
    return pack_batch(pieces, draws, model=config.model, sequence_latents=length)


def _heldout(config: RunConfig, *, spans: int, direction: Role) -> list[Document]:
    return list(heldout_documents(config, SOURCE, max_spans=spans, direction=direction))


@torch.no_grad()
def captions(host: Host, config: RunConfig, *, arm: Arm, spans: int) -> dict[str, object]:
    """Bits a byte of captions of held-out pictures, and bits and bytes of each."""
    documents = _heldout(config, spans=spans, direction="given")
    documents = [_blank(one, config=config) for one in documents] if arm.blank else documents
    batches = [_batch(documents[at : at + ROWS], config=config) for at in range(0, len(documents), ROWS)]
    table = gather_documents(batches, num_rows=ROWS)
    bits = document_sums(host, [table])[0]["text"] / math.log(2)
    sizes = table.count(lambda b: (b.text.document_U, b.text.symbol_U < 256))
    return {"caption_bits_per_byte": bits.sum() / sizes.sum(), "bits": bits.tolist(), "bytes": sizes.tolist()}


@torch.no_grad()
def flow(host: Host, config: RunConfig, *, spans: int) -> dict[str, object]:
    """The flow loss of held-out pictures, and squared errors of each; every arm has the same number of scalars."""
    documents = _heldout(config, spans=spans, direction="generate")
    plain = [_batch(documents[at : at + ROWS], config=config) for at in range(0, len(documents), ROWS)]
    batches = [noised(one, time=time, seed=0, index=k) for one in plain for k, time in enumerate(TIMES, start=1)]
    table = gather_documents(batches, num_rows=ROWS)
    errors = document_sums(host, [table])[0][MEDIUM]
    sizes = table.count(lambda b: velocity_scalars(b, MEDIUM))
    return {"flow_loss": errors.sum() / sizes.sum(), "errors": errors.tolist(), "scalars": sizes.tolist()}


if __name__ == "__main__":
    sys.exit(main())
