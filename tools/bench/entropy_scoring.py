"""Entropy scoring of documents in batches against one call of the model a document: CPU seconds, one thread, in turn.

python tools/bench/entropy_scoring.py [--data data/demo/text/train] [--model data/demo/entropy] [--documents 300]
    [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from matformer.data.entropy import EntropyModel, entropies, input_symbols, load_entropy_model
from matformer.data.shards import ShardReader
from matformer.parallel.process import settle


def first_texts(folder: Path, count: int) -> list[bytes]:
    """The first documents of a text data set."""
    reader = ShardReader(folder)
    found: list[bytes] = []
    for block in range(len(reader)):
        docs, data = reader.array(block, "docs.npy").tolist(), reader.view(block, "bytes")
        found += [bytes(data[first:last]) for first, last in zip(docs[:-1], docs[1:], strict=True)]
        if len(found) >= count:
            break
    return found[:count]


@torch.no_grad()
def one_by_one(model: EntropyModel, texts: Sequence[bytes]) -> list[np.ndarray]:
    """What a loop over documents gives."""
    found = []
    for text in texts:
        symbol_U = torch.from_numpy(input_symbols(text))
        place_U = torch.arange(len(symbol_U))
        log_p = model(symbol_U, torch.zeros_like(place_U), place_U).log_softmax(-1)
        found.append((-(log_p.exp() * log_p).sum(-1)).numpy())
    return found


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> int:
    """Prints a table; with --json one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo/text/train"))
    parser.add_argument("--model", type=Path, default=Path("data/demo/entropy"))
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    settle(1)
    model = load_entropy_model(asked.model)
    texts = first_texts(asked.data, asked.documents)
    size = sum(map(len, texts))
    for ours, theirs in zip(entropies(model, texts), one_by_one(model, texts), strict=True):
        assert np.abs(ours - theirs).max() < 1e-3, "both score the same"
    batched, single = [], []
    for _ in range(asked.rounds):
        batched.append(cpu_seconds(lambda: entropies(model, texts)))
        single.append(cpu_seconds(lambda: one_by_one(model, texts)))
    ratios = [one / many for one, many in zip(single, batched, strict=True)]
    result = {
        "documents": len(texts),
        "bytes": size,
        "batched_kb_per_cpu_s": size / statistics.median(batched) / 1e3,
        "single_kb_per_cpu_s": size / statistics.median(single) / 1e3,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    table = Table("arm", "kB a CPU second", title=f"{len(texts)} documents, {size / len(texts):.0f} bytes in the mean")
    table.add_row("in batches", f"{result['batched_kb_per_cpu_s']:.0f}")
    table.add_row("a call a document", f"{result['single_kb_per_cpu_s']:.0f}")
    table.add_row("ratio", f"{result['ratio']:.2f} ({result['ratio_min']:.2f} … {result['ratio_max']:.2f})")
    Console().print(table)
    if asked.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
