"""Counter-based randomness: keys alone decide."""

from __future__ import annotations

import numpy as np
import pytest

from matformer.parallel.seeds import Permutation, draw_time, generator


def test_equal_keys_give_equal_streams_and_any_other_key_another() -> None:
    first = generator(1, "noise", 2, 3).random(4)
    assert (generator(1, "noise", 2, 3).random(4) == first).all()
    for keys in ((2, "noise", 2, 3), (1, "noise", 3, 2), (1, "noise", 23), (1, "noise", "2", 3), (1, "noise", 2)):
        assert (generator(*keys).random(4) != first).all()  # pyright: ignore[reportArgumentType]


def test_keys_of_a_release_do_not_drift() -> None:
    assert generator(0, "frozen").integers(1 << 30, size=2).tolist() == FROZEN
    assert [Permutation(5, 0, "frozen")[i] for i in range(5)] == FROZEN_ORDER


FROZEN = [14473440, 522575821]
FROZEN_ORDER = [2, 0, 3, 1, 4]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 257, 1000])
def test_permutation_visits_every_index_once(size: int) -> None:
    order = [Permutation(size, 7, "text", 0)[i] for i in range(size)]
    assert sorted(order) == list(range(size))


def test_permutation_looks_shuffled_and_changes_with_the_epoch() -> None:
    size = 1000
    first, second = ([permutation[i] for i in range(size)] for permutation in (Permutation(size, 7, e) for e in (0, 1)))
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.1
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_permutation_refuses_what_is_outside() -> None:
    with pytest.raises(IndexError):
        Permutation(3, 0)[3]


def test_time_is_logit_normal_and_the_shift_moves_it_to_noise() -> None:
    plain = np.array([draw_time(generator(0, i)) for i in range(2000)])
    shifted = np.array([draw_time(generator(0, i), shift=3.0) for i in range(2000)])
    logit = np.log(plain / (1 - plain))
    assert abs(logit.mean()) < 0.1 and abs(logit.std() - 1) < 0.1
    assert np.allclose(shifted, 3 * plain / (1 + 2 * plain))
