"""What is drawn onto stored latents, and how they are normalised."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matformer.config.load import parse
from matformer.config.schema import DataConfig, ModelConfig, SourceConfig
from matformer.data.latents import FLOOR, Normalisation
from matformer.data.shards import ShardWriter
from matformer.data.sources import MediaSpan, PairSource, Stream, open_source, tree_of
from matformer.data.statistics import with_statistics
from matformer.errors import ConfigError, DataError
from tests.made import tiny_model, tiny_run

CHANNELS = 2
VARIANCE = np.array([6.0, 2.0])
LOGVAR = np.log(np.array([0.25, 4.0]))
LATENTS = {"shift": [1.0, -1.0], "scale": 0.5, "channel_variance": VARIANCE.tolist(), "channel_noise": [0.25, 4.0]}


def model_of(**media: Any) -> ModelConfig:
    image = {"channels": CHANNELS, "rank": 2, "patch": 1, "buckets": [[8, 8]], "coda_width": 8} | media
    return ModelConfig.model_validate(tiny_model().model_dump() | {"media": {"image": image}})


def data_of(root: Path, *names: str) -> DataConfig:
    sources = {
        name: SourceConfig(path=name, form="pairs", weight=1.0, modality="image", generate_probability=1.0)
        for name in names
    }
    return DataConfig(root=str(root), recipe=None, lanes=1, sequence_latents=128, sources=sources)


def write(root: Path, name: str = "images", *, kind: str = "moments", count: int = 4, **latents: Any) -> np.ndarray:
    """Means [count, C, 8, 8] of a data set, with LOGVAR beside them where it is of moments."""
    means = np.random.default_rng(0).normal(size=(count, CHANNELS, 8, 8)).astype(np.float16)
    extra = {"kind": kind, "modality": "image", "latents": LATENTS | latents}
    with ShardWriter(root / name / "train", form="pairs", extra=extra) as writer:
        for number, mean in enumerate(means):
            logvar = np.broadcast_to(LOGVAR[:, None, None], mean.shape).astype(np.float16)
            file = io.BytesIO()
            np.save(file, np.concatenate([mean, logvar]) if kind == "moments" else mean)
            facts = {"modality": "image", "texts": [{"lang": "en", "text": "a dot"}]}
            writer.add(f"i{number}", {"moments.npy": file.getvalue(), "json": json.dumps(facts).encode()})
    return means.astype(np.float32)


def stream_of(root: Path, *, seed: int = 0, **media: Any) -> Stream:
    source = open_source("images", data=data_of(root, "images"), model=model_of(**media), split="train")
    assert isinstance(source, PairSource)
    return Stream(source, seed=seed, lane=0, lanes=1)


def span_at(stream: Stream, place: int) -> tuple[int, MediaSpan]:
    """Which sample stands at a place, and its medium."""
    document = stream.document(place)
    (span,) = [span for span in document.spans if isinstance(span, MediaSpan)]
    return int(document.key.rsplit("i", 1)[1]), span


def normal(mean: np.ndarray) -> np.ndarray:
    return (mean - np.array([1.0, -1.0], np.float32)[:, None, None]) * np.float32(0.5)


def test_each_epoch_draws_from_the_stored_moments(tmp_path: Path) -> None:
    means = write(tmp_path)
    stream = stream_of(tmp_path)
    drawn: dict[int, list[np.ndarray]] = {number: [] for number in range(4)}
    for place in range(800):
        number, span = span_at(stream, place)
        drawn[number].append(span.latent)
    for number, latents in drawn.items():
        assert len(latents) == 200
        found, expected = np.stack(latents), normal(means[number])
        deviation = 0.5 * np.exp(LOGVAR / 2)[:, None, None]
        # 200 draws of 64 cells a channel: both within four standard errors
        np.testing.assert_allclose(((found.mean(0) - expected) / deviation).mean((1, 2)), 0, atol=4 / np.sqrt(12800))
        np.testing.assert_allclose((found - expected).std((0, 2, 3)) / deviation[:, 0, 0], 1, atol=4 / np.sqrt(25600))


def test_what_is_drawn_hangs_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    write(tmp_path)
    there, back = stream_of(tmp_path), stream_of(tmp_path)
    forward = [span_at(there, place)[1].latent for place in range(8)]
    backward = [span_at(back, place)[1].latent for place in reversed(range(8))][::-1]
    for one, other in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(one, other)
    first, second = (dict(span_at(there, place) for place in places) for places in (range(4), range(4, 8)))
    other_seed = dict(span_at(stream_of(tmp_path, seed=1), place) for place in range(4))
    for number, span in first.items():
        assert not np.array_equal(span.latent, second[number].latent)
        assert not np.array_equal(span.latent, other_seed[number].latent)


@pytest.mark.parametrize(("kind", "noise"), [("moments", "none"), ("mean", "moments"), ("mean", "none")])
def test_the_mean_stands_where_nothing_is_drawn(kind: str, noise: str, tmp_path: Path) -> None:
    means = write(tmp_path, kind=kind)
    stream = stream_of(tmp_path, latent_noise=noise)
    for place in range(4):
        number, span = span_at(stream, place)
        np.testing.assert_array_equal(span.latent, normal(means[number]))


@pytest.mark.parametrize("kind", ["moments", "mean"])
def test_fixed_noise_is_of_its_deviation_normalised(kind: str, tmp_path: Path) -> None:
    means = write(tmp_path, kind=kind)
    stream = stream_of(tmp_path, latent_noise="fixed:0.25")
    spans = [span_at(stream, place) for place in range(200)]
    found = np.stack([span.latent - normal(means[number]) for number, span in spans])
    np.testing.assert_allclose(found.std((0, 2, 3)), 0.25, rtol=4 / np.sqrt(25600))


def test_a_tree_is_of_the_latent_that_was_drawn(tmp_path: Path) -> None:
    write(tmp_path, kind="mean")
    budget = {"share": 0.5, "levels": 1, "noised_tree": "own"}
    stream = stream_of(tmp_path, latent_noise="fixed:2", budget=budget)
    media, trees = model_of(budget=budget).media["image"], set()
    for place in range(0, 16, 4):
        _, span = span_at(stream, place)
        expected = tree_of(span.latent, media=media)
        assert span.tree is not None and expected is not None
        np.testing.assert_array_equal(span.tree, expected)
        trees.add(span.tree.tobytes())
    assert len(trees) > 1


@pytest.mark.parametrize("wrong", ["fixed", "fixed:-1", "fixed:x", "moment", "0.1"])
def test_other_words_for_noise_are_refused(wrong: str) -> None:
    tree = tiny_run().model_dump(mode="json")
    tree["model"]["media"]["image"]["latent_noise"] = wrong
    with pytest.raises(ConfigError, match=r"model\.media\.image\.latent_noise"):
        parse(tree)


def test_per_channel_every_channel_has_variance_one_down_to_the_floor(tmp_path: Path) -> None:
    write(tmp_path, kind="mean", channel_variance=[2.0, 1e-9])
    media = model_of(normalisation="per_channel").media["image"]
    found = Normalisation.of(data_of(tmp_path, "images"), "image", media=media)
    np.testing.assert_allclose(found.scale, [2.0**-0.5, (FLOOR * (2.0 + 1e-9) / 2) ** -0.5])
    latent = np.random.default_rng(1).normal(size=(CHANNELS, 3)).astype(np.float32)
    np.testing.assert_allclose(found.inverse(found.forward(latent)), latent, rtol=1e-5)


def test_the_inverse_gives_the_autoencoder_its_latent_back(tmp_path: Path) -> None:
    means = write(tmp_path, kind="mean")
    stream = stream_of(tmp_path, normalisation="per_channel")
    media = model_of(normalisation="per_channel").media["image"]
    normalisation = Normalisation.of(data_of(tmp_path, "images"), "image", media=media)
    number, span = span_at(stream, 2)
    assert not np.allclose(span.latent, normal(means[number]))
    np.testing.assert_allclose(normalisation.inverse(span.latent), means[number], atol=1e-6)


def test_two_data_sets_of_a_run_are_normalised_alike(tmp_path: Path) -> None:
    means = write(tmp_path, "first", kind="mean")
    write(tmp_path, "second", kind="mean", shift=[9.0, 9.0], scale=3.0)
    data, model = data_of(tmp_path, "first", "second"), model_of()
    for name in ("first", "second"):
        (span,) = [
            span
            for span in open_source(name, data=data, model=model, split="train").pick(0).spans
            if isinstance(span, MediaSpan)
        ]
        np.testing.assert_array_equal(span.latent, normal(means[0]))


@pytest.mark.parametrize(
    ("media", "expected"),
    [
        ({"latent_noise": "none"}, VARIANCE / 4),
        ({"latent_noise": "moments"}, (VARIANCE + [0.25, 4.0]) / 4),
        ({"latent_noise": "fixed:0.5"}, VARIANCE / 4 + 0.25),
        ({"latent_noise": "none", "normalisation": "per_channel"}, np.ones(2)),
        ({"latent_noise": "moments", "normalisation": "per_channel"}, 1 + np.array([0.25, 4.0]) / VARIANCE),
    ],
)
def test_preconditioning_knows_the_variance_as_it_is_read(media: dict, expected: np.ndarray, tmp_path: Path) -> None:
    write(tmp_path)
    run = tiny_run().model_copy(update={"data": data_of(tmp_path, "images"), "model": model_of(**media)})
    known = with_statistics(run).model.media["image"].channel_variance
    assert known is not None
    np.testing.assert_allclose(known, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("missing", "normalisation"), [("shift", "one_scale"), ("scale", "one_scale"), ("channel_variance", "per_channel")]
)
def test_a_manifest_that_does_not_say_how_is_refused(missing: str, normalisation: str, tmp_path: Path) -> None:
    write(tmp_path, kind="mean")
    path = tmp_path / "images" / "train" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    if missing == "scale":  # without it an entry is one a modality
        manifest["latents"] = {"image": {"shift": [0.0, 0.0]}}
    else:
        del manifest["latents"][missing]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"must say how latents of image are normalised, got no {missing}"):
        span_at(stream_of(tmp_path, normalisation=normalisation), 0)
