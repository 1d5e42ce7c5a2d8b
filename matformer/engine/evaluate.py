"""Held-out numbers: bits per byte, losses of media, the router's choices; captions and baselines when a run is done."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from matformer.config.schema import EvalConfig, RunConfig, SourceConfig
from matformer.data.continued import with_before
from matformer.data.loader import heldout_batches, pack_documents
from matformer.data.mixture import BadSamples, Mixture
from matformer.data.packing import document_positions, with_noise
from matformer.data.sources import Document, Stream, open_source
from matformer.data.text_layout import patches_that_fit
from matformer.data.text_rows import with_masks
from matformer.engine.baselines import TIMES, Baselines, compute_baselines, ratio
from matformer.engine.clean_errors import clean_errors, media_batches
from matformer.engine.document_sums import Documents, document_sums, gather_documents, velocity_scalars
from matformer.engine.draws import Draws, Watch, unwatched
from matformer.engine.paired import caption_gain
from matformer.engine.restore import load_for_inference
from matformer.engine.sample_quality import judged_samples
from matformer.engine.tree_arms import tree_arms
from matformer.files import write_whole
from matformer.hosts.base import Host
from matformer.parcels import Batch
from matformer.shapes import END

log = logging.getLogger(__name__)

ROUTER_DOCUMENTS_A_SPAN = 2
"""Documents of the router's mixture for each of eval.media_spans; a text document has one question that counts."""
NOISE_SEED = 0
MASK_DRAWS = 16
"""Strata of t over which the bound of a text under a diffusion objective is averaged."""
EVERY_BYTE = 2**62


class HeldOut:
    """The held-out batches of a run, built at the first call, and their numbers under a host's present weights."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._tables: dict[str, Documents] | None = None

    def __call__(self, host: Host, *, full: bool = False, rivals: Baselines | None = None) -> dict[str, float]:
        """Keys `heldout/...`; `full` adds errors of clean x at five levels of noise, and whether captions are used
        (minutes rather than seconds). Collective.

        `rivals`, scored on the same documents, add how far below each of them the model stands
        (`heldout/text/below_order2`), with the standard error of the difference, document by document. Raises DataError
        if held-out data cannot be read.
        """
        if self._tables is None:
            self._tables = dict(_tables(self.config))
        tables = self._tables
        found: dict[str, float] = {}
        for (part, table), sums in zip(tables.items(), document_sums(host, list(tables.values())), strict=True):
            if part == "router":
                found |= _router_numbers(table, sums)
                continue
            score = _scored(table, sums, part=part, config=self.config)
            flows = part == "text" or self.config.model.media[part].objective == "flow"
            what = "bits_per_byte" if part == "text" else self.config.model.media[part].loss_name
            found |= _named(f"heldout/{part}/{what}", *score[:2])
            found |= _below(table, score, part=part, rivals=rivals) if rivals and flows else {}
        if full and self.config.eval.media_spans:
            for modality in self.config.model.media:
                found |= clean_errors(host, self.config, modality=modality)
        if full and self.config.eval.media_spans and self.config.eval.captioned_spans:
            for modality in self.config.model.media:
                spans = self.config.eval.captioned_spans
                found |= caption_gain(host, self.config, modality=modality, num_spans=spans)
        return found


def evaluate(host: Host, config: RunConfig, *, full: bool, rivals: Baselines | None = None) -> dict[str, float]:
    """`HeldOut` once: whoever evaluates again keeps one, and its batches with it. Collective."""
    return HeldOut(config)(host, full=full, rivals=rivals)


def text_by_document(host: Host, config: RunConfig) -> dict[str, tuple[float, float]]:
    """Key of each held-out text document of eval.text_bytes -> its bits and its bytes. Collective."""
    return _by_document(host, config, table=_text_table(config), part="text")


def media_by_document(host: Host, config: RunConfig, *, modality: str) -> dict[str, tuple[float, float]]:
    """Key of each held-out document of eval.media_spans of a modality -> its squared errors and its scalars, means over
    the levels of noise. The noise hangs on the key alone, whatever else the document holds. Collective.
    """
    return _by_document(host, config, table=_media_table(config, modality), part=modality)


def _by_document(
    host: Host, config: RunConfig, *, table: Documents | None, part: str
) -> dict[str, tuple[float, float]]:
    if table is None:
        return {}
    losses, sizes, times = _scored(table, document_sums(host, [table])[0], part=part, config=config)
    pairs = zip((losses / times).tolist(), (sizes / times).tolist(), strict=True)
    return dict(zip(table.keys, pairs, strict=True))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Numbers of one checkpoint (`heldout/...`, or `heldout_ema/...` of the average) and the baselines beside them."""

    step: int
    numbers: dict[str, float]
    baselines: dict[str, float]


def evaluate_run(
    run_folder: Path,
    *,
    ema: bool,
    text_bytes: int | None = None,
    media_spans: int | None = None,
    judged: int | None = None,
    draws: Draws | None = None,
    data: Path | None = None,
    watch: Watch = unwatched,
) -> Evaluation:
    """Everything about a run's newest good checkpoint, on one plain rank; kept as evaluation.json and baselines.json.

    Amounts are those of the run's `eval`, unless given; judged pictures are drawn by `draws`, else `draws_for`. `watch`
    hears of what is going on. Both files keep what they hold of the same step. With `data`, a text data set, its
    held-out documents alone are scored, all unless `text_bytes` says less, and nothing is kept. Raises ConfigError,
    CheckpointError or DataError.
    """
    config, host, model = load_for_inference(run_folder, ema=ema)
    if data is not None:
        config = _of_text(config, data)
    amounts = {
        "text_bytes": config.eval.final_text_bytes if text_bytes is None else text_bytes,
        "media_spans": config.eval.final_media_spans if media_spans is None else media_spans,
        "judged_samples": judged,
    }
    asked = config.eval.model_copy(update={name: value for name, value in amounts.items() if value is not None})
    config = config.model_copy(update={"eval": asked})
    watch("baselines", 0, None)
    baselines = _baselines(config, asked)
    watch("held-out data", 0, None)
    numbers = evaluate(host, config, full=True, rivals=baselines)
    numbers |= judged_samples(model, config, draws=draws, watch=watch)
    if config.eval.media_spans:
        for modality in (name for name, media in config.model.media.items() if media.noises_trees):
            numbers |= tree_arms(host, model, config, modality=modality)
    if ema:
        numbers = {name.replace("heldout/", "heldout_ema/", 1): value for name, value in numbers.items()}
    evaluation = Evaluation(host.steps, numbers, baselines.numbers)
    if data is None:
        _keep(Path(run_folder), evaluation)
    return evaluation


def _of_text(config: RunConfig, folder: Path) -> RunConfig:
    """The same run over another text data set and nothing else."""
    source = SourceConfig(path=folder.name, form="text", weight=1.0)
    root = {"root": str(folder.resolve().parent), "recipe": None, "sources": {"text": source}}
    amounts = {"text_bytes": EVERY_BYTE, "media_spans": 0, "final_text_bytes": None, "final_media_spans": None}
    amounts |= {"judged_samples": 0}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=root),
            "eval": config.eval.model_copy(update=amounts),
        }
    )


def _tables(config: RunConfig) -> Iterator[tuple[str, Documents]]:
    """Part -> its documents; a part that is asked for nothing, or has no held-out source, is left out."""
    asked = config.eval
    if asked.text_bytes and (text := _text_table(config)):
        yield "text", text
    if not asked.media_spans:
        return
    for modality in config.model.media:
        if media := _media_table(config, modality):
            yield modality, media
    documents = _mixed(config, ROUTER_DOCUMENTS_A_SPAN * asked.media_spans)
    yield "router", gather_documents(pack_documents(documents, config=config), num_rows=config.train.micro_batch)


def _text_table(config: RunConfig) -> Documents | None:
    """Held-out text, under a diffusion objective at every stratum of t; None if there is none."""
    texts = [name for name, source in config.data.sources.items() if source.form == "text"]
    batches = [batch for name in texts for batch in heldout_batches(config, name, max_bytes=config.eval.text_bytes)]
    if not batches:
        return None
    if config.model.diffuses_text:
        batches = [
            with_masks(batch, number=number, draws=MASK_DRAWS, seed=NOISE_SEED, before=before)
            for batch, before in with_before(batches)
            for number in range(MASK_DRAWS)
        ]
    return gather_documents(batches, num_rows=config.train.micro_batch)


def _media_table(config: RunConfig, modality: str) -> Documents | None:
    """Held-out media at every level of noise; None if there are none."""
    plain = media_batches(config, modality)
    if not any(velocity_scalars(batch, modality)[0].numel() for batch in plain):
        return None
    noised = [
        with_noise(batch, time=time, seed=NOISE_SEED, index=index, before=before)
        for batch, before in with_before(plain)
        for index, time in enumerate(TIMES, start=1)
    ]
    return gather_documents(noised, num_rows=config.train.micro_batch)


def _mixed(config: RunConfig, num_documents: int) -> list[Document]:
    """Held-out documents of all forms in the shares and templates of training; the run's seed does not enter."""
    data, model = config.data, config.model
    opened = {name: open_source(name, data=data, model=model, split="heldout") for name in data.sources}
    streams = {name: Stream(source, seed=0, lane=0, lanes=1) for name, source in opened.items()}
    weights = {name: source.weight for name, source in data.sources.items()}
    mixture = Mixture(streams, weights, seed=0, lane=0, bad=BadSamples(data.max_bad_samples))
    return [mixture.next(lambda one: document_positions(one, model=model))[2] for _ in range(num_documents)]


class _Score(NamedTuple):
    """Of each document: bits and bytes of text, or squared errors and scalars of media; each counted `times` over."""

    losses: np.ndarray
    sizes: np.ndarray
    times: int


def _scored(table: Documents, sums: dict[str, np.ndarray], *, part: str, config: RunConfig) -> _Score:
    if part != "text":
        return _Score(sums[part], table.count(lambda batch: velocity_scalars(batch, part)), len(TIMES))
    bits = sums["text"] / math.log(2)
    num_bytes = table.count(lambda b: (b.text.document_U, b.text.symbol_U != END))
    if not config.model.diffuses_text:
        return _Score(bits, num_bytes, 1)
    return _Score(bits + table.count(_diffused_pieces) * length_bits(config), num_bytes, MASK_DRAWS)


def length_bits(config: RunConfig) -> float:
    """What a piece of diffused text pays for its length and for whether it ends: masked padding tells both (0009)."""
    text, room = config.model.text, config.data.sequence_latents
    return math.log2(2 * patches_that_fit(room - 1, text, patches=room) * text.patch_bytes)


def _diffused_pieces(batch: Batch) -> tuple[Tensor, Tensor]:
    """The document of each piece of text (a header stands before its first patch), and 1 for each."""
    text = batch.text
    begins_U = (text.place_U == 0) & torch.isin(text.slot_P[text.patch_U] - 1, text.header_slot_J)
    document_J = text.document_U[begins_U]
    return document_J, torch.ones_like(document_J)


def _below(table: Documents, score: _Score, *, part: str, rivals: Baselines) -> dict[str, float]:
    """A rival's loss less ours on each document that both scored; what a document is like drops out of the error."""
    ours, sizes, times = score
    found: dict[str, float] = {}
    for name, totals in rivals.totals.items():
        if name.startswith(f"{part}/"):
            theirs = np.array([totals[key] for key in table.keys]) * times
            found |= _named(f"heldout/{part}/below_{name.split('/')[1]}", theirs - ours, sizes)
    return found


def _router_numbers(table: Documents, sums: dict[str, np.ndarray]) -> dict[str, float]:
    num_questions = sum(len(batch.route.slot_R) for batch in table.batches)
    answers = Counter(
        answer for batch in table.batches for answer in batch.route.target_R[batch.route.span_end_R].tolist()
    )
    return {
        **_named("heldout/router/span_end_accuracy", sums["span_ends_right"], sums["span_ends"]),
        "heldout/router/majority": max(answers.values()) / sum(answers.values()),
        "heldout/router/accuracy": float(sums["router_right"].sum()) / num_questions,
    }


def _named(name: str, sums: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
    """A ratio and its standard error over documents; of a single document there is none."""
    score = ratio(sums, sizes)
    return {name: score.value} | ({f"{name}_stderr": score.stderr} if math.isfinite(score.stderr) else {})


def _baselines(config: RunConfig, asked: EvalConfig) -> Baselines:
    """Of the parts that are asked for."""
    sources = {
        name: source
        for name, source in config.data.sources.items()
        if (asked.text_bytes if source.form == "text" else asked.media_spans)
    }
    data = config.data.model_copy(update={"sources": sources})
    scored = config.model_copy(update={"data": data})
    return compute_baselines(scored, text_bytes=asked.text_bytes, media_spans=asked.media_spans)


def _keep(folder: Path, evaluation: Evaluation) -> None:
    numbers, baselines = folder / "evaluation.json", folder / "baselines.json"
    before = _read(numbers)
    same_step = before.get("step") == evaluation.step
    _write(baselines, _renewed(_read(baselines) if same_step else {}, evaluation.baselines))
    _write(numbers, _renewed(before if same_step else {}, {"step": evaluation.step, **evaluation.numbers}))


def _renewed(before: dict[str, float], found: dict[str, float]) -> dict[str, float]:
    """What was there, and over it what was found; a standard error goes with its number."""
    return {name: value for name, value in before.items() if name.removesuffix("_stderr") not in found} | found


def _read(path: Path) -> dict[str, float]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, tree: dict[str, float]) -> None:
    """Whole or not at all: a report may be reading."""
    write_whole(path, (json.dumps(tree, indent=1) + "\n").encode())
