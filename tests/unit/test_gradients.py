"""Gradients of each loss on the Atto's layers: against autograd by hand, and without any trace in the run."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from matformer.config.check import check
from matformer.config.schema import RunConfig
from matformer.engine.gradients import gradient_row, part_gradients, relations
from matformer.engine.step import global_counts, loss_weights, metrics_row, optimizer_step
from matformer.errors import ConfigError
from matformer.hosts.plain import PlainHost
from matformer.parcels import Batch
from tests.made import plain_host, text_only, tiny_run, with_audio, with_both, with_images

PARTS = ("text", "image", "audio", "router")


@cache
def batches() -> tuple[Batch, ...]:
    return with_both(1), text_only(2), with_images(3), with_audio(4)


def by_hand(host: PlainHost, config: RunConfig, name: str) -> dict[int, Tensor]:
    """Layer -> the gradient of weight * sum / count of one part, the count over all microbatches."""
    host.model.zero_grad()
    found: dict[str, Tensor] = {}
    count = sum(batch.counts()[name] for batch in batches())
    for batch in batches():
        loss = host.model(batch)[name].sum() * loss_weights(config)[name] / count
        loss.backward()
    for parameter_name, parameter in host.model.named_parameters():
        found[parameter_name] = parameter.grad.clone() if parameter.grad is not None else torch.zeros(())
    return {
        layer: torch.cat([g.flatten() for key, g in found.items() if key.startswith(f"atto.layers.{layer}.")])
        for layer in range(config.model.atto.layers)
    }


def test_cosines_and_ratios_are_those_of_autograd_by_hand() -> None:
    config = tiny_run()
    host = plain_host(config)
    row = gradient_row(host, batches(), config=config)
    gradients = {name: by_hand(host, config, name) for name in PARTS}
    gradients["media"] = {layer: gradients["image"][layer] + gradients["audio"][layer] for layer in range(2)}
    for a, b in [*itertools.combinations(("text", "image", "audio", "router"), 2), ("text", "media")]:
        a_whole, b_whole = (torch.cat(list(gradients[name].values())) for name in (a, b))
        vectors = {f"layer_{n:02d}": (gradients[a][n], gradients[b][n]) for n in range(2)} | {
            "atto": (a_whole, b_whole)
        }
        for place, (first, second) in vectors.items():
            cosine = float(torch.nn.functional.cosine_similarity(first, second, dim=0))
            ratio = float(first.norm() / second.norm())
            assert row[f"gradients/{place}/{a}_{b}_cosine"] == pytest.approx(cosine, abs=1e-5), (place, a, b)
            assert row[f"gradients/{place}/{a}_{b}_norm_ratio"] == pytest.approx(ratio, rel=1e-4), (place, a, b)


def test_gradients_of_the_parts_sum_to_the_steps_gradient() -> None:
    config = tiny_run()
    host = plain_host(config)
    counts, weights = global_counts(batches(), host.groups), loss_weights(config)
    vectors = part_gradients(host, batches(), counts=counts, weights=weights)
    optimizer_step(host, batches(), config=config, step=0)  # clip is 0: .grad keeps what backward gave
    for index, weight in enumerate(host.layer_weights()):
        total = torch.stack([vector[index] for vector in vectors]).sum(0)
        assert weight.parameter.grad is not None
        torch.testing.assert_close(total, weight.parameter.grad, rtol=1e-4, atol=1e-6 * float(total.abs().max()))


def test_a_self_cosine_is_between_even_and_odd_microbatches() -> None:
    config = tiny_run()
    host = plain_host(config)
    again = gradient_row(host, [with_both(1), with_both(1)], config=config)
    assert again["gradients/atto/text_self_cosine"] == pytest.approx(1.0, abs=1e-6)
    apart = gradient_row(host, batches(), config=config)
    assert -1.0 <= apart["gradients/atto/text_self_cosine"] < 0.999
    alone = gradient_row(host, [with_both(1)], config=config)
    assert not [key for key in alone if key.endswith("self_cosine")]


def test_what_a_batch_lacks_has_no_key() -> None:
    config = tiny_run()
    row = gradient_row(plain_host(config), [text_only(1), text_only(2)], config=config)
    assert row and not [key for key in row if "image" in key or "audio" in key or "media" in key]


def test_a_run_is_the_same_bit_for_bit_with_and_without() -> None:
    config = tiny_run(train={"clip": 1.0})
    losses, weights = [], []
    for looks in (False, True):
        host = plain_host(config)
        rows = []
        for step in range(3):
            if looks:
                assert gradient_row(host, batches(), config=config)
            rows.append(metrics_row(optimizer_step(host, batches(), config=config, step=step), config))
        losses.append(rows)
        weights.append({name: value.clone().numpy() for name, value in host.state().weights.items()})
    assert losses[0] == losses[1]
    assert all(np.array_equal(value, weights[1][name]) for name, value in weights[0].items())


def test_relations_of_products_written_out() -> None:
    # text (3, 0) in the first half and (0, 4) in the second; image (0, 1) and (0, 1); audio (0, 2) and (0, 0)
    vector_NF = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 1.0], [0.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    found = relations((vector_NF @ vector_NF.T).tolist(), ("text", "image", "audio"), media=("image", "audio"))
    assert found["text_image_cosine"] == pytest.approx(0.8)  # (3, 4) and (0, 2)
    assert found["text_image_norm_ratio"] == pytest.approx(2.5)
    assert found["text_media_norm_ratio"] == pytest.approx(5 / 4)  # (0, 4)
    assert found["image_self_cosine"] == pytest.approx(1.0) and found["text_self_cosine"] == pytest.approx(0.0)
    assert np.isnan(found["audio_self_cosine"])
    assert "image_media_cosine" not in found


@pytest.mark.parametrize("layout", [{"pp": 2}, {"dp": 2, "zero_stage": 3}])
def test_a_layout_that_has_no_gradient_of_its_own_is_refused(layout: dict[str, Any]) -> None:
    made = tiny_run(**layout)
    run = made.run.model_copy(update={"gradients_every_steps": 5})
    with pytest.raises(ConfigError, match=r"parallel\.pp must be 1 .* change run\.gradients_every_steps"):
        check(made.model_copy(update={"run": run}))
