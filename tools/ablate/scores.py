"""Held-out numbers of finished runs, each in a process of one thread, kept in the run's folder."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import Job

from matformer.engine.evaluate import evaluate, text_by_document
from matformer.engine.restore import load_for_inference
from matformer.engine.sample_quality import DRAWS, judged_samples
from matformer.files import write_whole
from matformer.parallel.process import settle

Asked = Mapping[str, Any]
Scorer = Callable[[Path, Asked], dict[str, Any]]
"""(run folder, what is asked for) -> numbers, fit for JSON; of a module, so that a process can be sent it."""


def score_all(jobs: Sequence[Job], scorer: Scorer, *, asked: Asked, file: str, at_once: int) -> dict[Job, Any]:
    """What `scorer` says of each job, from `file` in its folder where the same was asked before."""
    distinct = list(dict.fromkeys(jobs))
    todo = [job.folder for job in distinct if not _scored(job.folder / file, asked=asked)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=context, initializer=settle, initargs=(1,)) as pool:
        futures = [pool.submit(_score, folder, scorer, asked=asked, file=file) for folder in todo]
        for future in futures:
            future.result()
    return {job: json.loads((job.folder / file).read_text(encoding="utf-8")) for job in distinct}


def _scored(path: Path, *, asked: Asked) -> bool:
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["asked"] == asked


def _score(folder: Path, scorer: Scorer, *, asked: Asked, file: str) -> None:
    write_whole(folder / file, json.dumps({"asked": asked, **scorer(folder, asked)}).encode())


def columns(documents: Mapping[str, tuple[float, float]]) -> dict[str, list[Any]]:
    """Keys, losses and sizes of documents. Arms may pack them in another order: keys are sorted."""
    keys = sorted(documents)
    losses, sizes = ([documents[key][place] for key in keys] for place in (0, 1))
    return {"keys": keys, "losses": losses, "sizes": sizes}


def score_texts(folder: Path, asked: Asked) -> dict[str, Any]:
    """`bits` and `bytes` of each document of `num_bytes` of held-out text under the last weights."""
    config, host, _ = load_for_inference(folder, ema=False)
    amount = config.eval.model_copy(update={"text_bytes": asked["num_bytes"]})
    scored = text_by_document(host, config.model_copy(update={"eval": amount}))
    keys = sorted(scored)  # arms may pack them in another order
    bits, sizes = ([scored[key][part] for key in keys] for part in (0, 1))
    return {"keys": keys, "bits": bits, "bytes": sizes}


def score_everything(folder: Path, asked: Asked) -> dict[str, Any]:
    """`numbers`: the whole evaluation with the amounts of `eval`, and samples by `draws`, under the last weights."""
    config, host, model = load_for_inference(folder, ema=False)
    config = config.model_copy(update={"eval": config.eval.model_copy(update=asked["eval"])})
    found = evaluate(host, config, full=True)
    return {"numbers": found | judged_samples(model, config, draws=replace(DRAWS, **asked["draws"]))}
