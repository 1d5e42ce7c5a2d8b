"""Entropy scoring of documents in batches against one call of the model a document: CPU seconds, one thread, in turn.

python tools/bench/entropy_scoring.py [--data data/demo/text/train] [--model data/demo/entropy] [--documents 300]
    [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import cpu_seconds, finish, in_turn, ratios, shown
from rich.table import Table

from matformer.data.entropy import EntropyModel, entropies, input_symbols, load_entropy_model
from matformer.data.texts import first_texts
from matformer.parallel.process import settle


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
    texts = list(itertools.islice(first_texts(asked.data, num_bytes=sys.maxsize), asked.documents))
    size = sum(map(len, texts))
    for ours, theirs in zip(entropies(model, texts), one_by_one(model, texts), strict=True):
        assert np.abs(ours - theirs).max() < 1e-3, "both score the same"
    arms = {
        "batched": lambda _: cpu_seconds(lambda: entropies(model, texts)),
        "single": lambda _: cpu_seconds(lambda: one_by_one(model, texts)),
    }
    seconds = in_turn(arms, asked.rounds, warm_up=0)
    result = {
        "documents": len(texts),
        "bytes": size,
        "batched_kb_per_cpu_s": size / statistics.median(seconds["batched"]) / 1e3,
        "single_kb_per_cpu_s": size / statistics.median(seconds["single"]) / 1e3,
        **ratios(seconds["single"], seconds["batched"]),
    }
    table = Table("arm", "kB a CPU second", title=f"{len(texts)} documents, {size / len(texts):.0f} bytes in the mean")
    table.add_row("in batches", f"{result['batched_kb_per_cpu_s']:.0f}")
    table.add_row("a call a document", f"{result['single_kb_per_cpu_s']:.0f}")
    table.add_row("ratio", shown(result))
    return finish(table, result, as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
