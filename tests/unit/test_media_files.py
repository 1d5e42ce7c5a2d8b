"""Files that a user brings are prepared as the data were."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from data_prep import pictures
from matformer.autoencoders import MDCTPCA, PatchPCA
from matformer.autoencoders.from_diffusers import DiffusersAutoencoder
from matformer.autoencoders.patch_pca import to_signed
from matformer.autoencoders.preparation import Preparation
from matformer.autoencoders.sound import levelled, resampled, trimmed
from matformer.config.schema import MediaConfig
from matformer.data.latents import Normalisation
from matformer.engine.media import MediaCodec
from matformer.errors import DataError
from tests.made import tiny_diffusers

DRAWS = np.random.default_rng(0)
NORMALISATION = Normalisation(DRAWS.standard_normal(192), np.full(192, 0.5))


def picture_codec() -> MediaCodec:
    media = MediaConfig(channels=192, rank=2, patch=2, buckets=((8, 8),), coda_width=8)
    autoencoder = PatchPCA(factor=8, channels=192)
    preparation = Preparation.of(autoencoder, buckets=media.buckets)
    return MediaCodec("image", media, autoencoder, NORMALISATION, preparation)


def sound_codec() -> MediaCodec:
    media = MediaConfig(channels=8, rank=1, patch=4, buckets=((32,), (64,)), coda_width=8)
    autoencoder = MDCTPCA(hop=160, channels=8, sample_rate=8000)
    preparation = Preparation.of(
        autoencoder, buckets=media.buckets, keys={"buckets": "model.media.audio.buckets"}
    )  # fmt: skip
    return MediaCodec("audio", media, autoencoder, Normalisation(np.zeros(8), np.full(8, 2.0)), preparation)


def test_a_picture_is_framed_as_the_data_and_comes_back(tmp_path: Path) -> None:
    path, codec = tmp_path / "in.png", picture_codec()
    Image.fromarray(DRAWS.integers(0, 256, (90, 41, 4), dtype=np.uint8)).save(path)
    framed = torch.from_numpy(pictures.framed(path.read_bytes()).copy()).movedim(2, 0)
    span = codec.read(path)
    latent = codec.autoencoder.encode(to_signed(framed[None])).mean[0].half().float().numpy()
    assert np.allclose(span.latent, codec.normalisation.forward(latent), atol=1e-6)
    codec.write(tmp_path / "out.png", codec.decode(span.latent))
    back = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert np.abs(back - framed.movedim(0, 2).numpy().astype(int)).max() <= 1


@pytest.mark.parametrize("rate", [8000, 22050])
def test_a_sound_is_prepared_as_the_data(tmp_path: Path, rate: int) -> None:
    path, codec = tmp_path / "in.wav", sound_codec()
    wave = np.zeros((rate, 2), np.float32)
    wave[2000:6000] = np.sin(np.arange(4000) * 2000 / rate)[:, None] * 0.3
    soundfile.write(path, wave, rate, subtype="FLOAT")
    whole = wave.mean(1) if rate == 8000 else resampled(wave.mean(1), rate=rate, to=8000)
    prepared = levelled(trimmed(whole))
    span = codec.read(path)
    size = next(size for size in (31 * 160, 63 * 160) if size >= len(prepared))
    padded = torch.from_numpy(np.pad(prepared, (0, size - len(prepared))))[None, None]
    want = codec.autoencoder.encode(padded).mean[0].half().float().numpy() * 2.0
    assert span.latent.shape == (8, size // 160 + 1) and span.role == "given"
    assert np.allclose(span.latent, want, atol=1e-3)


def test_all_channels_of_a_sound_are_written_and_one_stays_mono(tmp_path: Path) -> None:
    stereo = DiffusersAutoencoder(tiny_diffusers("AutoencoderOobleck"))
    media = MediaConfig(channels=4, rank=1, patch=4, buckets=((32,),), coda_width=8)
    preparation = Preparation.of(stereo, buckets=media.buckets)
    codec = MediaCodec("audio", media, stereo, Normalisation(np.zeros(4), np.ones(4)), preparation)
    time = np.arange(256)
    for of, wave in ((codec, np.stack([np.sin(time / 9), np.cos(time / 5)])), (sound_codec(), np.sin(time / 9)[None])):
        of.write(tmp_path / "out.wav", torch.from_numpy(wave).float())
        back, rate = soundfile.read(tmp_path / "out.wav", always_2d=True)
        assert rate == 8000 and back.shape == wave.T.shape
        assert np.abs(back - wave.T).max() < 1e-4


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    for codec, shape in ((picture_codec(), (3, 64, 64)), (sound_codec(), (1, 160))):
        media = torch.zeros(shape)
        media[0, 0] = torch.nan
        with pytest.raises(DataError, match=f"a medium of {codec.modality} must be finite to be written"):
            codec.write(tmp_path / f"out{codec.suffix}", media)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_or_is_too_long_is_one_sentence(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("nothing of the kind")
    for codec, reason in ((picture_codec(), "pillow"), (sound_codec(), "libsndfile")):
        with pytest.raises(DataError, match=reason):
            codec.read(bad)
    for seconds, reason in ((2.0, "at most 1.26 s.*model.media.audio.buckets$"), (0.0, "louder")):
        stream = io.BytesIO()
        wave = np.full(int(8000 * seconds) + 1, 0.5 * (seconds > 0), np.float32)
        soundfile.write(stream, wave, 8000, format="WAV")
        bad.write_bytes(stream.getvalue())
        with pytest.raises(DataError, match=reason):
            sound_codec().read(bad)


def test_a_photograph_stands_as_its_camera_was_held(tmp_path: Path) -> None:
    upright, exif = Image.fromarray(DRAWS.integers(0, 256, (64, 64, 3), dtype=np.uint8)), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.save(tmp_path / "upright.png")
    upright.rotate(90).save(tmp_path / "turned.png", exif=exif)
    codec = picture_codec()
    assert np.array_equal(codec.read(tmp_path / "turned.png").latent, codec.read(tmp_path / "upright.png").latent)


def test_a_damaged_picture_is_one_sentence_that_names_it(tmp_path: Path) -> None:
    path, stream, codec = tmp_path / "in.png", io.BytesIO(), picture_codec()
    Image.fromarray(DRAWS.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, format="png")
    whole = stream.getvalue()
    no_number = whole.index(b"IDAT")
    for damaged in (whole[:200], whole[:no_number] + b"\x00" * 4 + whole[no_number + 4 :], whole[:16] + bytes(8)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"^{path}: a picture must be a whole file that pillow opens") as found:
            codec.read(path)
        assert "\n" not in str(found.value)


def test_an_array_of_the_shape_is_taken_as_it_is_and_nan_is_not(tmp_path: Path) -> None:
    path, codec = tmp_path / "in.npy", picture_codec()
    pixels = DRAWS.uniform(-1, 1, (3, 64, 64)).astype(np.float32)
    np.save(path, pixels)
    expected = codec.encode(torch.from_numpy(pixels)).latent
    assert np.array_equal(codec.read(path).latent, expected)
    for wrong, reason in (
        (pixels * np.nan, "latents must be finite"), (pixels[:, :8], "got shape .* of float32"),
        (np.full((3, 64, 64), "x"), "must hold real numbers"),
    ):  # fmt: skip
        np.save(path, wrong)
        with pytest.raises(DataError, match=reason):
            codec.read(path)
