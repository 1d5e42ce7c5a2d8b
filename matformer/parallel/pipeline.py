"""Pipeline schedules in numbers: what waits on a rank at once, what it sends, and how long it stands still.

1F1B, or megatron's interleaved 1F1B where a rank has several stages: after pp microbatches of one stage come pp of the
next one, and on the way back the same from the last stage to the first. Source: megatron-core 0.16,
pipeline_parallel/schedules.py; tests/unit/test_pipeline.py holds this to its order.
"""

from __future__ import annotations

from functools import cache


@cache
def waiting(pp: int, rank: int, *, virtual: int, microbatches: int) -> frozenset[tuple[int, ...]]:
    """Microbatches of each of a rank's stages whose activations wait at once, whenever most of them do."""
    total = virtual * microbatches
    ahead = min((pp - rank - 1) * (2 if virtual > 1 else 1) + (virtual - 1) * pp, total - 1)
    held, found = [0] * virtual, set()
    for step in range(min(total, ahead + virtual * pp)):  # later it repeats
        if step > ahead:
            held[virtual - 1 - _stage(step - ahead - 1, pp=pp, virtual=virtual)] -= 1
        held[_stage(step, pp=pp, virtual=virtual)] += 1
        if step >= ahead:
            found.add(tuple(held))
    return frozenset(found)


def bubble_share(pp: int, *, virtual: int, microbatches: int) -> float:
    """Of the pipeline's time in which a rank waits, were all stages alike."""
    return (pp - 1) / (virtual * microbatches + pp - 1)


def sends(pp: int, *, virtual: int) -> int:
    """Streams, and gradients of streams, that the rank which sends most sends of a microbatch."""
    if pp == 1:
        return 0
    return 2 * virtual - (pp == 2)  # of two, the last rank ends with no stream to send, the first with no gradient


def _stage(step: int, *, pp: int, virtual: int) -> int:
    """Which of the rank's stages the forward of this number goes through."""
    return step // pp % virtual
