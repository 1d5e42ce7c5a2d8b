"""Training a small autoencoder: it gets better than the closed form it starts from, and twice the same."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_prep import train_autoencoder
from data_prep.train_autoencoder import main, score, train
from matformer.autoencoders import ConvolutionalAutoencoder, load_autoencoder


def disc(draws: np.random.Generator) -> np.ndarray:
    """A disc of one colour on another: few numbers say it all, but no linear code does."""
    y, x = np.mgrid[0:32, 0:32] - draws.uniform(8, 24, 2).reshape(2, 1, 1)
    ink, paper = draws.integers(0, 256, (2, 3, 1, 1))
    return np.where(np.hypot(y, x) < draws.uniform(4, 10), ink, paper).astype(np.uint8)


def chirp(draws: np.random.Generator) -> np.ndarray:
    time = np.arange(2000) / 8000
    wave = np.sin(2 * np.pi * (draws.uniform(200, 900) * time + draws.uniform(0, 900) * time**2))
    return (0.1 * wave * np.hanning(2000)).astype(np.float32)[None]


def small(medium: str) -> ConvolutionalAutoencoder:
    if medium == "image":
        return ConvolutionalAutoencoder(medium="image", size=8, channels=4, width=32, blocks=1)
    return ConvolutionalAutoencoder(medium="audio", size=40, channels=4, width=32, blocks=1, sample_rate=8000)


@pytest.mark.parametrize(("medium", "measure"), [("image", "psnr_db"), ("audio", "snr_db")])
def test_it_learns_what_the_closed_form_loses(medium: str, measure: str) -> None:
    draws = np.random.default_rng(0)
    make = disc if medium == "image" else chirp
    samples, held = [make(draws) for _ in range(300)], [make(draws) for _ in range(16)]
    start = train(samples, like=small(medium), steps=0, batch=16, seed=0)
    trained = train(samples, like=small(medium), steps=200, batch=16, seed=0)
    assert score(trained, held)[measure] > score(start, held)[measure] + 1.0


def test_the_command_gives_the_same_weights_twice_and_says_how_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draws = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(24):
        Image.fromarray(disc(draws).transpose(1, 2, 0)).save(tmp_path / "data" / f"{number}.png")
    more = "--medium image --buckets 4x4 --channels 4 --width 16 --blocks 1 --steps 4 --batch 4".split()
    with caplog.at_level(logging.INFO):
        for name in ("one", "two"):
            assert main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / name), *more]) == 0
    assert "trained: psnr" in caplog.text and "closed form: psnr" in caplog.text
    one = load_autoencoder(tmp_path / "one")
    assert one.fingerprint == load_autoencoder(tmp_path / "two").fingerprint
    assert main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "other"), *more, "--seed", "1"]) == 0
    assert one.fingerprint != load_autoencoder(tmp_path / "other").fingerprint


def test_sounds_of_a_folder_are_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draws = np.random.default_rng(1)
    (tmp_path / "data").mkdir()
    for number in range(6):
        stream = io.BytesIO()
        soundfile.write(stream, chirp(draws)[0], 8000, format="wav")
        (tmp_path / "data" / f"{number}.wav").write_bytes(stream.getvalue())
    more = "--medium audio --size 40 --channels 4 --width 16 --blocks 1 --steps 2 --batch 4".split()
    asked = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *more]
    assert main([*asked, "--buckets", "64"]) == 0
    assert load_autoencoder(tmp_path / "out").sample_rate == 8000
    assert main([*asked, "--buckets", "64"]) == 2
    assert "must not exist yet" in capsys.readouterr().err
    assert main([*asked, "--out", str(tmp_path / "other")]) == 2
    assert "set --buckets" in capsys.readouterr().err


def test_held_out_samples_are_not_trained_on() -> None:
    samples = [(f"k{i}", np.full(1, i)) for i in range(200)]
    kept, held = train_autoencoder._split(samples)
    assert 5 < len(held) < 50 and len(kept) + len(held) == 200
    assert not {int(one[0]) for one in kept} & {int(one[0]) for one in held}
