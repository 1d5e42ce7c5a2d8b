"""The launcher itself: a rank that raises or hangs ends in a failure that shows where, and soon."""

from __future__ import annotations

import time

import pytest

from tests.ranks import cases
from tests.ranks.launcher import Ranks, RanksFailed


def test_a_rank_that_raises_fails_with_its_traceback() -> None:
    with Ranks(2) as ranks:
        with pytest.raises(RanksFailed, match="rank 1.*(?s:.*)ValueError: planted"):
            ranks.run(cases.raise_on_rank_one)
        assert ranks.run(cases.sleep_on_rank_one, 0.0) == [0, 1]  # new processes


def test_a_rank_that_hangs_is_ended_and_shown() -> None:
    with Ranks(2) as ranks:
        assert ranks.run(cases.sleep_on_rank_one, 0.0) == [0, 1]
        begun = time.monotonic()
        with pytest.raises(RanksFailed, match="rank 1: still running(?s:.*)sleep_on_rank_one"):
            ranks.run(cases.sleep_on_rank_one, 600.0, limit_seconds=1.0)
        assert time.monotonic() - begun < 10
        assert ranks.processes == []
