"""The forward on meta tensors: they hold no numbers, so whatever asks the host for one raises.

On a GPU such a question stops the queue. Meta tensors take the GPU's paths. Not shown: BLT's maximum over patches, for
which torch has no meta kernel (with `unsafe` it asks nothing), and FlexAttention, which is put aside.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from matformer.config.schema import RunConfig
from matformer.data.packing import Piece, Place, draw_training_noise, pack_batch
from matformer.layers.block_attention import BlockCore
from matformer.parcels import Batch
from tests.made import (
    LENGTH,
    as_diffused,
    audio,
    document,
    image,
    masked_batch,
    plain_host,
    text_only,
    tiny_run,
    with_both,
    with_media,
)

META = torch.device("meta")
MEDIA: dict[str, dict[str, Any]] = {
    "next latents": {"objective": "next_latent", "next_latent": {"noises": 3, "predicts": "ddpm_v"}},
    "token, dit, u-net": {"time_conditioning": "token", "coda": "dit", "unet_width": 4},
    "adaln at the ends": {"time_conditioning": "adaln_preludio_coda", "loss_weighting": "min_snr"},
    "adaln in the Atto": {"time_conditioning": "adaln_atto", "objective": "ddpm_eps"},
    "budget": {"patch": 1, "budget": {"share": 0.5, "levels": 2}},
    "budget on noised copies": {"patch": 1, "budget": {"share": 0.5, "levels": 2, "noised_tree": "own"}},
}


@pytest.fixture(autouse=True)
def flex_attention_put_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(self: BlockCore, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query + (key.sum() + value.sum())

    monkeypatch.setattr(BlockCore, "attend", answered)


def run_forward_and_back(run: RunConfig, batch: Batch) -> None:
    """All losses and their gradients, on meta."""
    model = plain_host(run).model.to(META)
    moved = batch.to(META)
    sums = model(moved)
    assert all(value.is_meta for value in sums.values())
    torch.stack([value.sum() for value in sums.values()]).sum().backward()


def media_batch(run: RunConfig) -> Batch:
    one = document("1", b"a red square", image(1), b"then", audio(1), b"end")
    pieces = [[Piece(one, Place(), Place(len(one.spans)))]]
    draw = draw_training_noise(seed=0, step=0, lane=0, blind_probability=0.3, time_shift=1.0)
    return pack_batch(pieces, [draw], model=run.model, sequence_latents=2 * LENGTH)


@pytest.mark.parametrize("make", [text_only, with_both])
def test_text_and_media_ask_the_host_nothing(make: Any) -> None:  # noqa: ANN401 - a maker of batches
    run_forward_and_back(tiny_run(), make(1))


@pytest.mark.parametrize("objective", ["masked_diffusion", "block_diffusion"])
def test_diffused_text_asks_nothing(objective: str) -> None:
    run = tiny_run()
    run = run.model_copy(update={"model": as_diffused(run.model, objective)})
    batch = masked_batch([document("a", b"some text here", image(1), b"x")], model=run.model, number=1)
    run_forward_and_back(run, batch)


@pytest.mark.parametrize("keys", MEDIA.values(), ids=MEDIA)
def test_media_of_every_sort_ask_nothing(keys: dict[str, Any]) -> None:
    run = tiny_run()
    run = run.model_copy(update={"model": with_media(run.model, **keys)})
    run_forward_and_back(run, media_batch(run))


def test_a_question_to_the_host_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matformer.layers.segments.segment_lengths", counted_by_torch)
    with pytest.raises(NotImplementedError, match="bincount"):
        run_forward_and_back(tiny_run(), text_only(1))


def counted_by_torch(segment_U: Tensor, *, num_segments: int) -> Tensor:
    """The planted fault: as torch counts, which on a GPU waits for the answer's length."""
    return torch.bincount(segment_U, minlength=num_segments)
