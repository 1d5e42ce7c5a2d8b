"""Closed-form autoencoders: exact where they keep everything, best where they do not, and the same after a reload."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from matformer.autoencoders import MDCTPCA, ConvolutionalAutoencoder, PatchPCA, load_autoencoder
from matformer.autoencoders.base import SETTINGS_FILE, WEIGHTS_FILE
from matformer.autoencoders.convolutional import Medium
from matformer.autoencoders.mdct_pca import inverse_mdct, mdct, mdct_matrix
from matformer.autoencoders.patch_pca import to_pixels, to_signed
from matformer.errors import DataError


def smooth_pictures(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return (torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear") * 255).to(torch.uint8)


def tones(count: int) -> list[Tensor]:
    time = torch.arange(4000) / 8000
    return [torch.sin(2 * torch.pi * (200 + 90 * i) * time) for i in range(count)]


def test_mdct_gives_every_sample_back() -> None:
    matrix = mdct_matrix(16)
    wave = torch.randn(2, 16 * 9, generator=torch.Generator().manual_seed(1))
    frames = mdct(wave, matrix=matrix)
    assert frames.shape == (2, 10, 16)
    torch.testing.assert_close(inverse_mdct(frames, matrix=matrix), wave, atol=1e-5, rtol=0)


def test_mdct_keeps_the_energy() -> None:
    wave = torch.randn(1, 160 * 7, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(mdct(wave, matrix=mdct_matrix(160)).square().sum(), wave.square().sum())


def test_mdct_of_hop_two_is_the_written_out_matrix() -> None:
    # cos(pi/2 * (k + 1/2) * (n + 3/2)) * sin(pi/4 * (n + 1/2)), k = 0, 1 and n = 0..3
    expected = torch.tensor(
        [[0.1464466, -0.3535534, -0.8535534, -0.3535534], [-0.3535534, 0.8535534, -0.3535534, -0.1464466]]
    )
    torch.testing.assert_close(mdct_matrix(2), expected)


def test_all_channels_of_patch_pca_lose_nothing() -> None:
    pixels = smooth_pictures(8)
    autoencoder = PatchPCA.fit(pixels, factor=4, channels=48)
    assert torch.equal(to_pixels(autoencoder(to_signed(pixels))), pixels)


def test_patch_pca_channels_are_uncorrelated_and_fall_in_variance() -> None:
    pixels = smooth_pictures(32)
    latent = PatchPCA.fit(pixels, factor=4, channels=6).encode(to_signed(pixels)).mean
    assert latent.shape == (32, 6, 4, 4)
    covariance = torch.cov(latent.movedim(1, 0).flatten(1))
    variance = covariance.diagonal()
    assert (variance[:-1] >= variance[1:]).all()
    assert (covariance - variance.diag()).abs().max() < 1e-3 * variance[0]


def test_patch_pca_error_is_the_variance_it_left_out() -> None:
    media = to_signed(smooth_pictures(32))
    small = PatchPCA.fit(smooth_pictures(32), factor=4, channels=5)
    full = PatchPCA.fit(smooth_pictures(32), factor=4, channels=48)
    left_out = full.encode(media).mean[:, 5:].square().sum()
    torch.testing.assert_close((small(media) - media).square().sum(), left_out, rtol=1e-3, atol=1e-3)


def test_silence_is_zero_in_every_channel() -> None:
    autoencoder = MDCTPCA.fit(tones(4), hop=160, channels=8, sample_rate=8000)
    assert autoencoder.encode(torch.zeros(1, 1, 800)).mean.count_nonzero() == 0


def test_sound_of_the_fit_is_coded_well_by_few_channels() -> None:
    waves = tones(3)
    autoencoder = MDCTPCA.fit(waves, hop=160, channels=40, sample_rate=8000)
    latent = autoencoder.encode(waves[1][None, None]).mean
    assert latent.shape[2] == autoencoder.num_cells(4000) == 26
    error = (autoencoder.decode(latent)[0, 0] - waves[1]).square().mean()
    assert 10 * torch.log10(waves[1].square().mean() / error) > 20


@pytest.mark.parametrize("which", ["patch_pca", "mdct_pca"])
def test_saved_and_loaded_is_the_same_autoencoder(which: str, tmp_path: Path) -> None:
    made = {
        "patch_pca": PatchPCA.fit(smooth_pictures(8), factor=4, channels=6),
        "mdct_pca": MDCTPCA.fit(tones(3), hop=160, channels=12, sample_rate=8000),
    }[which]
    made.save(tmp_path)
    loaded = load_autoencoder(tmp_path, fingerprint=made.fingerprint)
    assert type(loaded) is type(made)
    media = to_signed(smooth_pictures(2)) if which == "patch_pca" else tones(1)[0][None, None]
    assert torch.equal(loaded(media), made(media))


def test_fit_twice_gives_one_fingerprint_and_other_data_another() -> None:
    first, again = (PatchPCA.fit(smooth_pictures(8), factor=4, channels=6) for _ in range(2))
    other = PatchPCA.fit(smooth_pictures(9), factor=4, channels=6)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_changed_weight_file_is_refused(tmp_path: Path) -> None:
    made = PatchPCA.fit(smooth_pictures(8), factor=4, channels=6)
    made.save(tmp_path)
    damaged = bytearray((tmp_path / WEIGHTS_FILE).read_bytes())
    damaged[-1] ^= 64
    (tmp_path / WEIGHTS_FILE).write_bytes(damaged)
    with pytest.raises(DataError, match="fingerprint"):
        load_autoencoder(tmp_path, fingerprint=made.fingerprint)
    (tmp_path / WEIGHTS_FILE).write_bytes(damaged[:40])
    with pytest.raises(DataError, match="readable"):
        load_autoencoder(tmp_path)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(DataError, match="multiples of 4"):
        PatchPCA(factor=4, channels=6).encode(torch.zeros(1, 3, 10, 16))
    with pytest.raises(DataError, match="1 to 48 channels"):
        PatchPCA(factor=4, channels=49)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("[]", "must hold a readable"),
        ('{"kind": "patch_pca"}', "must hold a readable"),
        ('{"kind": "patch_pca", "settings": 3}', "must hold a readable"),
        ('{"kind": ["patch_pca"], "settings": {}}', "must be one of"),
        ('{"kind": "patch_pca", "settings": {"factor": 8}}', "must hold the settings of patch_pca"),
        ('{"kind": "patch_pca", "settings": {"factor": 8, "channels": 4, "x": 1}}', "must hold the settings of"),
        ('{"kind": "patch_pca", "settings": {"factor": "8", "channels": 4}}', "must hold the settings of patch_pca"),
    ],
)
def test_damaged_settings_are_one_sentence(settings: str, reason: str, tmp_path: Path) -> None:
    PatchPCA(factor=8, channels=4).save(tmp_path)
    (tmp_path / SETTINGS_FILE).write_text(settings)
    with pytest.raises(DataError, match=reason):
        load_autoencoder(tmp_path)


def test_an_untrained_convolutional_one_is_the_closed_form_one() -> None:
    pixels = smooth_pictures(8)
    closed = PatchPCA.fit(pixels, factor=4, channels=6)
    made = ConvolutionalAutoencoder.fit(list(pixels), medium="image", size=4, channels=6, width=8, blocks=1)
    made.set_gains(to_signed(pixels))
    moments = made.encode(to_signed(pixels))
    torch.testing.assert_close(moments.mean, closed.encode(to_signed(pixels)).mean)
    assert moments.logvar is not None and moments.logvar.shape == moments.mean.shape
    torch.testing.assert_close(made(to_signed(pixels)), closed(to_signed(pixels)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("medium", ["image", "audio"])
@torch.no_grad()
def test_a_convolutional_one_comes_back_from_its_folder(medium: Medium, tmp_path: Path) -> None:
    rate, raw = (None, list(smooth_pictures(4))) if medium == "image" else (8000, tones(4))
    made = ConvolutionalAutoencoder.fit(raw, medium=medium, size=4, channels=3, width=8, blocks=1, sample_rate=rate)
    for parameter in made.parameters():
        parameter.add_(0.1)
    made.save(tmp_path)
    loaded = load_autoencoder(tmp_path, fingerprint=made.fingerprint)
    media = to_signed(smooth_pictures(2)) if medium == "image" else tones(1)[0][None, None]
    assert torch.equal(loaded(media), made(media)) and loaded.modality == medium
    grid = tuple(loaded.encode(media).mean.shape[2:])
    assert loaded.media_axes(grid) == tuple(media.shape[2:])


def test_closed_form_ones_say_what_a_manifest_needs() -> None:
    identity = MDCTPCA(hop=160, channels=8, sample_rate=8000).identity()
    assert {key: identity[key] for key in ("kind", "channels", "downsampling", "media_channels", "sample_rate")} == {
        "kind": "mdct_pca", "channels": 8, "downsampling": [160], "media_channels": 1, "sample_rate": 8000,
    }  # fmt: skip
    assert PatchPCA(factor=4, channels=6).media_axes((8, 16)) == (32, 64)
