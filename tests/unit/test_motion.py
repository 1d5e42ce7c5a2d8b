"""Motion as a modality: FFmpeg's vectors and frames are the oracle, and the model's side is a config alone."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from jaxtyping import Float, UInt8

from data_prep.clips import Clip, words_of
from data_prep.film import Film, accepted, prepare
from data_prep.motion_vectors import decoded, encoded, field_of
from data_prep.quality import psnr
from matformer import sample
from matformer.autoencoders import ClipPCA, MotionField, PatchPCA, load_autoencoder
from matformer.autoencoders.motion_field import INTRA, MACROBLOCK, warp
from matformer.autoencoders.patch_pca import to_signed
from matformer.checkpoint.store import save
from matformer.config.check import check
from matformer.config.load import load_run, save_resolved
from matformer.config.schema import RunConfig
from matformer.data.loader import Loader
from matformer.data.statistics import with_statistics
from matformer.engine.baselines import compute_baselines
from matformer.engine.evaluate import evaluate
from matformer.engine.gallery import make_gallery
from matformer.engine.step import optimizer_step
from matformer.errors import DataError
from matformer.hosts.plain import PlainHost
from matformer.model import Matformer

HEIGHT, WIDTH = 96, 128
FRAMES = 80


def texture(height: int, width: int) -> UInt8[np.ndarray, "y x 3"]:
    """Smooth noise: every place looks different, and motion of a few pixels is found."""
    draws = np.random.default_rng(0).uniform(size=(3, height // 8, width // 8)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(draws)[None], size=(height, width), mode="bicubic")[0]
    return (smooth.clamp(0, 1) * 255).byte().movedim(0, 2).contiguous().numpy()


@pytest.fixture(scope="module")
def frames() -> list[UInt8[np.ndarray, "y x 3"]]:
    """What is shown moves 3 pixels to the right and 2 up a frame, on a loop."""
    world = texture(256, 384)
    rolled = [np.roll(world, (-2 * t, 3 * t), (0, 1)) for t in range(FRAMES)]
    return [np.ascontiguousarray(frame[:HEIGHT, :WIDTH]) for frame in rolled]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, frames: list[np.ndarray]) -> Path:
    """The data set of that film, in windows of 4 x 4 macroblocks."""
    out = tmp_path_factory.mktemp("film") / "film"
    terms = [{"spec": "made", "licence": "none needed", "attribution": "computed here"}]
    prepare(out, film=Film(encoded(frames, fps=16), "made", terms), num_pans=6, side=4)
    return out


def test_the_vectors_of_a_pan_are_the_pan(frames: list[np.ndarray]) -> None:
    first, *others = decoded(encoded(frames[:5], fps=16))
    assert first.field is None, "a key frame has no motion"
    for moved in others:
        assert moved.field is not None and moved.field.shape == (3, HEIGHT // MACROBLOCK, WIDTH // MACROBLOCK)
        inner = moved.field[:, 1:, 1:]  # what enters at the edges has no past
        # a block shows what stood 3 pixels left of it and 2 below
        assert np.abs(inner[:2] - np.array([-3.0, 2.0])[:, None, None]).max() <= 0.25
        assert not inner[INTRA].any()


def test_warping_by_ffmpegs_vectors_comes_near_ffmpegs_frames(frames: list[np.ndarray]) -> None:
    """Decoded frames are FFmpeg's own; the key frame repeated is what a field of zeros would give."""
    moved = list(decoded(encoded(frames[:6], fps=16)))
    real = to_signed(torch.from_numpy(np.stack([one.pixels for one in moved])).movedim(3, 1))
    fields = torch.from_numpy(np.stack([one.field for one in moved[1:] if one.field is not None]))
    frames_made = warp(real[0], fields)
    warped, repeated = psnr(frames_made, real[1:]), psnr(real[:1].expand_as(real[1:]), real[1:])
    assert (warped > repeated + 6).all()
    inner = slice(None), slice(None), slice(16, -16), slice(16, -16)
    # only what enters at the edges is unknown; but colours have half the resolution, and an odd step falls between them
    assert (psnr(frames_made[inner], real[1:][inner]) > 25).all()
    backwards = psnr(warp(real[0], fields * torch.tensor([-1.0, -1.0, 1.0])[:, None, None]), real[1:])
    assert (backwards[:2] < repeated[:2]).all(), "vectors the wrong way round make it worse"


def test_a_video_with_b_frames_is_refused(frames: list[np.ndarray]) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=16, options={"x264-params": "bframes=3:b-adapt=0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in frames[:8]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="no B-frames"):
        list(decoded(buffer.getvalue()))
    with pytest.raises(DataError, match="whole file"):
        list(decoded(encoded(frames[:2], fps=16)[:200]))


def test_parts_of_a_macroblock_become_one_vector_by_area() -> None:
    names = ("source", "w", "h", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")
    parts = [
        (-1, 16, 8, 8, 4, 8, 0, 4),  # the upper half: 2 pixels
        (-1, 8, 8, 4, 12, 0, 16, 4),  # a quarter: (0, 4)
        (-1, 8, 8, 12, 12, 0, 0, 4),  # a quarter: (0, 0)
        (-1, 8, 8, 20, 4, 40, 40, 4),  # a quarter of the second macroblock, the rest is intra
        (1, 16, 16, 24, 8, 4, 4, 4),  # from the future: not for us
    ]
    vectors = np.array(parts, dtype=[(name, np.int32) for name in names])
    field = field_of(vectors, grid=(1, 2))
    assert field[:, 0, 0].tolist() == [1.0, 1.0, 0.0]
    assert field[:, 0, 1].tolist() == [0.0, 0.0, 1.0]


def random_fields(seed: int, *, count: int = 4) -> Float[torch.Tensor, "B 3 y x"]:
    draws = np.random.default_rng(seed)
    vectors = draws.integers(-2048, 2049, (count, 2, 4, 6)) / 4
    intra = draws.uniform(size=(count, 1, 4, 6)) < 0.2
    return torch.from_numpy(np.concatenate([vectors * ~intra, intra], 1).astype(np.float32))


def test_a_field_comes_back_exactly_from_float16_and_normalisation(tmp_path: Path) -> None:
    fields = random_fields(0)
    autoencoder = MotionField.fit(fields)
    assert 0.5 < float(autoencoder.encode(fields).mean.var()) < 2
    stored = autoencoder.encode(fields).mean.half().float()
    assert torch.equal(autoencoder.decode(stored), fields)
    autoencoder.save(tmp_path)
    again = load_autoencoder(tmp_path, fingerprint=autoencoder.fingerprint)
    assert again.modality == "tensor" and again.channels == 3
    # as training reads it, and a codec writes it: a shift and a scale in float32; vectors of up to 16 pixels
    small = fields * torch.tensor([1 / 32, 1 / 32, 1.0])[:, None, None]
    small[:, :INTRA] = (small[:, :INTRA] * 4).round() / 4
    latent = autoencoder.encode(small).mean.half().float()
    normalised = (latent - 0.123) * 1.7
    assert torch.equal(again.decode(normalised / 1.7 + 0.123), small)


@pytest.mark.parametrize(("damage", "said"), [(600.0, "at most 512"), (float("nan"), "at most 512")])
def test_what_no_codec_says_is_refused(damage: float, said: str) -> None:
    fields = random_fields(1)
    fields[0, 0, 0, 0] = damage
    with pytest.raises(DataError, match=said):
        MotionField().encode(fields)
    with pytest.raises(DataError, match=r"\[3, y, x\]"):
        MotionField().encode(fields[:, :2])


def test_warping_moves_blocks_and_leaves_those_drawn_anew() -> None:
    picture = torch.arange(32 * 32.0).reshape(1, 32, 32)
    still = torch.zeros(2, 3, 2, 2)
    assert torch.allclose(warp(picture, still)[1], picture, atol=1e-3)
    shift = torch.zeros(1, 3, 2, 2)
    shift[0, :, 0, 0] = torch.tensor([2.0, 1.0, 0.0])
    shift[0, :, 1, 1] = torch.tensor([-5.0, 0.0, 1.0])  # intra: its vector counts for nothing
    moved = warp(picture, shift)[0]
    assert torch.allclose(moved[0, :16, :16], picture[0, 1:17, 2:18], atol=1e-3)
    assert torch.allclose(moved[0, 16:, 16:], picture[0, 16:, 16:], atol=1e-3)
    twice = warp(picture, shift.expand(2, -1, -1, -1))[1]
    assert torch.allclose(twice[0, :14, :13], picture[0, 2:16, 4:17], atol=1e-3)
    with pytest.raises(DataError, match="buckets"):
        warp(picture, torch.zeros(1, 3, 2, 3))


def test_words_say_where_what_is_shown_goes() -> None:
    field = np.zeros((2, 3, 4, 4), np.float32)
    assert words_of(field) == "nothing moves"
    field[:, 0] = -4.0  # what is shown stood further left: it goes right
    assert words_of(field) == "all moves, right, steadily"
    field[:, 0], field[:, 1, :2] = 0.0, 6.0
    assert words_of(field) == "much moves, up, fast"


def test_fields_that_do_not_help_are_not_accepted(tmp_path: Path, frames: list[np.ndarray]) -> None:
    moved = list(decoded(encoded(frames[:9], fps=16)))
    fields = np.stack([one.field for one in moved[1:] if one.field is not None])
    clip = Clip("own-clip", "film", np.stack([one.pixels for one in moved]), fields)
    record = accepted([clip], autoencoder=MotionField(), out=tmp_path)
    assert record.accepted and record.quality["psnr_db_warped"] > record.quality["psnr_db_repeated"] + 6
    assert (tmp_path / "contact_sheet.png").is_file()
    with pytest.raises(DataError, match="psnr_db_gain"):
        accepted([replace(clip, fields=-fields)], autoencoder=MotionField(), out=tmp_path)


def test_clips_of_one_frame_are_coded_as_pictures() -> None:
    draws = np.random.default_rng(2).integers(0, 256, (5, 3, 16, 24), dtype=np.uint8)
    pixels = torch.from_numpy(draws)
    clips = ClipPCA.fit([one[:, None] for one in pixels], frames=1, factor=8, channels=7)
    pictures = PatchPCA.fit(pixels, factor=8, channels=7)
    media = to_signed(pixels)
    ours, theirs = clips.encode(media[:, :, None]).mean[:, :, 0], pictures.encode(media).mean
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.allclose(clips.decode(ours[:, :, None])[:, :, 0], pictures.decode(theirs), atol=1e-4)
    whole = ClipPCA(frames=2, factor=4, channels=96)
    clip = torch.randn(2, 3, 4, 8, 12)
    assert whole.encode(clip).mean.shape == (2, 96, 2, 2, 3)
    assert torch.allclose(whole(clip), clip, atol=1e-5)
    with pytest.raises(DataError, match="multiples"):
        whole.encode(torch.zeros(1, 3, 3, 8, 8))


SMALL = (
    "model.atto.width=32", "model.atto.layers=1", "model.atto.heads=2", "model.atto.kv_heads=1",
    "model.atto.ffn_width=32", "model.atto.rotary_pairs=[2,2,2,2]", "model.text.width=16", "model.text.ffn_width=16",
    "model.text.ngram_rows=64", "parallel.host=plain", "parallel.threads=1", "train.steps=3", "train.warmup_steps=1",
    "train.global_batch=2", "train.micro_batch=2", "eval.media_spans=4",
    "data.sequence_latents=128", "run.wandb=disabled",
)  # fmt: skip
OF_RUN = {
    "motion": (
        "model.media.image.buckets=[[8,8]]", "model.media.motion.buckets=[[4,4]]",
        "model.media.image.coda_width=16", "model.media.motion.coda_width=16",
    ),
    "video": ("model.media.video.coda_width=16",),
}  # fmt: skip


class Terminal(io.StringIO):
    """What a person looks at."""

    def isatty(self) -> bool:
        return True


def trained(project: Path, root: Path, name: str) -> tuple[RunConfig, PlainHost, list[dict[str, float]]]:
    """Some steps of configs/run/NAME.yaml, made small by keys alone."""
    run = load_run(project / f"configs/run/{name}.yaml", (*SMALL, *OF_RUN[name], f"data.root={root}"))
    check(run)
    run = with_statistics(run)
    host = PlainHost(run)
    host.prepare(Matformer(run.model, trunk=host.build_trunk()))
    loader = Loader(run, prefetch=False)
    numbers = [
        optimizer_step(host, loader.next_global_batch(step), config=run, step=step) for step in range(run.train.steps)
    ]
    return run, host, [one.sums | {f"{part}/count": count for part, count in one.counts.items()} for one in numbers]


@pytest.mark.parametrize("name", ["motion", "video"])
def test_a_modality_trains_is_scored_and_sampled_by_its_config_alone(
    project: Path, root: Path, tmp_path: Path, name: str
) -> None:
    run, host, numbers = trained(project, root, name)
    assert run.model.media[name].channel_variance is not None, "filled in from the manifest"
    assert all(np.isfinite(list(one.values())).all() for one in numbers)
    assert all(one[f"{name}/count"] > 0 for one in numbers)
    rivals = compute_baselines(run, text_bytes=0, media_spans=4)
    assert f"{name}/gaussian_channel" in rivals.numbers
    found = evaluate(host, run, full=False, rivals=rivals)
    assert 0 < found[f"heldout/{name}/flow_loss"] < 3
    folder = tmp_path / name
    weights = host.state().weights
    tensors = {f"{kind}/{key}": value.clone() for kind in ("weights", "ema") for key, value in weights.items()}
    save(folder / "checkpoints", 3, tensors=tensors, state={}, keep=1)
    save_resolved(run, folder / "config.yaml")
    if name == "video":
        arguments = ["--text", "all moves, right", "--num", "2"]
    else:
        picture = to_picture(root, tmp_path)
        arguments = ["--text", "all moves, right", "--image", str(picture), "--spans", "2"]
    out = tmp_path / "out"
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm")
        assert sample.main([str(folder), "--want", name, "--out", str(out), "--steps", "2", *arguments]) == 0
    assert f"{name}, batch 1 of " in terminal.getvalue()
    written = json.loads((out / "samples.json").read_text())["samples"]
    if name == "video":
        assert len(written) == 2
        for (one,) in written:
            cells = run.model.media["video"].buckets
            assert tuple(one["bucket"]) in cells
            assert read_mp4(out / one["file"]).shape[:3] == tuple(
                size * step for size, step in zip(one["bucket"], (2, 8, 8), strict=True)
            )
    else:
        *fields, film = written[0]
        assert [one["modality"] for one in fields] == ["motion"] * 2 and fields[0]["file"].endswith(".npy")
        assert read_mp4(out / film["file"]).shape == (3, 64, 64, 3)
        assert np.load(out / fields[0]["file"]).shape == (3, 4, 4)
    given = out / (written[0] if name == "motion" else written[1])[0]["file"]  # what was drawn, given again
    again = ["--out", str(tmp_path / "again"), "--media", f"{name}={given}", "--max-bytes", "4", "--want", "text"]
    assert sample.main([str(folder), *again]) == 0
    record = json.loads((tmp_path / "again" / "samples.json").read_text())
    assert record["media"] == [[name, str(given)]] and record["samples"][0][0]["modality"] == "text"
    assert sample.main([str(folder), *again[:2], "--media", f"smell={given}"]) == 2
    make_gallery(folder, num_texts=0, num_images=0, num_videos=2, steps=2)
    listed = json.loads((folder / "samples" / "samples.json").read_text())[name]
    for kind in ("reconstructed", "generated"):
        assert len(read_mp4(folder / "samples" / listed[0][kind])) >= 4


def to_picture(root: Path, folder: Path) -> Path:
    from PIL import Image

    path = folder / "key.png"
    Image.fromarray(texture(64, 64)).save(path)
    return path


def read_mp4(path: Path) -> UInt8[np.ndarray, "t y x 3"]:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_one_run_holds_several_shapes_and_their_places(project: Path, root: Path) -> None:
    """Rank 3: t, y and x of every patch stand on their own rotary axes, by raster order, in each of four shapes."""
    run = load_run(project / "configs/run/video.yaml", (*SMALL, f"data.root={root}"))
    loader, seen = Loader(run, prefetch=False), set()
    for step in range(8):
        for batch in loader.next_global_batch(step):
            units = batch.media["video"]
            buckets = run.model.media["video"].buckets
            seen |= {buckets[bucket] for bucket in units.bucket_J.tolist()}
            for span, bucket in enumerate(units.bucket_J.tolist()):
                patches = [size // 2 for size in buckets[bucket]]
                expected = np.indices(patches).reshape(3, -1).T
                assert np.array_equal(units.place_NX[units.span_N == span].numpy(), expected)
            axes = batch.grid.axes_BSX.flatten(0, 1)
            assert torch.equal(axes[units.noised_slot_Q][:, 1:], units.place_NX[units.noised_row_Q])
            assert not axes[units.header_slot_J][:, 1:].any()
    assert len(seen) >= 3, f"several shapes in one run, got {seen}"


def test_no_act_of_the_model_names_motion_or_video(project: Path) -> None:
    acts = [project / "matformer" / act for act in ("preludio", "atto", "router", "coda", "losses", "layers")]
    files = [file for act in acts for file in act.glob("*.py")]
    files += [project / "matformer" / name for name in ("modalities.py", "model.py", "data/packing.py")]
    assert len(files) > 20
    named = {file.name for file in files for word in ("motion", "macroblock") if word in file.read_text().lower()}
    assert not named
