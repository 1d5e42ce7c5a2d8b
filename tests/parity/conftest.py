"""Worlds of ranks that stay while tests of this folder run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.ranks.launcher import Ranks


@pytest.fixture(scope="package")
def world() -> Iterator[Callable[[int], Ranks]]:
    """world(n): n ranks, started when first asked for. The world of another size is taken down: cores are few."""
    held: dict[int, Ranks] = {}

    def of_size(size: int) -> Ranks:
        for other in [n for n in held if n != size]:
            held.pop(other).close()
        return held.setdefault(size, Ranks(size))

    yield of_size
    for ranks in held.values():
        ranks.close()
