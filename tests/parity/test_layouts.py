"""Any layout is the same run: losses of three steps, and every gradient, against plain PyTorch on one rank.

Gradients are read from the first moment of the first AdamW step, exp_avg / (1 - beta1): what the optimizer was given,
through every ZeRO stage. Weights are stirred first, since a last layer of zeros passes no gradient on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matformer.config.schema import RunConfig
from matformer.data.packing import (
    DrawNoise,
    Piece,
    Place,
    build_batch,
    draw_training_noise,
    pack_batch,
    with_noise,
)
from matformer.data.sources import MediaSpan, Role, media_span
from matformer.engine.document_sums import gather_documents
from matformer.engine.gradients import gradient_row
from matformer.parcels import Batch
from tests.made import (
    LENGTH,
    as_blt,
    as_diffused,
    audio,
    document,
    image,
    masked_batch,
    mixed_documents,
    one_a_row,
    plain_host,
    poisoned,
    text_only,
    tiny_run,
    with_audio,
    with_both,
    with_images,
    with_media,
)
from tests.ranks import cases
from tests.ranks.cases import GlobalBatch, Trained
from tests.ranks.launcher import Ranks, RanksFailed
from tests.tolerances import BFLOAT16_LOSS, GRADIENT, LOSS

World = Callable[[int], Ranks]
LAYERS = 4

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tp2": {"tp": 2},
    "tp2 sequence parallel": {"tp": 2, "sequence_parallel": True},
    "tp2 zero2": {"tp": 2, "zero_stage": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "dp2 zero2": {"dp": 2, "zero_stage": 2},
    "dp2 zero3": {"dp": 2, "zero_stage": 3},
    "tp2 pp2 sequence parallel": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "tp2 dp2": {"tp": 2, "dp": 2},
    "tp2 dp2 zero3": {"tp": 2, "dp": 2, "zero_stage": 3},
    "pp2 dp2": {"pp": 2, "dp": 2},
}


MORE_LAYOUTS: dict[str, dict[str, Any]] = {
    "cp2": {"cp": 2},
    "tp2 cp2": {"tp": 2, "cp": 2},
    "tp2 cp2 sequence parallel": {"tp": 2, "cp": 2, "sequence_parallel": True},
    "cp2 dp2 zero3": {"cp": 2, "dp": 2, "zero_stage": 3},
    "cp2 pp2 interleaved": {"cp": 2, "pp": 2, "virtual_stages": 2},
    "pp2 interleaved": {"pp": 2, "virtual_stages": 2},
    "pp2 uneven": {"pp": 2, "stage_layers": (3, 1)},
    "tp2 pp2 interleaved uneven": {
        "tp": 2,
        "pp": 2,
        "virtual_stages": 2,
        "stage_layers": (1, 1, 1, 1),
        "sequence_parallel": True,
    },
    "full recompute": {"recompute": "full"},
    "tp2 selective recompute": {"tp": 2, "recompute": "selective"},
    "tp2 pp2 full recompute": {"tp": 2, "pp": 2, "recompute": "full", "sequence_parallel": True},
    "dp2 zero3 full recompute": {"dp": 2, "zero_stage": 3, "recompute": "full"},
    "dp2 zero2 offload": {"dp": 2, "zero_stage": 2, "offload_optimizer": True},
    "dp2 zero3 offload": {"dp": 2, "zero_stage": 3, "offload_optimizer": True},
}
SLOW = (
    "full recompute",
    "tp2 selective recompute",
    "dp2 zero3 offload",
    "tp2 cp2",
    "cp2 dp2 zero3",
)  # others say as much in less time


def run_of(name: str, **train: Any) -> RunConfig:
    """The run of a layout."""
    return tiny_run(layers=LAYERS, train=train, **(LAYOUTS | MORE_LAYOUTS)[name])


@cache
def mixed_steps() -> list[GlobalBatch]:
    """Three global batches of four microbatches that differ in everything: counts, modalities, blind spans."""
    return [
        [with_both(10 * step + 1), text_only(10 * step + 2), with_images(10 * step + 3), with_audio(10 * step + 4)]
        for step in range(3)
    ]


@cache
def uneven_steps() -> list[GlobalBatch]:
    """With dp 2 (microbatches 0, 2 and 1, 3): rank 0 has no image, rank 1 no audio; in the last step no media exist.

    In the first step, whose gradients are compared, one shape bucket is asked for three times, the other once: asked
    for equally often, the gradient of the bucket biases is a sum that cancels, and little is left but rounding.
    """
    return [
        [with_audio(1), with_images(2), of_one_bucket(3, audio), of_one_bucket(4, image)],
        [text_only(5), with_images(6), with_audio(7), text_only(8)],
        [text_only(9), text_only(10), text_only(11), text_only(12)],
    ]


def of_one_bucket(seed: int, make: Callable[[int], MediaSpan]) -> Batch:
    """Two rows, each with one generated medium of the smaller bucket."""
    return one_a_row([document(f"o{seed}.{i}", b"one %d" % i, make(seed + i)) for i in range(2)], time=0.6)


@cache
def reference(which: Callable[[], list[GlobalBatch]], **train: Any) -> Trained:
    """The plain run of these steps."""
    return cases.train_plain(tiny_run(layers=LAYERS, train=train), which())


def assert_same_run(ranks: Sequence[Trained], plain: Trained) -> None:
    """Losses and gradient norms on every rank, and every gradient, each held by exactly one rank."""
    for trained in ranks:
        np.testing.assert_allclose(trained.losses, plain.losses, rtol=LOSS)
        np.testing.assert_allclose(trained.norms, plain.norms, rtol=LOSS)
    assert sorted(name for trained in ranks for name in trained.gradients) == sorted(plain.gradients)
    for trained in ranks:
        for name, gradient in trained.gradients.items():
            expected = plain.gradients[name]
            assert gradient.shape == expected.shape, name
            difference, largest = np.abs(gradient - expected).max(), np.abs(expected).max()
            assert difference <= GRADIENT * largest, f"{name}: {difference} of {largest}"


def test_the_steps_move_every_parameter() -> None:
    gradients = reference(mixed_steps).gradients
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


@pytest.mark.parametrize(
    "name", [*LAYOUTS, *(pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MORE_LAYOUTS)]
)
def test_a_layout_gives_the_losses_and_every_gradient_of_one_rank(name: str, world: World) -> None:
    config = run_of(name)
    trained = world(config.parallel.ranks).run(cases.train_ranks, config, mixed_steps())
    assert_same_run(trained, reference(mixed_steps))


@pytest.mark.parametrize("name", ["tp2 sequence parallel", "dp2 zero3"])
def test_blts_byte_path_and_a_trunk_without_qk_norms_give_the_same_too(name: str, world: World) -> None:
    config, plain = run_of(name), tiny_run(layers=LAYERS)
    config, plain = (run.model_copy(update={"model": as_blt(run.model)}) for run in (config, plain))
    trained = world(config.parallel.ranks).run(cases.train_ranks, config, mixed_steps())
    assert_same_run(trained, cases.train_plain(plain, mixed_steps()))


@pytest.mark.parametrize("objective", ["masked_diffusion", "block_diffusion"])
@pytest.mark.parametrize("name", ["pp2", "tp2 dp2 zero3"])
def test_diffused_text_is_the_same_run_too(name: str, objective: str, world: World) -> None:
    config, plain = run_of(name), tiny_run(layers=LAYERS)
    config, plain = (run.model_copy(update={"model": as_diffused(run.model, objective)}) for run in (config, plain))
    steps = [
        [
            masked_batch(
                [document(f"m{step}.{i}", b"some text %d" % i, image(i), b"after"), document(f"n{step}.{i}", b"alone")],
                model=plain.model,
                number=4 * i + step,
            )
            for i in range(4)
        ]
        for step in range(3)
    ]
    trained = world(config.parallel.ranks).run(cases.train_ranks, config, steps)
    assert_same_run(trained, cases.train_plain(plain, steps))


@pytest.mark.parametrize("steps", [mixed_steps, pytest.param(uneven_steps, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        "tp2 sequence parallel",
        "dp2 zero2",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("tp2 zero2", "dp2", "tp2 dp2", "tp2 cp2")),
    ],
)
def test_the_losses_gradients_have_the_cosines_of_one_rank_and_leave_no_trace(
    name: str, steps: Callable[[], list[GlobalBatch]], world: World
) -> None:
    config, plain = run_of(name), tiny_run(layers=LAYERS)
    looked = world(config.parallel.ranks).run(cases.look_ranks, config, steps())
    wanted = gradient_row(plain_host(plain), steps()[0], config=plain)
    assert len(wanted) > 40
    for row, _ in looked:
        assert row.keys() == wanted.keys()
        for key, value in wanted.items():
            assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    assert_same_run([trained for _, trained in looked], reference(steps))


ADALN = ["tp2 sequence parallel", "tp2 cp2 sequence parallel", "pp2", "dp2 zero3"]


def adaln_run(name: str) -> RunConfig:
    """A layout with the Atto's layers modulated by the times of images, whose Coda predicts v; sounds are as ever."""
    run = run_of(name)
    image = run.model.media["image"].model_copy(update={"time_conditioning": "adaln_atto", "objective": "ddpm_v"})
    model = run.model.model_copy(update={"media": {**run.model.media, "image": image}})
    return run.model_copy(update={"model": model})


@cache
def adaln_reference() -> Trained:
    return cases.train_plain(adaln_run("one rank"), mixed_steps())


@pytest.mark.parametrize("name", ["one rank", *ADALN])
def test_modulated_layers_give_the_same_too(name: str, world: World) -> None:
    config, plain = adaln_run(name), adaln_reference()
    assert all(plain.gradients[f"atto.layers.{i}.modulation.film.weight"].any() for i in range(LAYERS))
    trained = world(config.parallel.ranks).run(cases.train_ranks, config, mixed_steps())
    assert_same_run(trained, plain)


def test_modulations_that_keep_the_gradient_of_their_own_positions_are_seen(world: World) -> None:
    trained = world(2).run(cases.train_ranks, adaln_run("tp2 sequence parallel"), mixed_steps(), "modulations apart")
    with pytest.raises(AssertionError, match="modulation"):
        assert_same_run(trained, replace(adaln_reference(), norms=trained[0].norms, losses=trained[0].losses))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "tp2 sequence parallel",
            {"time_conditioning": "token", "objective": "ddpm_eps", "media_context": "noised", "unet_width": 4},
        ),
        ("dp2 zero3", {"time_conditioning": "adaln_preludio_coda", "loss_weighting": "min_snr", "coda": "dit"}),
    ],
)
def test_other_ways_to_tell_the_time_and_a_noised_context_too(name: str, keys: dict[str, str], world: World) -> None:
    config, plain = run_of(name), tiny_run(layers=LAYERS)
    config, plain = (run.model_copy(update={"model": with_media(run.model, **keys)}) for run in (config, plain))
    documents = [[document(f"{i}.{k}", b"a %d" % i, image(i + k), b"b", audio(i)) for k in range(2)] for i in range(4)]
    microbatches = [build_batch(pair, model=plain.model, sequence_latents=LENGTH) for pair in documents]
    steps = [[with_noise(b, time=0.2 * k, seed=k, index=k) for b in microbatches] for k in (1, 2, 3)]
    trained = world(config.parallel.ranks).run(cases.train_ranks, config, steps)
    assert_same_run(trained, cases.train_plain(plain, steps))


@pytest.mark.parametrize("name", ["tp2 sequence parallel", "pp2"])
def test_next_latents_give_the_same_too(name: str, world: World) -> None:
    config, plain = run_of(name), tiny_run(layers=LAYERS)
    keys = {"objective": "next_latent", "next_latent": {"noises": 3, "predicts": "ddpm_v"}}
    config, plain = (run.model_copy(update={"model": with_media(run.model, **keys)}) for run in (config, plain))
    documents = [[document(f"{i}.{k}", b"a %d" % i, image(i + k), b"b", audio(i)) for k in range(2)] for i in range(4)]
    pieces = [[[Piece(one, Place(), Place(len(one.spans)))] for one in pair] for pair in documents]

    def draws(step: int, number: int) -> list[DrawNoise]:
        lanes = (2 * number, 2 * number + 1)
        return [
            draw_training_noise(seed=0, step=step, lane=lane, blind_probability=0.3, time_shift=1.0) for lane in lanes
        ]

    steps = [
        [
            pack_batch(rows, draws(step, number), model=plain.model, sequence_latents=LENGTH)
            for number, rows in enumerate(pieces)
        ]
        for step in range(3)
    ]
    trained = world(config.parallel.ranks).run(cases.train_ranks, config, steps)
    assert_same_run(trained, cases.train_plain(plain, steps))


def test_copies_in_trees_give_the_same_too(world: World) -> None:
    """Leaves of two levels in both copies of what is generated, and of what is given; trees asked for at headers."""
    name = "tp2 pp2 sequence parallel"
    config, plain = run_of(name), tiny_run(layers=LAYERS)
    keys = {"patch": 1, "budget": {"share": 0.5, "levels": 2, "noised_tree": "own"}}
    config, plain = (run.model_copy(update={"model": with_media(run.model, **keys)}) for run in (config, plain))
    media = plain.model.media

    def span(kind: str, seed: int, role: Role = "generate") -> MediaSpan:
        """Of the wide pictures that are given, the right half is a leaf of 4 x 4."""
        latent = (image(seed, wide=role == "given") if kind == "image" else audio(seed)).latent
        busy = np.where(np.arange(latent.shape[-1]) < 4, 1.0, 0.1 if role == "given" else 1.0)
        return media_span((latent * busy).astype(np.float32), kind, media=media[kind], role=role)

    documents = [
        [
            document(f"{i}.0", b"a %d" % i, span("image", i), b"b", span("audio", i)),
            document(f"{i}.1", span("audio", i + 4, "given"), span("image", i + 4, "given"), b"given"),
        ]
        for i in range(4)
    ]
    microbatches = [build_batch(pair, model=plain.model, sequence_latents=LENGTH) for pair in documents]
    steps = [[with_noise(b, time=0.2 * k, seed=k, index=k) for b in microbatches] for k in (1, 2, 3)]
    assert set(microbatches[0].media["image"].clean_level_Q.tolist()) == {0, 1, 2}
    reference = cases.train_plain(plain, steps)
    new = [part for part in reference.gradients if ".merge." in part or ".tree_head." in part]
    assert [part for part in new if not reference.gradients[part].any()] == []
    assert_same_run(world(4).run(cases.train_ranks, config, steps), reference)


def test_gradients_are_summed_whatever_their_order_in_memory(world: World) -> None:
    """What the fuzz found: a rank without pictures has zeros in another order than a convolution's gradient."""
    assert world(2).run(cases.sum_of_two_orders, run_of("tp2")) == [True, True]


@pytest.mark.parametrize("name", ["tp2", "tp2 zero2", "cp2 pp2 interleaved"])
def test_a_microbatch_is_shared_out_once_and_not_before_it_is_needed(name: str, world: World) -> None:
    config = run_of(name)
    for done in world(config.parallel.ranks).run(cases.order_of_work, config, mixed_steps()[0]):
        assert done.count("share") == done.count("forward") == len(mixed_steps()[0])
        assert done[:2] == ["share", "forward"]


@pytest.mark.parametrize("name", ["tp2", "pp2", "dp2 zero2", "dp2 zero3"])
def test_clipping_takes_the_norm_of_the_whole_gradient(name: str, world: World) -> None:
    plain = reference(mixed_steps, clip=0.5)
    assert min(plain.norms) > 0.5
    config = run_of(name, clip=0.5)
    assert_same_run(world(config.parallel.ranks).run(cases.train_ranks, config, mixed_steps()), plain)


@pytest.mark.parametrize("name", ["dp2", "dp2 zero2", "dp2 zero3"])
def test_a_rank_without_a_modality_neither_hangs_nor_shifts_the_mean(name: str, world: World) -> None:
    trained = world(2).run(cases.train_ranks, run_of(name), uneven_steps(), limit_seconds=45.0)
    assert_same_run(trained, reference(uneven_steps))


@pytest.mark.parametrize("name", ["tp2 sequence parallel", "pp2", "dp2 zero2", "dp2 zero3"])
def test_heldout_sums_by_document_are_those_of_one_rank(name: str, world: World) -> None:
    config, rows = run_of(name), [mixed_documents()[:2], mixed_documents(), mixed_documents()[:1]]
    batches = gather_documents(map(one_a_row, rows), num_rows=len(mixed_documents())).batches
    plain = cases.plain_host(tiny_run(layers=LAYERS)).forward_only(batches)
    spoken = [sums for sums in world(2).run(cases.evaluate_ranks, config, batches) if sums]
    assert len(spoken) == config.parallel.dp
    for sums in spoken:
        for seen, expected in zip(sums, plain, strict=True):
            assert sorted(seen) == sorted(expected)
            for part, values in expected.items():
                np.testing.assert_allclose(seen[part], values.numpy(), rtol=LOSS, atol=LOSS, err_msg=part)


def test_a_pipeline_is_refused_unequal_shapes(world: World) -> None:
    """It would ask the next stage for the shape before each send, and wait for the answer."""
    batches = [one_a_row(mixed_documents()), one_a_row(mixed_documents()[:1])]
    with pytest.raises(RanksFailed, match="a pipeline sends equal shapes alone"):
        world(2).run(cases.evaluate_ranks, run_of("pp2"), batches, limit_seconds=20.0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("tp2", "float32"),
        ("pp2", "float32"),
        ("dp2", "float32"),
        ("dp2", "bfloat16"),  # another of DeepSpeed's optimizers
        ("dp2 zero2", "float32"),
        ("dp2 zero3", "float32"),
    ],
)
def test_a_gradient_that_is_not_finite_is_skipped_by_all_ranks(name: str, dtype: str, world: World) -> None:
    sound = mixed_steps()[0]
    bad = [poisoned(with_images(1)), *sound[1:]]  # under dp 2 one rank's loss is finite
    config = tiny_run(layers=LAYERS, dtype=dtype, **LAYOUTS[name])
    shown = world(2).run(cases.meet_nan, config, bad, sound)
    assert [skipped for skipped, _, _ in shown] == [[True, False]] * 2
    assert not any(changed for _, changed, _ in shown)
    assert any(changed for _, _, changed in shown)  # a rank may own nothing of the state


@pytest.mark.parametrize("name", ["pp2", "dp2"])
def test_all_ranks_end_a_run_that_learns_nothing(name: str, world: World, tmp_path: Path) -> None:
    config = tiny_run(layers=LAYERS, **LAYOUTS[name])
    config = config.model_copy(update={"run": config.run.model_copy(update={"max_skipped_steps": 3})})
    said = world(2).run(cases.meet_nan_for_ever, config, [poisoned(with_images(1)), text_only(2)], tmp_path)
    assert len(set(said)) == 1 and "got none in steps 1 to 3; no checkpoint was written" in said[0]


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("head norms apart", "tp2"),
        ("stream norms apart", "tp2 sequence parallel"),
        ("means of ranks", "dp2"),
        ("encoders apart", "tp2"),
        ("encoders averaged", "tp2"),
    ],
)
def test_a_planted_fault_is_seen(fault: str, name: str, world: World) -> None:
    trained = world(2).run(cases.train_ranks, run_of(name), mixed_steps(), fault)
    with pytest.raises(AssertionError):
        assert_same_run(trained, reference(mixed_steps))


@pytest.mark.parametrize("name", ["dp2", "dp2 zero2", "dp2 zero3"])
def test_a_parameter_without_gradient_on_one_rank_is_seen(name: str, world: World) -> None:
    """The losses are right then, and what ranks reduce no longer fits together."""
    with pytest.raises(RanksFailed, match="in train_step"):
        world(2).run(cases.train_ranks, run_of(name), mixed_steps(), "coda without gradient", limit_seconds=15.0)


@pytest.mark.parametrize("name", ["dp2", "tp2", "dp2 zero2", "dp2 zero3"])
def test_bfloat16_learns_what_float32_learns(name: str, world: World) -> None:
    steps = mixed_steps()[:1] * 8
    plain = cases.train_plain(tiny_run(layers=LAYERS), steps)
    config = tiny_run(layers=LAYERS, dtype="bfloat16", **LAYOUTS[name])
    trained = world(2).run(cases.train_ranks, config, steps)
    assert trained[0].losses == trained[1].losses
    assert trained[0].losses[-1] < 0.8 * trained[0].losses[0]
    np.testing.assert_allclose(trained[0].losses, plain.losses, rtol=BFLOAT16_LOSS)


def test_no_group_waits_longer_than_the_config_says(world: World) -> None:
    config = run_of("tp2 cp2")
    for patience in world(4).run(cases.patience_of_groups, config):
        assert set(patience.values()) == {config.parallel.timeout_seconds}, patience
