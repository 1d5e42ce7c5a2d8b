"""Counter-based randomness: keys alone decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from matformer.config.schema import TimeSampler
from matformer.parallel.seeds import MODE_SCALE, Permutation, draw_time, generator


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


class Told(np.random.Generator):
    """Gives one number, whatever law it is asked for."""

    def __init__(self, number: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.number = number

    def random(self, *_: object) -> float:  # pyright: ignore
        return self.number

    def standard_normal(self, *_: object) -> float:  # pyright: ignore
        return self.number


@pytest.mark.parametrize("sampler", ["uniform", "logit_normal", "mode"])
def test_times_are_those_of_diffusers_for_the_same_random_numbers(sampler: TimeSampler) -> None:
    def dice() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    theirs = compute_density_for_timestep_sampling(
        sampler, 500, logit_mean=0.0, logit_std=1.0, mode_scale=MODE_SCALE, generator=dice()
    )
    if sampler == "logit_normal":
        numbers = torch.normal(mean=0.0, std=1.0, size=(500,), generator=dice())
    else:
        numbers = torch.rand(size=(500,), generator=dice())
    ours = [draw_time(Told(number), sampler=sampler) for number in numbers.tolist()]
    assert np.allclose(ours, theirs.numpy(), atol=1e-6)
    assert 0 < min(ours) and max(ours) < 1
    drawn = [draw_time(generator(0, i), sampler=sampler) for i in range(4000)]
    assert abs(np.mean(drawn) - 0.5) < 0.02 and abs(np.std(drawn) - float(theirs.std())) < 0.02


def test_the_shift_is_that_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    shifted = [draw_time(Told(k / 1000), sampler="uniform", shift=3.0) for k in range(1000, 0, -1)]
    assert np.allclose(shifted, torch.as_tensor(scheduler.sigmas).numpy(), atol=1e-6)
