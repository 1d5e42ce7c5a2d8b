"""Text shards -> a sentencepiece model over bytes, for the bpe patcher and the tokenised control.

    python -m data_prep.train_sentencepiece --data data/demo/text --out data/demo/pieces.model \
        (--vocabulary 4096 | --mean-patch 4.0) [--max-patch-bytes 16] [--sample-bytes 4000000]

It learns from the train split; --mean-patch looks for the vocabulary whose pieces, with `<end>` as one of its own, hold
so many symbols in the mean. The file appears whole or not at all.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from matformer.data.matching import matched, mean_patch
from matformer.data.pieces import Pieces, train_pieces
from matformer.data.texts import first_texts
from matformer.door import door
from matformer.errors import DataError
from matformer.files import write_whole

log = logging.getLogger("data_prep.train_sentencepiece")


@door
def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    asked = _parser().parse_args(arguments)
    sample = list(first_texts(asked.data / "train", num_bytes=asked.sample_bytes))

    def trained(vocabulary: int) -> Pieces:
        return train_pieces(sample, vocabulary=vocabulary, longest=asked.max_patch_bytes, threads=asked.threads)

    pieces = trained(asked.vocabulary) if asked.vocabulary else matched(trained, sample, mean=asked.mean_patch)
    heldout = list(first_texts(asked.data / "heldout", num_bytes=asked.sample_bytes))
    _save(pieces, asked.out)
    log.info("%s: %d pieces, fingerprint %s", asked.out, len(pieces), pieces.fingerprint[:16])
    log.info(
        "mean patch: %.3f symbols of train, %.3f held out", mean_patch(pieces, sample), mean_patch(pieces, heldout)
    )
    log.info("data.patcher.kind=bpe data.patcher.sentencepiece=%s model.text.predicts_end=true", asked.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="text data set, holding train/ and heldout/")
    parser.add_argument("--out", type=Path, required=True, help="file of the model")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--vocabulary", type=int, help="pieces, 257 of them for bytes")
    size.add_argument("--mean-patch", type=float, help="symbols a patch that the vocabulary is to give")
    parser.add_argument("--max-patch-bytes", type=int, default=16)
    parser.add_argument("--sample-bytes", type=int, default=4_000_000, help="of train that it learns from")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser


def _save(pieces: Pieces, path: Path) -> None:
    """Whole or not at all."""
    try:
        write_whole(path, pieces.model)
    except OSError as error:
        raise DataError(f"{path} must be a file that can be written, got: {error}; change --out") from error


if __name__ == "__main__":
    sys.exit(main())
