"""The documents of a text data set as bytes, as its form lays them down: for commands that read text alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from matformer.data.shards import ShardReader
from matformer.errors import DataError


def open_texts(folder: Path) -> ShardReader:
    """The data set in `folder`. Raises DataError if it is of another form."""
    reader = ShardReader(folder)
    if reader.manifest["form"] != "text":
        raise DataError(f"{folder} must be a data set of form text, got {reader.manifest['form']}; change --data")
    return reader


def texts_of(reader: ShardReader, block: int) -> list[bytes]:
    """The documents of one block."""
    docs, data = reader.array(block, "docs.npy"), reader.view(block, "bytes")
    return [bytes(data[first:last]) for first, last in zip(docs[:-1].tolist(), docs[1:].tolist(), strict=True)]


def first_texts(folder: Path, *, num_bytes: int) -> Iterator[bytes]:
    """Documents, block by block, until `num_bytes` are there. Raises DataError if there are none."""
    reader = open_texts(folder)
    seen = 0
    for block in range(len(reader)):
        for text in texts_of(reader, block):
            yield text
            seen += len(text)
            if seen >= num_bytes:
                return
    if not seen:
        raise DataError(f"{folder} must hold text, got none; change --data")
