"""Encoding: what is written is what the autoencoder gives; bad samples are named and nothing else is lost."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
import torch
from PIL import Image

from data_prep import accept_autoencoder, encode_latents, encode_part
from data_prep.accept_autoencoder import main as accept
from data_prep.encode_latents import main as encode
from data_prep.media_items import parts_of
from data_prep.working_folder import working_folder
from matformer.autoencoders import MDCTPCA, MotionField, PatchPCA, load_autoencoder
from matformer.autoencoders.acceptance import Acceptance, read_acceptance
from matformer.autoencoders.from_diffusers import DiffusersAutoencoder
from matformer.autoencoders.preparation import Preparation, as_media
from matformer.config.schema import DataConfig, MediaConfig, ModelConfig, SourceConfig
from matformer.data.shards import ShardReader
from matformer.data.sources import MediaSpan, open_source
from matformer.engine.media import MediaCodec, load_codec
from matformer.errors import DataError
from tests.made import tiny_diffusers, tiny_model, tiny_run

COUNT = 12
RATE = 8000


class Killed(BaseException):
    """What ends a process, as far as the code under test can see."""


def picture(number: int, *, size: tuple[int, int] = (32, 32)) -> bytes:
    draws = np.random.default_rng(number)
    coarse = Image.fromarray(draws.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(stream, format="png")
    return stream.getvalue()


def tone(number: int, *, loud: float = 0.3) -> bytes:
    time = np.arange(2400) / RATE
    stream = io.BytesIO()
    soundfile.write(stream, loud * np.sin(2 * np.pi * (200 + 40 * number) * time), RATE, format="wav", subtype="PCM_16")
    return stream.getvalue()


def write_files(folder: Path, *, suffix: str, of: Callable[[int], bytes], count: int = COUNT) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"s{number:02d}{suffix}").write_bytes(of(number))
        (folder / f"s{number:02d}.txt").write_text(f"sample {number}")
    return folder


def write_tar(path: Path, *, suffix: str, of: Callable[[int], bytes], count: int = COUNT) -> Path:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            for ending, data in ((suffix, of(number)), (".txt", f"sample {number}".encode())):
                info = tarfile.TarInfo(f"t{number:02d}{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path.parent


def pca(folder: Path) -> Path:
    pixels = [torch.from_numpy(np.array(Image.open(io.BytesIO(picture(i))))).movedim(2, 0) for i in range(COUNT)]
    PatchPCA.fit(torch.stack(pixels), factor=8, channels=24).save(folder)
    return folder


def mdct(folder: Path) -> Path:
    waves = [torch.from_numpy(soundfile.read(io.BytesIO(tone(i)), dtype="float32")[0]) for i in range(COUNT)]
    MDCTPCA.fit(waves, hop=160, channels=40, sample_rate=RATE).save(folder)
    return folder


def asked(coder: Path, data: Path, buckets: str) -> list[str]:
    return ["--autoencoder", str(coder), "--data", str(data), "--buckets", buckets]


def run(coder: Path, data: Path, out: Path, *more: str, buckets: str = "4x4") -> int:
    return encode([*asked(coder, data, buckets), "--out", str(out), "--processes", "1", "--heldout-one-in", "3", *more])


def accepted(coder: Path, data: Path, *more: str, buckets: str = "4x4") -> Path:
    assert accept([*asked(coder, data, buckets), *more]) == 0
    return coder


def written(out: Path) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """key -> moments and json, of both splits."""
    found = {}
    for split in ("train", "heldout"):
        reader = ShardReader(out / split)
        for i in range(len(reader)):
            found[reader.key(i)] = (reader.array(i, "moments.npy"), json.loads(reader.read(i)["json"]))
    return found


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_files(tmp_path / "pictures", suffix=".png", of=picture)


def test_pictures_become_pairs_that_a_run_reads(pictures: Path, tmp_path: Path) -> None:
    coder = accepted(pca(tmp_path / "coder"), pictures)
    assert run(coder, pictures, tmp_path / "root" / "mine", "--batch", "5") == 0
    found, autoencoder = written(tmp_path / "root" / "mine"), load_autoencoder(coder)
    assert sorted(found) == [f"s{i:02d}" for i in range(COUNT)]
    for number in range(COUNT):
        moments, facts = found[f"s{number:02d}"]
        media = as_media([np.array(Image.open(io.BytesIO(picture(number)))).transpose(2, 0, 1)])
        assert moments.dtype == np.float16 and facts["bucket"] == [4, 4]
        np.testing.assert_allclose(moments, autoencoder.encode(media).mean[0].numpy(), atol=4e-3)
        assert facts["texts"] == [{"lang": "en", "text": f"sample {number}"}]
    train = ShardReader(tmp_path / "root" / "mine" / "train")
    assert train.manifest["kind"] == "mean" and train.manifest["languages"] == {"en": len(train)}
    cells = np.concatenate([train.array(i, "moments.npy").reshape(24, -1) for i in range(len(train))], 1).astype("f8")
    latents = train.manifest["latents"]
    np.testing.assert_allclose(latents["shift"], cells.mean(1), atol=1e-9)
    np.testing.assert_allclose(latents["scale"], cells.var(1).mean() ** -0.5)
    media = MediaConfig(channels=24, rank=2, patch=2, buckets=((4, 4),), coda_width=8)
    model = ModelConfig.model_validate(tiny_model().model_dump() | {"media": {"image": media.model_dump()}})
    source = SourceConfig(path="mine", form="pairs", weight=1.0, modality="image")
    data = DataConfig(
        root=str(tmp_path / "root"), recipe=None, lanes=1, sequence_latents=64, sources={"mine": source}
    )  # fmt: skip
    spans = open_source("mine", data=data, model=model, split="train").pick(0).spans
    assert any(isinstance(span, MediaSpan) and span.latent.shape == (24, 4, 4) for span in spans)
    kept = train.manifest["autoencoder"]
    load_autoencoder(tmp_path / "root" / kept["folder"], fingerprint=kept["fingerprint"])
    assert not list((tmp_path / "root").glob(".*"))


@pytest.mark.parametrize(("name", "buckets"), [("AutoencoderKL", "16x16"), ("AutoencoderDC", "16x16,16x32")])
def test_moments_or_means_of_diffusers_are_stored(name: str, buckets: str, pictures: Path, tmp_path: Path) -> None:
    tiny_diffusers(name).save_pretrained(tmp_path / "coder")
    coder = accepted(tmp_path / "coder", pictures, "--min-psnr", "-99", "--min-ssim", "-9", buckets=buckets)
    assert run(coder, pictures, tmp_path / "out", buckets=buckets) == 0
    manifest = ShardReader(tmp_path / "out" / "train").manifest
    stochastic = name == "AutoencoderKL"
    assert manifest["kind"] == ("moments" if stochastic else "mean") and len(manifest["latents"]["shift"]) == 4
    autoencoder = load_autoencoder(tmp_path / "out" / "autoencoder", fingerprint=manifest["autoencoder"]["fingerprint"])
    media = as_media([np.array(Image.open(io.BytesIO(picture(7)))).transpose(2, 0, 1)])
    with torch.no_grad():
        expected = autoencoder.encode(media)
    parts = [expected.mean] if expected.logvar is None else [expected.mean, expected.logvar]
    moments, _ = written(tmp_path / "out")["s07"]
    np.testing.assert_allclose(moments, torch.cat(parts, 1)[0].numpy(), rtol=2e-3, atol=2e-3)
    train = ShardReader(tmp_path / "out" / "train")
    variances = [np.exp(train.array(i, "moments.npy")[4:].astype("f8")).mean((1, 2)) for i in range(len(train))]
    if stochastic:
        np.testing.assert_allclose(manifest["latents"]["channel_noise"], np.mean(variances, 0), rtol=1e-9)
    else:
        assert "channel_noise" not in manifest["latents"]


def test_log_variances_are_clamped_before_they_are_stored(pictures: Path, tmp_path: Path) -> None:
    model = tiny_diffusers("AutoencoderKL")
    torch.nn.init.constant_(model.quant_conv.bias, 50.0)
    model.save_pretrained(tmp_path / "coder")
    coder = accepted(tmp_path / "coder", pictures, "--min-psnr", "-99", "--min-ssim", "-9", buckets="16x16")
    assert run(coder, pictures, tmp_path / "out", buckets="16x16") == 0
    assert all(
        moments[4:].max() <= 20 and moments[4:].min() >= -30 for moments, _ in written(tmp_path / "out").values()
    )


def test_sound_in_two_lengths_is_padded_with_silence(tmp_path: Path) -> None:
    data = write_files(tmp_path / "sounds", suffix=".wav", of=tone)
    coder = accepted(mdct(tmp_path / "coder"), data, buckets="8,32")
    assert run(coder, data, tmp_path / "out", buckets="8,32") == 0
    for moments, facts in written(tmp_path / "out").values():
        assert moments.shape == (40, 32) and facts["bucket"] == [32]
        assert np.abs(moments[:, 20:]).max() == 0 and np.abs(moments[:, :10]).max() > 0


def test_stereo_sound_by_oobleck(tmp_path: Path) -> None:
    data = write_files(tmp_path / "sounds", suffix=".wav", of=tone)
    tiny_diffusers("AutoencoderOobleck").save_pretrained(tmp_path / "coder")
    coder = accepted(tmp_path / "coder", data, "--max-mel", "999", "--level", "as-is", buckets="300,400")
    assert run(coder, data, tmp_path / "out", "--level", "as-is", buckets="300,400") == 0
    assert {moments.shape for moments, _ in written(tmp_path / "out").values()} == {(8, 300)}
    assert_read_as_encoded(tmp_path, "out", data, modality="audio", buckets=((300,), (400,)))


def test_video_by_wan(tmp_path: Path) -> None:
    av = pytest.importorskip("av")

    def clip(number: int) -> bytes:
        stream = io.BytesIO()
        with av.open(stream, "w", format="mp4") as container:
            track = container.add_stream("mpeg4", rate=8)
            track.width, track.height, track.pix_fmt = 32, 32, "yuv420p"
            for frame in range(7):
                pixels = np.full((32, 32, 3), 30 * frame + number, np.uint8)
                container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(track.encode())
        return stream.getvalue()

    data = write_files(tmp_path / "clips", suffix=".mp4", of=clip)
    tiny_diffusers("AutoencoderKLWan").save_pretrained(tmp_path / "coder")
    coder = accepted(tmp_path / "coder", data, "--min-psnr", "-99", "--min-ssim", "-9", buckets="2x8x8")
    assert run(coder, data, tmp_path / "out", buckets="2x8x8") == 0
    assert {moments.shape for moments, _ in written(tmp_path / "out").values()} == {(8, 2, 8, 8)}
    assert_read_as_encoded(tmp_path, "out", data, modality="video", buckets=((2, 8, 8),))
    slow = ("--min-psnr", "-99", "--min-ssim", "-9", "--fps", "4")
    accepted(tmp_path / "coder", data, *slow, buckets="1x8x8")
    assert run(coder, data, tmp_path / "slow", "--fps", "4", buckets="1x8x8") == 0
    assert_read_as_encoded(tmp_path, "slow", data, modality="video", buckets=((1, 8, 8),))
    preparation = Preparation.of(load_autoencoder(coder), buckets=[(2, 8, 8)])
    _, frames = preparation.read(clip(3), suffix=".mp4")
    assert frames.shape == (3, 5, 32, 32)
    np.testing.assert_allclose(frames.mean((0, 2, 3)), [3, 33, 63, 93, 123], atol=6)
    slower = Preparation.of(load_autoencoder(coder), buckets=[(1, 8, 8)], fps=4)
    assert slower.read(clip(3), suffix=".mp4")[1].shape == (3, 1, 32, 32)
    with pytest.raises(DataError, match="must be a whole file that FFmpeg opens"):
        preparation.read(clip(3)[:200], suffix=".mp4")
    with pytest.raises(DataError, match="must have at least 9 frames"):
        Preparation.of(load_autoencoder(coder), buckets=[(3, 8, 8)]).read(clip(3), suffix=".mp4")


def codec_of(root: Path, name: str, *, modality: str, buckets: tuple[tuple[int, ...], ...]) -> MediaCodec:
    """As sampling loads it, for a run on the data set ROOT/NAME."""
    channels = len(ShardReader(root / name / "train").manifest["latents"]["shift"])
    media = MediaConfig(channels=channels, rank=len(buckets[0]), patch=1, buckets=buckets, coda_width=8)
    model = ModelConfig.model_validate(tiny_model().model_dump() | {"media": {modality: media.model_dump()}})
    source = SourceConfig(path=name, form="pairs", weight=1.0, modality=modality)
    data = DataConfig(root=str(root), recipe=None, lanes=1, sequence_latents=64, sources={"mine": source})
    return load_codec(tiny_run().model_copy(update={"model": model, "data": data}), modality)


def assert_read_as_encoded(
    root: Path, name: str, files: Path, *, modality: str, buckets: tuple[tuple[int, ...], ...]
) -> None:
    """A file that is given to a model is what the data set ROOT/NAME holds of it, to the rounding of a batch."""
    codec, found = codec_of(root, name, modality=modality, buckets=buckets), written(root / name)
    assert codec.preparation.manifest() == ShardReader(root / name / "train").manifest["preparation"] | {
        "buckets": buckets, "axes": codec.preparation.axes,
    }  # fmt: skip
    for key in sorted(found)[:3]:
        (path,) = (path for path in files.glob(f"{key}.*") if path.suffix != ".txt")
        span = codec.read(path)
        mean = found[key][0][: codec.media.channels].astype(np.float32)
        np.testing.assert_allclose(codec.normalisation.inverse(span.latent), mean, atol=4e-3, rtol=4e-3)
        assert span.role == "given" and list(buckets[span.bucket]) == found[key][1]["bucket"]


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_picture_given_in_sampling_is_fitted_as_the_data_were(fit: str, tmp_path: Path) -> None:
    data = write_files(tmp_path / "wide", suffix=".png", of=lambda number: picture(number, size=(60, 32)))
    coder = pca(tmp_path / "coder")
    accept([*asked(coder, data, "4x4"), "--fit", fit, "--min-psnr", "-99", "--min-ssim", "-9"])
    assert run(coder, data, tmp_path / "out", "--fit", fit) == 0
    assert_read_as_encoded(tmp_path, "out", data, modality="image", buckets=((4, 4),))


@pytest.mark.parametrize("level", ["speech", "as-is"])
def test_a_sound_given_in_sampling_is_levelled_as_the_data_were(level: str, tmp_path: Path) -> None:
    data = write_files(tmp_path / "sounds", suffix=".wav", of=lambda number: tone(number, loud=0.03))
    coder = mdct(tmp_path / "coder")
    accept([*asked(coder, data, "16,32"), "--level", level, "--max-mel", "999"])
    assert run(coder, data, tmp_path / "out", "--level", level, buckets="16,32") == 0
    assert_read_as_encoded(tmp_path, "out", data, modality="audio", buckets=((16,), (32,)))


def test_what_does_not_fit_names_keys_of_the_run_in_sampling_and_options_in_preparation(tmp_path: Path) -> None:
    data = write_files(tmp_path / "pictures", suffix=".png", of=picture)
    coder = accepted(pca(tmp_path / "coder"), data, "--fit", "exact")
    assert run(coder, data, tmp_path / "out", "--fit", "exact") == 0
    path = tmp_path / "wide.png"
    path.write_bytes(picture(0, size=(48, 32)))
    with pytest.raises(DataError) as of_sampling:
        codec_of(tmp_path, "out", modality="image", buckets=((4, 4),)).read(path)
    assert str(of_sampling.value) == (
        f"{path}: a picture must have a height and width among [(32, 32)], got (32, 48); resize it, or change "
        "model.media.image.buckets"
    )
    with pytest.raises(DataError, match=r"resize it, or change --buckets or --fit$"):
        Preparation.of(load_autoencoder(coder), buckets=[(4, 4)], fit="exact").read(path.read_bytes(), suffix=".png")


def spoil(data: Path, *, picture_of: Callable[[int], bytes] = picture) -> None:
    """Four bad samples beside the good ones."""
    (data / "s03.png").write_bytes(picture_of(3)[:150])  # truncated
    array = np.zeros((3, 8, 8), np.float32)
    (data / "s04.png").unlink()
    np.save(data / "s04.npy", array)  # a wrong shape
    (data / "s05.png").unlink()
    np.save(data / "s05.npy", np.full((3, 32, 32), np.nan, np.float32))  # nan latents
    (data / "s06.txt").write_text("")  # no caption


@pytest.mark.parametrize("form", ["folder", "shard"])
def test_bad_pictures_are_named_counted_and_skipped_and_nothing_else(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_files(tmp_path / "good", suffix=".png", of=picture)
    coder = accepted(pca(tmp_path / "coder"), good)
    data = write_files(tmp_path / "data", suffix=".png", of=picture)
    spoil(data)
    if form == "shard":
        (tmp_path / "tars").mkdir()
        with tarfile.open(tmp_path / "tars" / "part-7.tar", "w") as tar:
            for path in sorted(data.iterdir()):
                tar.add(path, path.name)
        data = tmp_path / "tars"
    assert run(coder, good, tmp_path / "clean") == 0
    with caplog.at_level(logging.WARNING):
        assert run(coder, data, tmp_path / "out", "--max-bad-samples", "4", "--batch", "3") == 0
    bad = {one["key"]: one for one in json.loads((tmp_path / "out" / "bad_samples.json").read_bytes())}
    reasons = {"s03": "whole file", "s04": "got shape", "s05": "must be finite", "s06": "must have a caption"}
    assert sorted(bad) == sorted(reasons)
    for key, reason in reasons.items():
        assert reason in bad[key]["reason"]
        assert bad[key]["shard"].endswith("part-7.tar" if form == "shard" else "data")
        assert f"left out {key} of {bad[key]['shard']}" in caplog.text
    assert ShardReader(tmp_path / "out" / "train").manifest["bad_samples"] == 4
    clean, found = written(tmp_path / "clean"), written(tmp_path / "out")
    assert sorted(found) == sorted(set(clean) - set(reasons))
    for key, (moments, _) in found.items():
        np.testing.assert_allclose(moments, clean[key][0], atol=4e-3)


def field(number: int) -> bytes:
    draws = np.random.default_rng(number)
    made = np.concatenate([draws.integers(-32, 33, (2, 4, 4)) / 4, draws.random((1, 4, 4)) < 0.2]).astype(np.float32)
    stream = io.BytesIO()
    np.save(stream, made)
    return stream.getvalue()


def motion(folder: Path) -> Path:
    MotionField.fit(torch.from_numpy(np.stack([np.load(io.BytesIO(field(i))) for i in range(COUNT)]))).save(folder)
    return folder


def test_one_that_the_autoencoder_refuses_takes_no_other_of_its_batch_along(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_files(tmp_path / "fields", suffix=".npy", of=field)
    coder = accepted(motion(tmp_path / "coder"), data)
    assert run(coder, data, tmp_path / "clean") == 0
    spoilt = np.load(data / "s03.npy")
    spoilt[0, 0, 0] = 600.0
    np.save(data / "s03.npy", spoilt)
    assert run(coder, data, tmp_path / "out") == 0
    (bad,) = json.loads((tmp_path / "out" / "bad_samples.json").read_bytes())
    assert bad["key"] == "s03" and "at most 512 pixels" in bad["reason"]
    clean, found = written(tmp_path / "clean"), written(tmp_path / "out")
    assert sorted(found) == sorted(set(clean) - {"s03"})
    assert all(np.array_equal(moments, clean[key][0]) for key, (moments, _) in found.items())
    accepted(coder, data)
    record = read_acceptance(coder / "acceptance")
    assert record is not None and record.samples == COUNT - 1 and "left out s03" in caplog.text


def test_arrays_of_any_range_are_measured_by_their_own_variance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_files(tmp_path / "fields", suffix=".npy", of=field)
    coder = accepted(motion(tmp_path / "coder"), data)  # it loses nothing
    record = read_acceptance(coder / "acceptance")
    assert record is not None and record.thresholds == {"min_snr_db": 20.0}
    assert record.quality["snr_db"] == pytest.approx(96.0) and record.quality["error"] == 0
    spoilt = load_autoencoder(coder)
    whole = spoilt.decode
    spoilt.decode = lambda latent: whole(latent) * 0.5
    items = [item for part in parts_of(data, suffixes=(".npy",), samples=5) for item in part.items()]
    preparation = Preparation.of(spoilt, buckets=[(4, 4)])
    found = accept_autoencoder.measure(spoilt, items, preparation=preparation).means()
    assert found["snr_db"] == pytest.approx(10 * np.log10(found["variance"] / found["error"])) and found["snr_db"] < 20
    assert accept([*asked(coder, data, "4x4"), "--min-snr", "97"]) == 2
    assert "snr_db 96.000 where min. 97" in capsys.readouterr().err


def test_what_python_cannot_write_or_read_is_named_counted_and_skipped(pictures: Path, tmp_path: Path) -> None:
    coder = accepted(pca(tmp_path / "coder"), pictures)
    half = b'{"texts": [{"lang": "en", "text": "half an emoji \\ud83d"}]}'
    deep, base = b"[" * 100_000, b'{"base": "\\ud83d"}'
    for name, facts in (("s01", half), ("s02", deep), ("s03", base)):
        (pictures / f"{name}.json").write_bytes(facts)
    with (pictures / "s04.npy").open("wb") as file:
        np.savez(file, np.zeros(3))
    (pictures / "s04.png").unlink()
    latin = os.fsencode(pictures) + b"/caf\xe9"
    for suffix in (".png", ".txt"):
        os.rename(pictures / f"s05{suffix}", latin + suffix.encode())
    assert run(coder, pictures, tmp_path / "out") == 0
    bad = {one["key"]: one["reason"] for one in json.loads((tmp_path / "out" / "bad_samples.json").read_bytes())}
    reasons = {"s01": "must hold text", "s02": "must hold JSON", "s03": "must hold text", "s04": "whole .npy file"}
    assert sorted(bad) == sorted(reasons) and all(reasons[key] in reason for key, reason in bad.items())
    found = written(tmp_path / "out")
    assert len(found) == COUNT - len(reasons) and "caf\\udce9" in found  # a good sample under an odd name


def test_a_tar_whose_name_is_no_utf8_is_read_and_its_bad_samples_named(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "good" / "a.tar", suffix=".png", of=picture)
    coder = accepted(pca(tmp_path / "coder"), good)
    data = write_tar(tmp_path / "tars" / "a.tar", suffix=".png", of=lambda i: picture(i)[: 99 if i == 3 else None])
    os.rename(data / "a.tar", os.fsencode(data) + b"/\xe9.tar")
    assert run(coder, data, tmp_path / "out") == 0
    (bad,) = json.loads((tmp_path / "out" / "bad_samples.json").read_bytes())
    assert bad["key"] == "t03" and bad["shard"].endswith("\\udce9.tar")
    assert {facts["source"] for _, facts in written(tmp_path / "out").values()} == {bad["shard"]}


def test_a_silent_sound_is_bad(tmp_path: Path) -> None:
    data = write_files(tmp_path / "sounds", suffix=".wav", of=tone)
    coder = accepted(mdct(tmp_path / "coder"), data, buckets="32")
    (data / "s02.wav").write_bytes(tone(2, loud=0.0))
    (data / "s09.wav").write_bytes(tone(9)[:-30])
    (data / "s10.wav").write_bytes(b"no sound")
    assert run(coder, data, tmp_path / "out", buckets="32") == 0
    bad = {one["key"]: one["reason"] for one in json.loads((tmp_path / "out" / "bad_samples.json").read_bytes())}
    assert sorted(bad) == ["s02", "s09", "s10"] and "got silence" in bad["s02"]
    assert "as long as its header says" in bad["s09"] and "libsndfile" in bad["s10"]
    assert len(written(tmp_path / "out")) == COUNT - 3


def test_beyond_the_limit_it_stops_and_goes_on_with_a_higher_one(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    coder = accepted(pca(tmp_path / "coder"), pictures)
    spoil(pictures)
    more = ("--max-bad-samples", "3", "--part-samples", "4")
    assert run(coder, pictures, tmp_path / "out", *more) == 2
    assert "at most 3 samples may be bad, got 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    done: list[int] = []
    one_by_one = encode_part.PartEncoder.encode

    def counted(self: encode_part.PartEncoder, job: encode_part.Job) -> encode_part.Job:
        done.append(job.part.count)
        return one_by_one(self, job)

    monkeypatch.setattr(encode_part.PartEncoder, "encode", counted)
    assert run(coder, pictures, tmp_path / "out", "--max-bad-samples", "4", "--part-samples", "4") == 0
    assert done == [4]  # two parts were there
    assert len(written(tmp_path / "out")) == COUNT - 4


def test_a_killed_command_goes_on_and_gives_the_same(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coder = accepted(pca(tmp_path / "coder"), pictures)
    assert run(coder, pictures, tmp_path / "whole", "--part-samples", "4") == 0
    calls, original = [], encode_part.npy

    def kill_at_the_seventh(array: np.ndarray) -> bytes:
        calls.append(1)
        if len(calls) == 7:
            raise Killed
        return original(array)

    monkeypatch.setattr(encode_part, "npy", kill_at_the_seventh)
    with pytest.raises(Killed):
        run(coder, pictures, tmp_path / "out", "--part-samples", "4")
    assert not (tmp_path / "out").exists() and len(list((tmp_path / ".out.encoding").glob("part-*"))) == 1
    calls.clear()
    monkeypatch.setattr(encode_part, "npy", lambda array: calls.append(1) or original(array))
    assert run(coder, pictures, tmp_path / "out", "--part-samples", "4") == 0
    assert len(calls) == COUNT - 4 and not (tmp_path / ".out.encoding").exists()
    for split in ("train", "heldout"):
        name = f"{split}/shard-000000.tar"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def killed_before_the_merge(coder: Path, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The parts that are left, in three files each."""

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(encode_latents, "merge", killed)
        with pytest.raises(Killed):
            run(coder, data, out, "--part-samples", "4")
    return sorted((out.parent / f".{out.name}.encoding").glob("part-*"))


@pytest.mark.parametrize("file", ["shard-000000.tar", "shard-000000.index.json", "manifest.json"])
def test_parts_that_a_power_cut_damaged_are_encoded_again(
    file: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    coder = accepted(pca(tmp_path / "coder"), pictures)
    assert run(coder, pictures, tmp_path / "whole", "--part-samples", "4") == 0
    parts = killed_before_the_merge(coder, pictures, tmp_path / "out", monkeypatch)
    for part in parts[:2]:
        (part / file).write_bytes(b"")
    assert run(coder, pictures, tmp_path / "out", "--part-samples", "4") == 0
    assert caplog.text.count("encoded again") == 2
    for split in ("train", "heldout"):
        name = f"{split}/shard-000000.tar"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / ".out.encoding").exists()


def test_a_part_that_is_damaged_again_ends_the_command(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    coder = accepted(pca(tmp_path / "coder"), pictures)
    original = encode_part.PartEncoder.encode

    def damaging(self: encode_part.PartEncoder, job: encode_part.Job) -> encode_part.Job:
        done = original(self, job)
        (job.folder / "shard-000000.tar").write_bytes(b"")
        return done

    monkeypatch.setattr(encode_part.PartEncoder, "encode", damaging)
    assert run(coder, pictures, tmp_path / "out") == 2
    assert "shard-000000.tar must be readable" in capsys.readouterr().err


def test_a_command_that_was_killed_once_its_output_was_in_place_leaves_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    coder, work = accepted(pca(tmp_path / "coder"), pictures), tmp_path / ".out.encoding"

    def killed(_: Path) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("data_prep.working_folder._remove", killed)
        run(coder, pictures, tmp_path / "out")
    assert (tmp_path / "out" / "train").is_dir() and list(work.glob("part-*"))
    assert run(coder, pictures, tmp_path / "out") == 2
    assert "must not exist yet" in capsys.readouterr().err and not work.exists()
    # parts of a command that did not come so far are not touched by an output of someone else's
    parts = killed_before_the_merge(coder, pictures, tmp_path / "other", monkeypatch)
    (tmp_path / "other").mkdir()
    assert run(coder, pictures, tmp_path / "other") == 2
    assert parts and all(part.is_dir() for part in parts)


def test_an_output_among_the_media_is_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    coder = accepted(pca(tmp_path / "coder"), pictures)
    assert run(coder, pictures, pictures / "deep" / "out") == 2
    assert "--out must lie outside --data" in capsys.readouterr().err
    assert not (pictures / "deep").exists()


@pytest.mark.parametrize(
    "option",
    ["--batch 0", "--part-samples 0", "--heldout-one-in 0", "--processes -1", "--max-bad-samples -1", "--fps 0"],
)
def test_sizes_that_are_none_are_refused_at_the_door(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    name, _ = option.split()
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "coder", tmp_path / "data", tmp_path / "out", *option.split())
    assert ended.value.code == 2 and f"argument {name}: must be a" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        accept([*asked(tmp_path / "coder", tmp_path / "data", "4x4"), "--samples", "0"])
    assert "argument --samples: must be a whole number of at least 1, got 0" in capsys.readouterr().err


def test_a_caption_of_nothing_is_none(pictures: Path, tmp_path: Path) -> None:
    coder = accepted(pca(tmp_path / "coder"), pictures)
    (pictures / "s02.txt").unlink()
    empty, said = {"lang": "en", "text": " "}, {"lang": "de", "text": "ein Bild"}
    for name, texts in (("s01", [empty]), ("s02", [empty]), ("s03", [empty, said])):
        (pictures / f"{name}.json").write_text(json.dumps({"texts": texts}))
    assert run(coder, pictures, tmp_path / "out") == 0
    (bad,) = json.loads((tmp_path / "out" / "bad_samples.json").read_bytes())
    assert bad["key"] == "s02" and "must have a caption" in bad["reason"]
    found = {key: facts["texts"] for key, (_, facts) in written(tmp_path / "out").items()}
    assert found["s03"] == [said] and found["s01"] == [{"lang": "en", "text": "sample 1"}]  # its .txt


@pytest.mark.parametrize("form", ["folder", "shard"])
def test_keys_that_many_share_are_found_before_anything_is_encoded(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_files(tmp_path / "good", suffix=".png", of=picture)
    coder, data = accepted(pca(tmp_path / "coder"), good), tmp_path / "data"
    for name in ("a", "b"):
        if form == "shard":
            write_tar(data / name / "x.tar", suffix=".png", of=picture, count=8)
        else:
            write_files(data / ("a_a/b" if name == "a" else "a/a_b"), suffix=".png", of=picture, count=8)
    monkeypatch.setattr(encode_part.PartEncoder, "encode", None)
    assert run(coder, data, tmp_path / "out", "--max-bad-samples", "7") == 2
    assert "at most 7 samples may have the key of another, got 8, the last" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(coder, data, tmp_path / "out", "--max-bad-samples", "8") == 0
    assert len(json.loads((tmp_path / "out" / "bad_samples.json").read_bytes())) == 8


def test_processes_that_the_system_kills_leave_parts_and_nothing_that_runs(project: Path, tmp_path: Path) -> None:
    data = write_files(tmp_path / "many", suffix=".png", of=picture, count=300)
    coder = accepted(pca(tmp_path / "coder"), data)
    out, work = tmp_path / "out", tmp_path / ".out.encoding"
    more = ["--out", str(out), "--heldout-one-in", "3", "--part-samples", "2", "--processes", "2"]
    command = [sys.executable, "-m", "data_prep.encode_latents", *asked(coder, data, "4x4"), *more]
    running = subprocess.Popen(command, cwd=project, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not list(work.glob("part-*")) and time.monotonic() < end:
        time.sleep(0.01)
    workers = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    running.wait()
    parts = len(list(work.glob("part-*")))
    assert 0 < parts < 150 and not out.exists()
    psutil.wait_procs(workers, timeout=60)
    assert not [worker for worker in workers if worker.is_running()]
    assert run(coder, data, out, "--part-samples", "2") == 0
    assert run(coder, data, tmp_path / "whole", "--part-samples", "2") == 0
    for split in ("train", "heldout"):
        name = f"{split}/shard-000000.tar"
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not work.exists()


def test_two_processes_give_what_one_gives(pictures: Path, tmp_path: Path) -> None:
    coder = accepted(pca(tmp_path / "coder"), pictures)
    assert run(coder, pictures, tmp_path / "one", "--part-samples", "5") == 0
    assert run(coder, pictures, tmp_path / "two", "--part-samples", "5", "--processes", "2") == 0
    for split in ("train", "heldout"):
        name = f"{split}/shard-000000.tar"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_existing_output_and_one_that_is_being_written_are_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coder = accepted(pca(tmp_path / "coder"), pictures)
    with working_folder(tmp_path / "out"):
        assert run(coder, pictures, tmp_path / "out") == 2
        assert "one command at a time" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert run(coder, pictures, tmp_path / "out") == 2
    assert "must not exist yet" in capsys.readouterr().err


def test_an_autoencoder_that_was_not_accepted_is_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coder = pca(tmp_path / "coder")
    assert run(coder, pictures, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert (
        "must be accepted" in error and f"accept_autoencoder --autoencoder {coder}" in error and "\n" not in error[:-1]
    )
    assert accept([*asked(coder, pictures, "4x4"), "--min-psnr", "90"]) == 2
    assert "must meet its thresholds" in capsys.readouterr().err
    assert run(coder, pictures, tmp_path / "out") == 2
    assert "psnr_db" in capsys.readouterr().err
    accepted(coder, pictures)
    PatchPCA.fit(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), factor=8, channels=24).save(coder)
    assert run(coder, pictures, tmp_path / "out") == 2
    assert "must be of fingerprint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_record_holds_numbers_thresholds_and_a_sheet(pictures: Path, tmp_path: Path) -> None:
    coder = accepted(pca(tmp_path / "coder"), pictures)
    record = read_acceptance(coder / "acceptance")
    assert isinstance(record, Acceptance) and record.accepted
    assert record.fingerprint == load_autoencoder(coder).fingerprint and record.samples == COUNT
    assert set(record.quality) == {"psnr_db", "psnr_db_5th_percentile", "ssim"}
    assert record.thresholds == accept_autoencoder.DEFAULTS["image"]
    assert {len(values) for values in record.latents.values()} == {24}
    with Image.open(coder / "acceptance" / "contact_sheet.png") as sheet:
        assert sheet.height > 2 * 2 * 32 and sheet.width > 8 * 32
    (coder / "acceptance" / "acceptance.json").write_text("{}")
    with pytest.raises(DataError, match="must be a record"):
        read_acceptance(coder / "acceptance")


def test_a_dead_channel_is_not_accepted(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    autoencoder = load_autoencoder(pca(tmp_path / "coder"))
    autoencoder.get_buffer("axes")[5] = 0
    autoencoder.save(tmp_path / "coder")
    assert accept(asked(tmp_path / "coder", pictures, "4x4")) == 2
    assert "channels [5] never vary" in capsys.readouterr().err


def test_a_tar_that_breaks_off_gives_what_it_holds(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "good" / "a.tar", suffix=".png", of=picture)
    coder = accepted(pca(tmp_path / "coder"), good)
    data = write_tar(tmp_path / "tars" / "a.tar", suffix=".png", of=picture)
    with tarfile.open(data / "a.tar") as tar:
        cut = tar.getmember("t09.png").offset_data + 100
    (data / "a.tar").write_bytes((data / "a.tar").read_bytes()[:cut])
    assert run(coder, data, tmp_path / "out") == 0
    assert sorted(written(tmp_path / "out")) == [f"t{i:02d}" for i in range(9)]
    (bad,) = json.loads((tmp_path / "out" / "bad_samples.json").read_bytes())
    assert bad["shard"].endswith("a.tar")


def bad_and_good(folder: Path) -> tuple[list[str], list[str]]:
    """Keys of samples whose medium cannot be read, and of the others, part by part."""
    items = [item for part in parts_of(folder, suffixes=(".png",), samples=5) for item in part.items()]
    bad = [item.key for item in items if item.media is None]
    return bad, [item.key for item in items if item.media is not None]


def test_parts_of_a_tar_begin_where_the_one_before_ended(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "tars" / "a.tar", suffix=".png", of=picture)
    parts = parts_of(data, suffixes=(".png",), samples=5)
    assert [[item.key for item in part.items()] for part in parts] == [
        [f"t{i:02d}" for i in range(first, min(first + 5, COUNT))] for first in (0, 5, 10)
    ]
    for number, item in enumerate(item for part in parts for item in part.items()):
        assert item.media is not None and item.media.read() == picture(number)
        assert item.texts()[0]["text"] == f"sample {number}"


def test_a_tar_without_its_end_or_with_a_damaged_header_says_so(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "tars" / "a.tar", suffix=".png", of=picture)
    whole = (data / "a.tar").read_bytes()
    assert bad_and_good(data) == ([], [f"t{i:02d}" for i in range(COUNT)])
    with tarfile.open(data / "a.tar") as tar:
        start = tar.getmember("t09.png").offset
    (data / "a.tar").write_bytes(whole[:start])
    assert bad_and_good(data) == (["rest-of-a"], [f"t{i:02d}" for i in range(9)])
    (data / "a.tar").write_bytes(whole[:start] + b"x" * 512 + whole[start + 512 :])
    assert bad_and_good(data) == (["rest-of-a"], [f"t{i:02d}" for i in range(9)])
    (data / "a.tar").write_bytes(b"")
    assert bad_and_good(data) == (["rest-of-a"], [])


def test_samples_that_would_share_a_key_and_links_to_nowhere_are_named(pictures: Path, tmp_path: Path) -> None:
    coder = accepted(pca(tmp_path / "coder"), pictures)
    for name in ("a.b", "a_b"):
        (pictures / f"{name}.png").write_bytes(picture(3))
        (pictures / f"{name}.txt").write_text("one of two")
    (pictures / "c.png").symlink_to(tmp_path / "nowhere.png")
    (pictures / "c.txt").write_text("gone")
    assert run(coder, pictures, tmp_path / "out") == 0
    bad = {one["key"]: one["reason"] for one in json.loads((tmp_path / "out" / "bad_samples.json").read_bytes())}
    assert sorted(bad) == ["a_b", "c"] and "must be unique" in bad["a_b"] and "must be readable" in bad["c"]
    assert sorted(written(tmp_path / "out")) == ["a_b", *(f"s{i:02d}" for i in range(COUNT))]


def wav(wave: np.ndarray, *, rate: int = RATE) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, wave, rate, format="wav")
    return stream.getvalue()


def test_a_sound_of_which_nothing_is_left_is_silent() -> None:
    preparation = Preparation.of(MDCTPCA(hop=160, channels=8, sample_rate=RATE), buckets=[(32,)])
    tone = 0.3 * np.sin(np.arange(2000))
    too_high = 0.3 * np.sin(2 * np.pi * 9000 / 32000 * np.arange(8000)) * np.hanning(8000)
    for data in (
        wav(np.stack([tone, -tone], 1)),
        wav(too_high, rate=32000),
        wav(np.ones(2) / 2, rate=44100),
        wav(np.zeros(0)),
    ):
        with pytest.raises(DataError, match="got silence"):
            preparation.read(data, suffix=".wav")
    assert preparation.read(wav(np.stack([tone, tone / 2], 1)), suffix=".wav")[0] == 0


def test_stereo_is_not_levelled_as_speech() -> None:
    stereo = DiffusersAutoencoder(tiny_diffusers("AutoencoderOobleck"))
    assert Preparation.of(stereo, buckets=[(300,)]).level == "as-is"
    with pytest.raises(DataError, match="got level speech; change --level"):
        Preparation.of(stereo, buckets=[(300,)], level="speech")


def test_a_photograph_is_turned_as_its_camera_says() -> None:
    upright = Image.open(io.BytesIO(picture(1)))
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90).save(stream, format="png", exif=exif)
    preparation = Preparation.of(PatchPCA(factor=8, channels=4), buckets=[(4, 4)])
    _, array = preparation.read(stream.getvalue(), suffix=".png")
    assert np.array_equal(array, np.asarray(upright).transpose(2, 0, 1))


def test_one_sample_that_decodes_to_nan_is_enough_to_refuse() -> None:
    autoencoder = PatchPCA(factor=8, channels=4)
    preparation = Preparation.of(autoencoder, buckets=[(4, 4)])
    latents = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    quality = {"psnr_db": [30.0, float("nan")], "ssim": [0.9, 0.9]}
    findings = accept_autoencoder.Findings(quality=quality, latents=[latents])
    thresholds = accept_autoencoder.DEFAULTS["image"]
    record = accept_autoencoder.judged(autoencoder, findings, thresholds=thresholds, preparation=preparation)
    assert not record.accepted and record.failed == ["psnr_db is undefined"]


def test_pictures_are_padded_with_white_cropped_or_taken_as_they_are() -> None:
    stream, ink = io.BytesIO(), (10, 20, 30)
    Image.new("RGB", (64, 32), ink).save(stream, format="png")
    made = {
        fit: Preparation.of(PatchPCA(factor=8, channels=4), buckets=[(4, 4)], fit=fit)
        for fit in ("pad", "crop", "exact")
    }
    _, padded = made["pad"].read(stream.getvalue(), suffix=".png")
    assert (padded[:, 0] == 255).all() and (padded[:, 16].T == ink).all()
    _, cropped = made["crop"].read(stream.getvalue(), suffix=".png")
    assert cropped.shape == (3, 32, 32) and (cropped.reshape(3, -1).T == ink).all()
    exact = np.array(Image.open(io.BytesIO(picture(0)))).transpose(2, 0, 1)
    assert np.array_equal(made["exact"].read(picture(0), suffix=".png")[1], exact)


def test_the_bucket_is_the_one_in_the_nearest_proportion() -> None:
    preparation = Preparation.of(PatchPCA(factor=8, channels=4), buckets=[(4, 4), (2, 8), (8, 2)])
    assert [preparation.read(picture(0, size=size), suffix=".png")[0] for size in ((50, 50), (90, 30), (20, 90))] == [
        0, 1, 2,
    ]  # fmt: skip
    strict = Preparation.of(PatchPCA(factor=8, channels=4), buckets=[(4, 4)], fit="exact")
    with pytest.raises(DataError, match="height and width among"):
        strict.read(picture(0, size=(50, 50)), suffix=".png")
    with pytest.raises(DataError, match="must have 2 positive sizes"):
        Preparation.of(PatchPCA(factor=8, channels=4), buckets=[(4,)])
