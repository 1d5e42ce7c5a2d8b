"""Documents that go on from one held-out batch into the next: which of its document each unit is, however it is cut.

A unit is a block of text under a diffusion objective, or a media span: what is drawn for it hangs on that number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from matformer.parcels import Batch

Before = Mapping[str, int]
"""Part ("text" or a modality) -> how many units the first document of a batch had in the batches before it."""
NOTHING_BEFORE: Before = MappingProxyType({})


def with_before(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Before]]:
    """Each of the batches, in which documents stand one after the other, and what stood before it."""
    before, last = NOTHING_BEFORE, None
    for batch in batches:
        before = NOTHING_BEFORE if last is None else before_next(before, batch=last, following=batch)
        yield batch, before
        last = batch


def before_next(before: Before, *, batch: Batch, following: Batch) -> Before:
    """What stood before `following`, where `before` stood before `batch`: nothing unless a document goes on in it."""
    if batch.document_keys[-1] != following.document_keys[0]:
        return NOTHING_BEFORE
    number = len(batch.document_keys) - 1
    more = NOTHING_BEFORE if number else before
    return {part: more.get(part, 0) + documents.count(number) for part, documents in documents_of_units(batch).items()}


def documents_of_units(batch: Batch) -> dict[str, list[int]]:
    """Part -> the document of each of its units, in the order in which they stand."""
    text = batch.text.document_U[batch.text.place_U == 0].tolist()
    return {"text": text} | {name: units.document_J.tolist() for name, units in batch.media.items()}


def numbers_in_document(documents: Sequence[int], *, before: int) -> list[int]:
    """Which of its document each unit is, from 0; `before`: of the units of document 0 in earlier batches."""
    seen = {0: before}
    numbers = []
    for document in documents:
        numbers.append(seen.get(document, 0))
        seen[document] = numbers[-1] + 1
    return numbers
