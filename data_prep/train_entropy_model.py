"""Text shards -> a small byte model for the entropy patchers.

    python -m data_prep.train_entropy_model --data data/demo/text --out data/demo/entropy [--steps 400]

It learns from the train split and is scored on the held-out one. The folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress, TextColumn
from torch import Tensor

from data_prep.save import save_whole
from matformer.data.entropy import EntropyModel, EntropySettings, input_symbols
from matformer.data.texts import open_texts
from matformer.door import door
from matformer.errors import DataError
from matformer.shapes import END, NUM_TARGETS

log = logging.getLogger("data_prep.train_entropy_model")

BATCH_SYMBOLS, HELDOUT_BYTES = 16_384, 200_000
LEARNING_RATE, WARM_UP = 8e-3, 20


@door
def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="text data set, holding train/ and heldout/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    model = train(documents(asked.data / "train", seed=asked.seed), steps=asked.steps, seed=asked.seed)
    bits = bits_per_byte(model, documents(asked.data / "heldout", seed=0), num_bytes=HELDOUT_BYTES)
    save_whole(model, asked.out)
    log.info("%s: held-out text %.3f bits a byte, fingerprint %s", asked.out, bits, model.fingerprint[:16])
    return 0


def documents(folder: Path, *, seed: int) -> Iterator[bytes]:
    """Documents of a text data set in a shuffled order, over and over. Raises DataError if there are none."""
    reader = open_texts(folder)
    counts = [reader.array_length(i, "docs.npy") - 1 for i in range(len(reader))]
    firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    if not firsts[-1]:
        raise DataError(f"{folder} must hold documents, got none; change --data")
    for epoch in itertools.count():
        for index in np.random.default_rng((seed, epoch)).permutation(int(firsts[-1])).tolist():
            block = int(np.searchsorted(firsts, index, side="right")) - 1
            docs = reader.array(block, "docs.npy")
            place = index - int(firsts[block])
            yield bytes(reader.view(block, "bytes")[int(docs[place]) : int(docs[place + 1])])


def train(
    texts: Iterator[bytes],
    *,
    steps: int,
    seed: int,
    settings: EntropySettings | None = None,
    batch_symbols: int | None = None,
) -> EntropyModel:
    """Next-symbol cross-entropy over whole documents, AdamW, a rate that rises and falls to zero."""
    torch.manual_seed(seed)
    model = EntropyModel(settings or EntropySettings())
    torch.nn.init.normal_(model.embedding.weight, std=0.5)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    if model.ngram_embedding is not None:
        torch.nn.init.zeros_(model.ngram_embedding.table.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[bits]:.2f} bits a symbol"))
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("entropy model", total=steps, bits=math.log2(NUM_TARGETS))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min((step + 1) / WARM_UP, 1.0, 2 * (steps - step) / steps)
            inputs, pieces, places, targets = _batch(texts, batch_symbols or BATCH_SYMBOLS)
            loss = F.cross_entropy(model(inputs, pieces, places), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.update(task, advance=1, bits=float(loss.detach()) / math.log(2))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def bits_per_byte(model: EntropyModel, texts: Iterator[bytes], *, num_bytes: int) -> float:
    """Of at least `num_bytes` of documents, `<end>` paid for and not divided by."""
    nats, seen = 0.0, 0
    while seen < num_bytes:
        inputs, pieces, places, targets = _batch(texts, BATCH_SYMBOLS)
        nats += float(F.cross_entropy(model(inputs, pieces, places), targets, reduction="sum"))
        seen += int((targets != END).sum())
    return nats / seen / math.log(2)


def _batch(texts: Iterator[bytes], num_symbols: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, piece and place of each, and targets of whole documents of about `num_symbols` symbols together."""
    inputs: list[np.ndarray] = []
    while sum(map(len, inputs)) < num_symbols:
        inputs.append(input_symbols(next(texts)))
    lengths = [len(one) for one in inputs]
    targets = np.concatenate([np.append(one[1:], END) for one in inputs])
    places = np.concatenate([np.arange(length) for length in lengths])
    arrays = (np.concatenate(inputs), np.repeat(np.arange(len(inputs)), lengths), places, targets)
    inputs_U, pieces_U, places_U, targets_U = (torch.from_numpy(array) for array in arrays)
    return inputs_U, pieces_U, places_U, targets_U


if __name__ == "__main__":
    sys.exit(main())
