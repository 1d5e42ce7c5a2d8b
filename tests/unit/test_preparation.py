"""Bytes of media -> arrays: whatever a file holds, it is an array or one sentence."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_prep.motion_vectors import read_film
from matformer.autoencoders import MDCTPCA, ClipPCA, PatchPCA, preparation
from matformer.autoencoders.preparation import Preparation
from matformer.autoencoders.video_frames import frames_of
from matformer.errors import DataError

RATE = 8000
PICTURES = Preparation.of(PatchPCA(factor=8, channels=4), buckets=[(4, 4)])
SOUNDS = Preparation.of(MDCTPCA(hop=160, channels=8, sample_rate=RATE), buckets=[(32,)])


def encoded(drawing: Image.Image, form: str = "png", **options: object) -> bytes:
    stream = io.BytesIO()
    drawing.save(stream, format=form, **options)
    return stream.getvalue()


def wav(wave: np.ndarray, *, rate: int = RATE) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, wave, rate, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def tone(samples: int = 2000) -> np.ndarray:
    return 0.3 * np.sin(np.arange(samples) * 0.3)


def npy(header: str) -> bytes:
    """An array file with this header and no numbers."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def exif(*entries: tuple[int, int, int, int]) -> bytes:
    """Of (tag, type, count, value)."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)


def zipped() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, np.zeros((3, 32, 32), np.float32))
    return stream.getvalue()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 32",
        "{3: 4, 'descr': '<f4', 'fortran_order': False, 'shape': (3, 32, 32)}",
        "{'descr': [3, 4], 'fortran_order': False, 'shape': (3, 32, 32)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 1099511627776, 1099511627776)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 1048576, 1048576)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 32, 32)}",
        "(" * 5000,
    ],
)
def test_an_array_with_a_damaged_header_is_one_sentence(header: str) -> None:
    with pytest.raises(DataError, match=r"must be a whole \.npy file"):
        PICTURES.read(npy(header), suffix=".npy")


@pytest.mark.parametrize("data", [zipped(), zipped()[:1000], b"", b"PK"], ids=["npz", "half", "empty", "PK"])
def test_what_is_named_npy_and_is_none_is_one_sentence(data: bytes) -> None:
    with pytest.raises(DataError, match=r"must be a whole \.npy file"):
        PICTURES.read(data, suffix=".npy")


def test_a_picture_with_damaged_exif_is_one_sentence() -> None:
    turned, unit_in_words = (0x0112, 3, 1, 6), (0x0128, 2, 4, 0x616161)
    drawing = Image.new("RGB", (32, 32), (9, 9, 9))
    assert PICTURES.read(encoded(drawing, "jpeg", exif=exif(turned)), suffix=".jpg")[0] == 0
    with pytest.raises(DataError, match="must be a whole file that pillow opens, got: error"):
        PICTURES.read(encoded(drawing, "jpeg", exif=exif(turned, unit_in_words)), suffix=".jpg")


@pytest.mark.parametrize("form", ["png", "tiff"])
def test_sixteen_bits_become_the_nearest_of_eight(form: str) -> None:
    shades = np.linspace(0, 65535, 1024).round().astype(np.uint16).reshape(32, 32)
    _, array = PICTURES.read(encoded(Image.fromarray(shades), form), suffix=f".{form}")
    assert np.array_equal(array, np.broadcast_to(np.round(shades / 257).astype(np.uint8), (3, 32, 32)))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_picture_whose_white_is_not_known_is_one_sentence(mode: str) -> None:
    with pytest.raises(DataError, match=f"must have 8 or 16 bits a channel, got pillow's mode {mode}"):
        PICTURES.read(encoded(Image.new(mode, (32, 32), 70), "tiff"), suffix=".tif")


@pytest.mark.parametrize("bucket", [(4, 4), (2, 6), (5, 3)])
@pytest.mark.parametrize("pixels", [1 << 22, 1000])
def test_padding_is_bit_for_bit_the_whole_canvas_resized(
    bucket: tuple[int, int], pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "CANVAS_PIXELS", pixels)
    made = Preparation.of(PatchPCA(factor=8, channels=4), buckets=[bucket])
    rows, columns = 8 * bucket[0], 8 * bucket[1]
    for width, height in ((90, 41), (41, 90), (64, 64), (32, 7), (7, 32), (33, 32), (1, 1), (300, 200), (500, 3)):
        colours = np.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=np.uint8)
        drawing = Image.fromarray(colours)
        canvas = max(width, -(-height * columns // rows)), max(height, -(-width * rows // columns))
        white = Image.new("RGB", canvas, (255, 255, 255))
        white.paste(drawing, ((canvas[0] - width) // 2, (canvas[1] - height) // 2), drawing)
        expected = np.asarray(white.resize((columns, rows), Image.Resampling.LANCZOS))
        assert np.array_equal(made.read(encoded(drawing), suffix=".png")[1], expected.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(40_000, 10), (10, 40_000)])
def test_a_long_flat_picture_is_padded_in_little_memory(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    new = Image.new

    def counted(mode: str, size: tuple[int, int], *more: tuple[int, int, int]) -> Image.Image:
        made.append(size[0] * size[1])
        return new(mode, size, *more)

    data = encoded(Image.new("RGB", size, (9, 9, 9)))
    monkeypatch.setattr(Image, "new", counted)
    _, array = PICTURES.read(data, suffix=".png")
    assert (array[:, 15:17, 15:17] < 255).any() and (array[:, 0, 0] == 255).all()
    assert 0 < max(made) <= preparation.CANVAS_PIXELS


def test_what_does_not_fit_into_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("matformer.autoencoders.preparation.resampled", none_left)
    with pytest.raises(DataError, match="must fit into memory, got one of 4044 bytes"):
        SOUNDS.read(wav(tone(), rate=16000), suffix=".wav")
    monkeypatch.setattr(Image, "open", none_left)
    with pytest.raises(DataError, match="that pillow opens, got: MemoryError"):
        PICTURES.read(b"", suffix=".gif")


@pytest.mark.parametrize("rate", [1, 999, 1_000_003, 1_744_918_665])
def test_a_sound_at_a_rate_that_is_none_is_one_sentence(rate: int) -> None:
    data = bytearray(wav(tone()))
    data[24:28] = struct.pack("<I", rate)
    with pytest.raises(DataError, match="must have a rate within"):
        SOUNDS.read(bytes(data), suffix=".wav")


TURNS = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
"""Degrees clockwise that a player turns a video by -> a, b, c, d of QuickTime's matrix: x' = ax + cy, y' = bx + dy."""


def film(*, clockwise: int) -> bytes:
    """48 x 32 pixels, stored with the left third red; the track's matrix says how it is held."""
    av = pytest.importorskip("av")
    stream, frame = io.BytesIO(), np.zeros((32, 48, 3), np.uint8)
    frame[:, :16] = (255, 0, 0)
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("mpeg4", rate=8)
        track.width, track.height, track.pix_fmt = 48, 32, "yuv420p"
        for _ in range(8):
            container.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(track.encode())
    data = bytearray(stream.getvalue())
    a, b, c, d = (value << 16 for value in TURNS[clockwise])
    start = data.index(b"tkhd") + 44  # version, times, number, duration, layer, group, volume come before
    assert struct.unpack_from(">9i", data, start) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, start, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(data)


@pytest.mark.parametrize(
    ("clockwise", "red", "blank"),
    [
        (0, np.s_[:, :12], np.s_[:, 20:]),
        (90, np.s_[:12, :], np.s_[20:, :]),  # what was left is now above
        (180, np.s_[:, 36:], np.s_[:, :28]),
        (270, np.s_[36:, :], np.s_[:28, :]),
    ],
)
def test_a_video_stands_as_its_camera_was_held(
    clockwise: int, red: tuple[slice, ...], blank: tuple[slice, ...]
) -> None:
    data = film(clockwise=clockwise)
    size = (32, 48) if clockwise % 180 == 0 else (48, 32)
    read, _, foreign = read_film(data)
    for frame in (frames_of(data, fps=8, most=1)[0], read[0]):
        assert frame.shape == (*size, 3)
        assert frame[red][..., 0].mean() > 200 and frame[blank].mean() < 40
    made = Preparation.of(ClipPCA(frames=2, factor=8, channels=4), buckets=[(2, 6, 4), (2, 4, 6)])
    assert made.buckets[made.read(data, suffix=".mp4")[0]][1:] == tuple(side // 8 for side in size)
    assert foreign  # MPEG-4 part 2


@pytest.mark.parametrize("form", ["WAV", "AIFF"])
def test_a_sound_that_breaks_off_is_one_sentence_and_a_stream_is_taken(form: str) -> None:
    stream = io.BytesIO()
    soundfile.write(stream, tone(), RATE, format=form, subtype="PCM_16")
    whole = stream.getvalue()
    expected = SOUNDS.read(whole, suffix=".wav")[1]
    with pytest.raises(DataError, match="got 1999 bytes less"):
        SOUNDS.read(whole[:-2000], suffix=".wav")
    for size in (0, 0xFFFFFFFF, 0x7FFFF024):
        head = whole[:4] + struct.pack("<I" if form == "WAV" else ">I", size)
        assert np.array_equal(SOUNDS.read(head + whole[8:], suffix=".wav")[1], expected)
    longer = struct.pack("<I" if form == "WAV" else ">I", len(whole) - 8 + 1)
    assert np.array_equal(SOUNDS.read(whole[:4] + longer + whole[8:], suffix=".wav")[1], expected)


def test_a_video_may_have_a_title_that_is_no_utf8() -> None:
    av = pytest.importorskip("av")
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as container:
        container.metadata["title"] = "titel"
        track = container.add_stream("mpeg4", rate=8)
        track.width, track.height, track.pix_fmt = 32, 32, "yuv420p"
        for _ in range(3):
            container.mux(track.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(track.encode())
    data = stream.getvalue().replace(b"titel", b"tit\xe9l")
    assert b"tit\xe9l" in data and len(frames_of(data, fps=8, most=9)) == 3
