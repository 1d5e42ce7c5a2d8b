"""Autoencoders of diffusers behind our interface: random ones, saved and loaded, equal what diffusers itself gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from matformer.autoencoders import load_autoencoder
from matformer.errors import DataError
from tests.made import tiny_diffusers

SHAPES = {
    "AutoencoderKL": (3, 16, 32),
    "AutoencoderDC": (3, 16, 16),
    "AutoencoderKLWan": (3, 5, 16, 16),
    "AutoencoderOobleck": (2, 64),
}
GRIDS = {
    "AutoencoderKL": (4, 8, 16),
    "AutoencoderDC": (4, 8, 8),
    "AutoencoderKLWan": (4, 2, 4, 4),
    "AutoencoderOobleck": (4, 8),
}
ALL = sorted(SHAPES)


def media_of(name: str) -> Tensor:
    return torch.rand(2, *SHAPES[name], generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(ours: Tensor, theirs: Tensor) -> None:
    """Weights read from a file lie elsewhere in memory, and the kernels' rounding depends on that."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_encode_and_decode_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    theirs: Any = tiny_diffusers(name)
    theirs.save_pretrained(tmp_path)
    ours, media = load_autoencoder(tmp_path), media_of(name)
    moments, coded = ours.encode(media), theirs.encode(media)
    if name == "AutoencoderDC":
        assert moments.logvar is None and not ours.stochastic
        close(moments.mean, coded.latent)
    else:
        assert moments.logvar is not None and ours.stochastic
        close(moments.mean, coded.latent_dist.mean)
        close(moments.logvar.exp().sqrt(), coded.latent_dist.std)
    close(ours.decode(moments.mean), theirs.decode(moments.mean).sample)
    assert moments.mean.shape[1:] == GRIDS[name] and ours.channels == GRIDS[name][0]
    assert ours.media_axes(GRIDS[name][1:]) == SHAPES[name][1:] and ours.media_channels == SHAPES[name][0]


@pytest.mark.parametrize("name", ALL)
def test_saved_again_it_has_the_same_fingerprint_and_other_weights_another(name: str, tmp_path: Path) -> None:
    tiny_diffusers(name).save_pretrained(tmp_path / "first")
    first = load_autoencoder(tmp_path / "first")
    first.save(tmp_path / "again")
    load_autoencoder(tmp_path / "again", fingerprint=first.fingerprint)
    tiny_diffusers(name, seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="fingerprint"):
        load_autoencoder(tmp_path / "other", fingerprint=first.fingerprint)


def test_a_setting_that_changes_no_weight_changes_the_fingerprint(tmp_path: Path) -> None:
    tiny_diffusers("AutoencoderKL").save_pretrained(tmp_path)
    before = load_autoencoder(tmp_path).fingerprint
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"norm_num_groups": 4}))
    assert load_autoencoder(tmp_path).fingerprint != before
    # what a newer diffusers writes beside, at its default, does not
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"_diffusers_version": "99", "mid_block_add_attention": True})
    )
    assert load_autoencoder(tmp_path).fingerprint == before


def test_manifests_say_how_its_makers_normalise(tmp_path: Path) -> None:
    tiny_diffusers("AutoencoderKL").save_pretrained(tmp_path / "kl")
    identity = load_autoencoder(tmp_path / "kl").identity()
    assert identity["kind"] == "diffusers.AutoencoderKL" and identity["downsampling"] == [2, 2]
    assert identity["scale"] == [0.18215] and identity["shift"] == [0.0]
    tiny_diffusers("AutoencoderKLWan").save_pretrained(tmp_path / "wan")
    wan = load_autoencoder(tmp_path / "wan")
    assert wan.modality == "video" and wan.shift == (0.0, 1.0, 2.0, 3.0) and wan.scale == (0.5,) * 4
    tiny_diffusers("AutoencoderOobleck").save_pretrained(tmp_path / "oobleck")
    oobleck = load_autoencoder(tmp_path / "oobleck")
    assert oobleck.modality == "audio" and oobleck.sample_rate == 8000 and oobleck.scale is None


@pytest.mark.parametrize("name", ALL)
def test_media_that_are_no_whole_cells_are_refused(name: str, tmp_path: Path) -> None:
    tiny_diffusers(name).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="multiples of"):
        load_autoencoder(tmp_path).encode(media_of(name)[..., :-1])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("damage", ["missing", "mismatched"])
def test_a_tensor_that_a_folder_lacks_is_not_drawn_anew(name: str, damage: str, tmp_path: Path) -> None:
    tiny_diffusers(name).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    victim = next(key for key in tensors if key.startswith("encoder") and "weight" in key)
    taken = tensors.pop(victim)
    if damage == "mismatched":
        tensors[victim] = torch.cat([taken, taken])
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"must (hold every tensor|be a whole folder).*{victim}"):
        load_autoencoder(tmp_path)


def test_what_is_no_autoencoder_of_ours_is_one_sentence(tmp_path: Path) -> None:
    tiny_diffusers("AutoencoderKL").save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match=r"must be a whole folder of AutoencoderKL\.save_pretrained"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(DataError, match=r"must be one of .*got UNet2DModel"):
        load_autoencoder(tmp_path)
