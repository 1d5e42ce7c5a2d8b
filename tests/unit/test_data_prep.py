"""Data preparation: what the shards hold, what never leaks over the split, and what a half-made folder turns into."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import minimal
from data_prep.albums import Shown, all_albums
from data_prep.archives import members
from data_prep.clean import cut, strip_markup, without_duplicates
from data_prep.demo import COMPLETE, finished_kind, main, prepare_demo, prepare_minimal, split, summary
from data_prep.fetch import Package, fetch
from data_prep.pictures import base_of, concept_of, framed
from data_prep.records import Document
from data_prep.speech import SAMPLE_RATE
from data_prep.write import npy, static_patches
from matformer.autoencoders import load_autoencoder
from matformer.autoencoders.sound import levelled, resampled, trimmed
from matformer.config.schema import PatcherConfig
from matformer.data.patching import build_patcher, text_symbols
from matformer.data.shards import ShardReader
from matformer.data.texts import first_texts
from matformer.errors import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "demo"
    prepare_minimal(out)
    return out


def array(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data))


def described(folder: Path) -> list[dict]:
    reader = ShardReader(folder)
    return [json.loads(reader.read(i)["json"]) for i in range(len(reader))]


def test_every_set_has_both_splits_and_says_that_it_is_synthetic(root: Path) -> None:
    for name, form in (("text", "text"), ("images", "pairs"), ("speech", "pairs"), ("albums", "documents")):
        for side in ("train", "heldout"):
            reader = ShardReader(root / name / side)
            assert len(reader) > 0
            assert reader.manifest["form"] == form
            assert reader.manifest["origin"] == "synthetic"
    assert json.loads((root / COMPLETE).read_bytes())["kind"] == "synthetic"
    assert finished_kind(root) == "synthetic"


def test_text_blocks_cut_into_documents_and_patches(root: Path) -> None:
    reader = ShardReader(root / "text" / "train")
    assert reader.manifest["patcher"] == {"kind": "static", "patch_bytes": 4}
    for i in range(len(reader)):
        block = reader.read(i)
        offsets, patches = array(block["docs.npy"]), array(block["patches.npy"])
        assert offsets.dtype == np.int64 and patches.dtype == np.int32
        assert offsets[0] == 0 and offsets[-1] == len(block["bytes"])
        assert len(json.loads(block["json"])) == len(offsets) - 1
        assert np.diff(offsets).max() <= 8192
        assert patches.sum() == len(block["bytes"]) + len(offsets) - 1
        block["bytes"][offsets[0] : offsets[1]].decode()


def test_held_out_documents_are_not_in_train(root: Path) -> None:
    files = {
        side: {entry["key"].rsplit("#", 1)[0] for block in described(root / "text" / side) for entry in block}
        for side in ("train", "heldout")
    }
    assert files["train"] and files["heldout"] and not files["train"] & files["heldout"]


@pytest.mark.parametrize("name", ["images", "speech"])
def test_no_style_of_a_held_out_concept_is_in_train(root: Path, name: str) -> None:
    bases = {side: {entry["base"] for entry in described(root / name / side)} for side in ("train", "heldout")}
    assert bases["train"] and bases["heldout"] and not bases["train"] & bases["heldout"]


def test_albums_show_pictures_of_their_own_split_only(root: Path) -> None:
    for side in ("train", "heldout"):
        own = {entry["key"] for entry in described(root / "images" / side)}
        reader = ShardReader(root / "albums" / side)
        for i in range(len(reader)):
            sample = reader.read(i)
            spans = json.loads(sample["json"])["spans"]
            shown = [span for span in spans if "modality" in span]
            assert len(shown) > 1 and {span["role"] for span in shown} <= {"given", "generate"}
            assert {span["key"] for span in shown} <= own
            assert all(array(sample[span["member"]]).shape == (32, 8, 8) for span in shown)


def test_train_latents_normalise_to_mean_zero_and_mean_variance_one(root: Path) -> None:
    for name in ("images", "speech"):
        reader = ShardReader(root / name / "train")
        latents = reader.manifest["latents"]
        cells = [array(reader.read(i)["moments.npy"]).reshape(len(latents["shift"]), -1) for i in range(len(reader))]
        normal = (np.concatenate(cells, 1).astype(np.float64) - np.array(latents["shift"])[:, None]) * latents["scale"]
        np.testing.assert_allclose(normal.mean(1), 0, atol=1e-6)
        np.testing.assert_allclose(normal.var(1).mean(), 1, rtol=1e-6)
        assert latents == ShardReader(root / name / "heldout").manifest["latents"]


def test_stored_latents_decode_to_the_pictures_that_were_drawn(root: Path) -> None:
    reader = ShardReader(root / "images" / "train")
    identity = reader.manifest["autoencoder"]
    autoencoder = load_autoencoder(root / identity["folder"], fingerprint=identity["fingerprint"])
    drawn = {picture.key: picture.pixels for picture in minimal.pictures()}
    latent = torch.from_numpy(array(reader.read(0)["moments.npy"]))[None].float()
    decoded = ((autoencoder.decode(latent)[0].movedim(0, 2) + 1) * 127.5).numpy()
    assert np.abs(decoded - drawn[reader.key(0)]).mean() < 6


def test_sounds_fill_their_bucket_with_encoded_silence(root: Path) -> None:
    reader = ShardReader(root / "speech" / "train")
    lengths = set()
    for i in range(len(reader)):
        sample = reader.read(i)
        entry, latent = json.loads(sample["json"]), array(sample["moments.npy"])
        assert list(latent.shape) == [64, *entry["bucket"]] and latent.dtype == np.float16
        assert not latent[:, entry["length"] :].any()
        assert latent[:, : entry["length"]].any()
        lengths.add(entry["length"])
    assert lengths == {21, 56, 116}  # 0.4, 1.1, 2.3 s of 50 cells a second, and one for the two half frames


def test_every_sample_of_a_style_has_a_wrong_caption_to_be_compared_with(root: Path) -> None:
    reader = ShardReader(root / "images" / "train")
    groups = reader.manifest["groups"]
    assert sorted(key for bases in groups.values() for keys in bases.values() for key in keys) == sorted(
        reader.key(i) for i in range(len(reader))
    )
    assert all(len(bases) > 1 for bases in groups.values())


def test_a_complete_folder_is_left_alone(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    prepare_minimal(root)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_preparing_twice_gives_the_same_shards(root: Path, tmp_path: Path) -> None:
    prepare_minimal(tmp_path / "again")
    for path in sorted(root.rglob("*.tar")) + sorted(root.rglob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(root)).read_bytes()


def test_what_a_killed_preparation_left_is_not_trusted(tmp_path: Path) -> None:
    left = tmp_path / ".demo.partial" / "images"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    prepare_minimal(tmp_path / "demo")
    assert finished_kind(tmp_path / "demo") == "synthetic"
    assert not (tmp_path / "demo" / "images" / "half").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".demo.lock", "demo"]


def test_a_folder_with_other_things_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="must be empty"):
        prepare_minimal(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert main(["--minimal", "--out", str(tmp_path)]) == DataError.exit_code


def test_a_synthetic_set_is_not_taken_for_the_demo_nor_the_demo_for_it(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold the demo data set, got the synthetic one.*data\.recipe=null"):
        prepare_demo(root, tmp_path / "cache")
    assert finished_kind(root) == "synthetic"
    report = json.loads((root / COMPLETE).read_bytes())
    (tmp_path / COMPLETE).write_text(json.dumps(report | {"kind": "demo"}))
    with pytest.raises(DataError, match="must hold the synthetic data set, got the demo one"):
        prepare_minimal(tmp_path)
    assert main(["--minimal", "--out", str(tmp_path)]) == DataError.exit_code
    assert finished_kind(tmp_path) == "demo"


def test_the_final_table_names_every_set(root: Path) -> None:
    assert summary(root).row_count == 7


def test_a_model_and_a_threshold_for_entropy_patches_stand_beside_the_text(root: Path) -> None:
    found = json.loads((root / "demo.json").read_bytes())["entropy"]
    config = PatcherConfig(kind="entropy", entropy_model=str(root / "entropy"), threshold=found["threshold"])
    patcher = build_patcher(config)
    texts = list(first_texts(root / "text" / "train", num_bytes=20_000))
    lengths = np.concatenate([patcher.lengths(text_symbols(text)) for text in texts])
    assert lengths.mean() == pytest.approx(found["mean_patch"], rel=0.2)  # the threshold was picked on other texts too


def test_parts_of_a_long_text_join_to_it_and_end_at_lines() -> None:
    text = ("a line of some words\n" * 50 + "é" * 700).encode()
    parts = cut(text, max_bytes=500)
    assert b"".join(parts) == text
    assert max(map(len, parts)) <= 500
    assert all(part.endswith(b"\n") for part in parts[:2])
    assert all(part.decode() for part in parts)
    assert cut(b"short") == [b"short"]


def test_static_patches_end_with_the_end_symbol() -> None:
    lengths = static_patches(np.array([0, 3, 4, 9]), patch_bytes=4)
    assert lengths.tolist() == [1, 4, 4, 1, 4, 4, 2]


def test_markup_and_credits_go_and_entities_are_characters() -> None:
    page = "<page><info><name>Someone</name></info><title>A &amp; B</title>\n\n  <p>text</p></page>"
    assert strip_markup(page) == "A & B\ntext"


def test_exact_duplicates_and_empty_texts_go() -> None:
    documents = [Document("s", "en", str(i), text, str(i)) for i, text in enumerate(["a", "b", "a", " "])]
    assert [document.key for document in without_duplicates(documents)] == ["0", "1"]


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("1F44B-1F3FD", "1F44B"),  # waving hand, medium skin tone
        ("1F468-200D-2695-FE0F", "1F9D1"),  # man health worker: a person
        ("1F469-1F3FF-200D-1F33E", "1F9D1"),  # woman farmer, dark skin tone
        ("1F3C3-200D-2640-FE0F", "1F3C3"),  # woman running
        ("1F408-200D-2B1B", "1F408"),  # black cat: a cat
        ("1F1EB-1F1F7", "1F1EB-1F1F7"),  # flag of France, apart from that of Finland
        ("1F478", "1FAC5"),  # princess: person with crown
        ("1F3FB", "1F3FB"),  # the skin tone itself
    ],
)
def test_variants_share_their_base(variant: str, base: str) -> None:
    assert base_of(concept_of(variant)) == base


def test_pictures_stand_on_white_in_the_middle() -> None:
    from PIL import Image  # noqa: PLC0415

    buffer = io.BytesIO()
    Image.new("RGBA", (128, 64), (255, 0, 0, 255)).save(buffer, format="PNG")
    pixels = framed(buffer.getvalue())
    assert pixels.shape == (64, 64, 3)
    assert pixels[32, 32].tolist() == [255, 0, 0] and pixels[2, 32].tolist() == [255, 255, 255]


def test_resampling_keeps_a_tone_and_drops_what_cannot_be_held() -> None:
    time = np.arange(22050) / 22050
    tone = np.sin(2 * np.pi * 440 * time)
    low = resampled(tone + np.sin(2 * np.pi * 6000 * time), rate=22050, to=SAMPLE_RATE)
    assert len(low) == SAMPLE_RATE
    expected = np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    np.testing.assert_allclose(low[500:-500], expected[500:-500], atol=0.02)


def test_levels_are_alike_and_silence_at_the_ends_goes() -> None:
    wave = np.concatenate([np.zeros(50), 0.01 * np.sin(np.arange(1, 801)), np.zeros(50)]).astype(np.float32)
    assert len(trimmed(wave)) <= 800
    np.testing.assert_allclose(np.sqrt(np.mean(levelled(trimmed(wave)) ** 2)), 0.08, rtol=1e-4)
    assert not levelled(np.zeros(10, np.float32)).any()


def test_albums_take_turns_between_words_and_pictures() -> None:
    albums = all_albums(minimal.pictures())
    assert albums and len({album.key for album in albums}) == len(albums)
    for album in albums:
        assert [isinstance(part, Shown) for part in album.parts] == [False, True] * (len(album.parts) // 2)
    assert {album.language for album in albums} == {"en", "fr"}


def test_a_split_too_small_for_its_share_holds_one_out_all_the_same() -> None:
    parts = split(["a", "a", "b"], name=str, one_in=10**12)
    assert len(set(parts["heldout"])) == 1 and not set(parts["train"]) & set(parts["heldout"])


def test_arrays_are_written_as_plain_npy() -> None:
    data = npy(np.arange(6).reshape(2, 3).T)
    assert data[6:8] == b"\x01\x00"
    assert b"'fortran_order': False" in data[:80]


def test_members_are_read_from_wheels_and_tarballs(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("p/x.json", "1")
        wheel.writestr("p/y.txt", "2")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tarball:
        tarball.add(tmp_path / "a.whl", "package/x.json")
    assert list(members(tmp_path / "a.whl", suffix=".json")) == [("p/x.json", b"1")]
    assert [name for name, _ in members(tmp_path / "a.tgz", suffix=".json")] == ["package/x.json"]


def test_a_damaged_download_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"a\.whl must be a readable archive"):
        list(members(tmp_path / "a.whl", suffix=".json"))


def test_a_missing_client_drops_its_packages_unless_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch(tmp_path, packages=[Package("npm", "thing@1", "thing-*.tgz", "MIT", "someone")]) == {}
    with pytest.raises(DataError, match="needs the package thing@1"):
        fetch(tmp_path, packages=[Package("npm", "thing@1", "thing-*.tgz", "MIT", "someone", core=True)])


def test_what_lies_in_the_cache_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "thing-1.tgz").write_bytes(b"here")
    (tmp_path / ".download-killed").mkdir()
    package = Package("npm", "thing@1", "thing-*.tgz", "MIT", "someone", core=True)
    assert fetch(tmp_path, packages=[package]) == {"thing@1": tmp_path / "thing-1.tgz"}
    assert not (tmp_path / ".download-killed").exists()
