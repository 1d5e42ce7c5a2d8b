"""Drawn pictures are judged: the distance of two clouds, the classifier's labels, own captions against others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from data_prep.write import npy
from matformer.autoencoders import PatchPCA
from matformer.autoencoders.patch_pca import to_signed
from matformer.checkpoint.store import save
from matformer.config.load import save_resolved
from matformer.config.schema import RunConfig
from matformer.data.shards import ShardWriter
from matformer.data.sources import MediaSpan, TextSpan
from matformer.engine import sample_quality as quality
from matformer.engine.classifier import Classifier, by_concept, seen, train_classifier
from matformer.engine.draws import Draws
from matformer.engine.frechet import Gaussian, fitted, frechet_distance
from matformer.engine.judge import labelled_pictures, load_judge
from matformer.engine.restore import load_for_inference
from matformer.errors import DataError
from matformer.evaluate import main
from matformer.hosts.plain import PlainHost
from matformer.model import Matformer
from matformer.parallel.seeds import generator

SIDE, FACTOR, CHANNELS = 16, 4, 8
KINDS = {"red": (220, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 220), "grey": (120, 120, 120)}
STEPS = 60
MODEL = {
    "atto": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn_width": 16, "rotary_pairs": (1, 1, 1, 1)},
    "text": {"width": 8, "heads": 1, "ffn_width": 8, "preludio_layers": 1, "coda_layers": 1, "ngram_rows": 64},
    "media": {"image": {"channels": CHANNELS, "rank": 2, "patch": 2, "buckets": ((4, 4),), "coda_width": 8}},
}


def gaussian(seed: int, size: int, *, rank: int | None = None) -> Gaussian:
    draws = np.random.default_rng(seed)
    factor = draws.standard_normal((size, rank or size))
    return Gaussian(draws.standard_normal(size), factor @ factor.T)


def test_the_distance_of_independent_gaussians_has_a_closed_form() -> None:
    """|m1 - m2|^2 + sum of (s1 - s2)^2, s the standard deviations."""
    one = Gaussian(np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 9.0]))
    other = Gaussian(np.array([1.0, 1.0, 0.0]), np.diag([4.0, 4.0, 0.0]))
    assert frechet_distance(one, other) == pytest.approx(5 + (1 + 0 + 9), abs=1e-12)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rank", [None, 5])
def test_the_distance_is_that_by_the_matrix_root_of_scipy(rank: int | None) -> None:
    """Also where there are fewer pictures than features: there scipy's root is only near."""
    one, other = gaussian(1, 12), gaussian(2, 12, rank=rank)
    root = scipy.linalg.sqrtm(one.covariance @ other.covariance)
    gap = np.square(one.mean - other.mean).sum()
    theirs = gap + np.trace(one.covariance + other.covariance - 2 * np.real(root))
    assert frechet_distance(one, other) == pytest.approx(theirs, rel=1e-9 if rank is None else 1e-5)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-9)


def test_a_cloud_is_fitted_with_weights_as_if_points_were_repeated() -> None:
    points = np.random.default_rng(0).standard_normal((5, 3))
    weighted = fitted(points, weights=np.array([2.0, 1.0, 1.0, 3.0, 1.0]))
    repeated = fitted(np.repeat(points, [2, 1, 1, 3, 1], axis=0))
    np.testing.assert_allclose(weighted.mean, repeated.mean, atol=1e-12)
    np.testing.assert_allclose(weighted.covariance, repeated.covariance, atol=1e-12)
    np.testing.assert_allclose(repeated.covariance, np.cov(np.repeat(points, [2, 1, 1, 3, 1], axis=0).T, bias=True))


def pixels(kind: str, seed: int) -> np.ndarray:
    """A square of the kind's colour somewhere on white, grey for a kind that has none."""
    draws = generator(seed, "picture", kind)
    picture = np.full((SIDE, SIDE, 3), 255, np.uint8)
    top, left = draws.integers(0, SIDE - 8, 2)
    picture[top : top + 8, left : left + 8] = np.clip(
        np.array(KINDS.get(kind, KINDS["grey"])) + draws.integers(-20, 20, 3), 0, 255
    )
    return picture


def write_pictures(folder: Path, *, split: str, autoencoder: PatchPCA, kinds: list[str], per_kind: int) -> None:
    identity = {"kind": "patch_pca", "fingerprint": autoencoder.fingerprint, "folder": "autoencoders/image"}
    extra = {"modality": "image", "latents": {"shift": [0.0] * CHANNELS, "scale": 0.5}, "autoencoder": identity}
    with ShardWriter(folder / split, form="pairs", extra=extra) as writer:
        for kind in kinds:
            for number in range(per_kind):
                seed = number + (1000 if split == "heldout" else 0)
                concept = f"{kind}{number // 2}{split}"  # two pictures each
                source = pixels(kind, seed)
                media = to_signed(torch.from_numpy(source).movedim(2, 0)[None])
                texts = [{"lang": "en", "text": f"{kind} number {number // 2}"}]
                facts = {"modality": "image", "concept": concept, "base": concept, "style": "flat", "texts": texts}
                facts |= {"bucket": [4, 4]} | ({} if kind == "nameless" else {"group": kind})
                latent = autoencoder.encode(media).mean[0].half().numpy()
                writer.add(f"{kind}-{number}", {"json": json.dumps(facts).encode(), "moments.npy": npy(latent)})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train has the four kinds, pictures of no known group, and some without one; held-out a kind more."""
    root = tmp_path_factory.mktemp("data")
    everything = np.stack([pixels(kind, seed) for kind in KINDS for seed in range(20)])
    autoencoder = PatchPCA.fit(
        torch.from_numpy(everything).movedim(3, 1).contiguous(), factor=FACTOR, channels=CHANNELS
    )
    autoencoder.save(root / "autoencoders" / "image")
    train, heldout = [*KINDS, "unknown", "nameless"], [*KINDS, "unknown", "new"]
    write_pictures(root / "images", split="train", autoencoder=autoencoder, kinds=train, per_kind=24)
    write_pictures(root / "images", split="heldout", autoencoder=autoencoder, kinds=heldout, per_kind=8)
    return root


def config(root: Path, **asked: int) -> RunConfig:
    source = {"path": "images", "form": "pairs", "modality": "image", "weight": 1.0}
    data = {"root": str(root), "lanes": 4, "sequence_latents": 48, "sources": {"images": source}}
    train = {"steps": 10, "global_batch": 4, "micro_batch": 2, "lr": 1e-3}
    amounts = {"text_bytes": 0, "media_spans": 0, "captioned_spans": 0} | asked
    tree = {"name": "t", "model": MODEL, "data": data, "train": train, "eval": amounts, "parallel": {"threads": 1}}
    return RunConfig.model_validate(tree)


def build(run: RunConfig) -> tuple[PlainHost, Matformer]:
    """As drawn: outputs begin at zero, so that no caption is heard."""
    host = PlainHost(run)
    model = Matformer(run.model, trunk=host.build_trunk())
    host.prepare(model)
    return host, model.eval()


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    """Learned in a second instead of a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matformer.engine.judge.STEPS", STEPS)
        yield


def test_labels_are_every_known_group_of_the_train_pictures(root: Path) -> None:
    pictures = labelled_pictures(config(root), modality="image")
    assert pictures.labels == tuple(sorted(KINDS))
    assert torch.bincount(pictures.label_n).tolist() == [24] * 4
    assert len(set(pictures.concepts)) == 4 * 12 and pictures.pixels.shape == (96, 3, 32, 32)


def test_every_held_out_picture_of_a_known_group_is_asked_for(root: Path) -> None:
    run = config(root)
    judge = load_judge(run, modality="image")
    asked = quality.asked_for(run, judge, modality="image", num_samples=1000)
    kinds = [judge.labels[one.label] for one in asked]
    assert {kind: kinds.count(kind) for kind in KINDS} == dict.fromkeys(KINDS, 8)
    assert all(one.subject.caption.startswith(kind) for one, kind in zip(asked, kinds, strict=True))
    assert all(one.other != one.subject.caption for one in asked)
    assert len({one.subject.concept for one in asked[:16]}) == 16, "every concept once before any comes twice"
    few = quality.asked_for(run, judge, modality="image", num_samples=5)
    assert [one.subject for one in few] == [one.subject for one in asked[:5]]


def test_the_classifier_knows_new_pictures_and_is_kept(root: Path) -> None:
    run = config(root)
    judge = load_judge(run, modality="image")  # it is learned here, if no test came before
    (kept,) = root.glob("classifier-*.safetensors")
    before = kept.stat().st_mtime_ns
    again = load_judge(run, modality="image")
    assert kept.stat().st_mtime_ns == before
    for name, value in judge.classifier.state_dict().items():
        assert torch.equal(value, again.classifier.state_dict()[name])
    np.testing.assert_array_equal(judge.train.covariance, again.train.covariance)
    numbers = quality.sample_quality(build(run)[1], run, modality="image", num_samples=32)
    assert numbers["heldout/samples/image_top1_real"] > 0.9


def test_learning_is_a_function_of_its_arguments() -> None:
    pictures = torch.from_numpy(np.random.default_rng(0).random((12, 3, 32, 32), np.float32)) * 2 - 1
    label_n, concepts = torch.arange(12) % 3, [str(i // 2) for i in range(12)]

    def learned() -> Classifier:
        return train_classifier(pictures, label_n, concepts=concepts, labels="abc", steps=3)

    one, other = learned(), learned()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_what_is_seen_of_a_picture_is_seen_once() -> None:
    picture = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 64, 96)).astype(np.float32))
    assert seen(picture).shape == (2, 3, 32, 32) and seen(picture).abs().max() <= 1
    assert torch.equal(seen(seen(picture)), seen(picture))
    assert by_concept(["a", "b", "a", "a"]).tolist() == pytest.approx([1 / 3, 1, 1 / 3, 1 / 3])


def test_a_model_that_hears_no_caption_gains_nothing(root: Path) -> None:
    """Its pictures differ by their noise alone, which is the same under both captions."""
    run = config(root)
    numbers = quality.sample_quality(build(run)[1], run, modality="image", num_samples=20, draws=Draws(steps=2))
    key = "heldout/samples/image"
    assert numbers[f"{key}_top1_gain"] == 0 and f"{key}_top1_gain_z" not in numbers
    assert numbers[f"{key}_top1"] == numbers[f"{key}_top1_shuffled"]
    assert numbers[f"{key}_num_samples"] == 20 and numbers[f"{key}_num_concepts"] == 16
    assert numbers[f"{key}_frechet"] > numbers[f"{key}_frechet_real"] >= 0


def test_a_model_that_draws_what_is_asked_reaches_the_ceiling(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that paints the named kind: right for its own caption, wrong where the other is of another kind."""
    run = config(root)
    codec = quality.load_codec(run, "image")

    def painted(_: object, rows: list, *, modality: str, **__: object) -> list[MediaSpan]:
        spans = []
        for row in rows:
            (text,) = row.spans
            assert isinstance(text, TextSpan)
            picture = torch.from_numpy(pixels(text.data.decode().split()[0], 7)).movedim(2, 0)
            spans.append(codec.encode(to_signed(picture)))
        return spans

    monkeypatch.setattr(quality, "draw_media", painted)
    numbers = quality.sample_quality(build(run)[1], run, modality="image", num_samples=32)
    key = "heldout/samples/image"
    assert numbers[f"{key}_top1"] == 1.0
    judge = load_judge(run, modality="image")
    asked = quality.asked_for(run, judge, modality="image", num_samples=32)
    same = np.mean([one.other.split()[0] == one.subject.caption.split()[0] for one in asked])
    assert numbers[f"{key}_top1_shuffled"] == pytest.approx(same)
    assert numbers[f"{key}_top1_gain"] == pytest.approx(1 - same) and numbers[f"{key}_top1_gain_z"] > 3
    assert numbers[f"{key}_top1_majority"] == 0.25


def test_errors_are_clustered_by_concept() -> None:
    """Twenty pictures of two concepts that agree among themselves say as much as two."""
    score = quality.clustered(np.repeat([0.0, 1.0], 10), ["a"] * 10 + ["b"] * 10)
    assert score.value == 0.5 and score.stderr == pytest.approx(0.5)
    alone = quality.clustered(np.repeat([0.0, 1.0], 10), [str(i) for i in range(20)])
    assert alone.stderr == pytest.approx(math.sqrt(0.25 / 19))


def test_data_without_groups_are_refused(root: Path, tmp_path: Path) -> None:
    autoencoder = PatchPCA(factor=FACTOR, channels=CHANNELS)
    autoencoder.save(tmp_path / "autoencoders" / "image")
    write_pictures(tmp_path / "images", split="train", autoencoder=autoencoder, kinds=["nameless"], per_kind=4)
    with pytest.raises(DataError, match="must be of at least two groups, got \\[\\]"):
        load_judge(config(tmp_path), modality="image")


def test_a_damaged_classifier_is_named(root: Path, tmp_path: Path) -> None:
    load_judge(config(root), modality="image")
    (kept,) = root.glob("classifier-*.safetensors")
    for name in ("images", "autoencoders"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / kept.name).write_bytes(b"nothing")
    with pytest.raises(DataError, match="must be readable"):
        load_judge(config(tmp_path), modality="image")


def test_the_door_draws_and_judges_where_it_is_asked_to(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = config(root)
    weights = build(run)[0].state().weights
    tensors = {f"weights/{name}": value for name, value in weights.items()}
    tensors |= {f"ema/{name}": value / 2 for name, value in weights.items()}
    save(tmp_path / "t" / "checkpoints", 7, tensors=tensors, state={}, keep=1)
    save_resolved(run, tmp_path / "t" / "config.yaml")
    assert main([str(tmp_path / "t"), "--judged-samples", "6", "--steps", "2", "--json"]) == 0
    assert "no effect" not in caplog.text
    printed = capsys.readouterr()
    assert printed.err == "", "no bar where no terminal is"
    *shown, line = printed.out.splitlines()
    assert any("samples/image_top1 " in one and "real pictures" in one for one in shown)
    assert any("samples/image_top1_gain" in one and "captions unused" in one for one in shown)
    found = json.loads(line)
    assert main([str(tmp_path / "t"), "--guidance", "2"]) == 0
    assert "--guidance has no effect without --judged-samples" in caplog.text
    model = load_for_inference(tmp_path / "t", ema=False)[2]
    expected = quality.sample_quality(
        model, run, modality="image", num_samples=6, draws=Draws(steps=2, guidance=quality.DRAWS.guidance)
    )
    assert {name: found[name] for name in expected} == expected


def test_batches_and_steps_of_judged_pictures_are_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, heard = config(root), []
    monkeypatch.setattr(quality, "ROWS", 4)
    watched = {"draws": Draws(steps=2), "watch": lambda *step: heard.append(step)}
    quality.sample_quality(build(run)[1], run, modality="image", num_samples=6, **watched)
    names = [f"image, batch {number} of 4" for number in range(1, 5)]  # of own captions, then of others'
    assert heard == [(name, step, 2) for name in names for step in (1, 2)]
