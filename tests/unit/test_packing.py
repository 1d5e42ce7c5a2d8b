"""Packing: the arrays of a small mix written out, position by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from matformer.config.schema import AttoConfig, MediaConfig, ModelConfig, RouterConfig, TextConfig, TimeSampler
from matformer.data.continued import with_before
from matformer.data.loader import pack_documents
from matformer.data.packing import (
    Noise,
    Piece,
    Place,
    build_batch,
    cut,
    document_positions,
    draw_training_noise,
    draw_zeros,
    ended,
    pack_batch,
    with_noise,
)
from matformer.data.patching import StaticPatcher
from matformer.data.sources import Document, MediaSpan, Role, TextSpan, media_span, merge_spans, text_span
from matformer.errors import DataError, ParcelError
from matformer.layers.patchify import patchify
from matformer.parallel.seeds import generator
from matformer.parcels import Batch, Kind
from matformer.shapes import BEGIN, END
from tests.made import tiny_run

PAD, START, TEXT, HEADER, NOISED, CLEAN, CLOSING = (int(kind) for kind in list(Kind)[:7])
PATCHER = StaticPatcher(2)
NO, YES = False, True


def config(*, recurrent: bool = False) -> ModelConfig:
    atto = AttoConfig(width=8, layers=1, heads=2, kv_heads=1, ffn_width=8, rotary_pairs=(1, 1, 0, 0))
    text = TextConfig(width=4, heads=1, ffn_width=4, preludio_layers=1, coda_layers=1)
    image = MediaConfig(channels=2, rank=2, patch=2, buckets=((2, 2), (2, 4)), coda_width=4)
    audio = MediaConfig(channels=1, rank=1, patch=2, buckets=((4,),), coda_width=4)
    media = {"image": image, "audio": audio}
    return ModelConfig(atto=atto, text=text, media=media, router=RouterConfig(recurrent=recurrent))


MODEL = config()


def image(role: Role) -> MediaSpan:
    return media_span(np.arange(16, dtype=np.float32).reshape(2, 2, 4), "image", media=MODEL.media["image"], role=role)


def audio(role: Role) -> MediaSpan:
    return media_span(np.arange(4, dtype=np.float32).reshape(1, 4), "audio", media=MODEL.media["audio"], role=role)


def document(key: str, *spans: bytes | MediaSpan) -> Document:
    return Document(key, merge_spans(spans, PATCHER))


def whole(document: Document) -> Piece:
    return Piece(document, Place(), Place(len(document.spans)))


def ones(key: str, span: int, shape: tuple[int, int]) -> Noise:
    return Noise(True, 0.25, np.full(shape, span + 1, np.float32))


@pytest.fixture
def mix() -> Batch:
    """Row 0: caption -> image -> text, then text alone. Row 1: the end of a cut text, then audio -> text cut short."""
    first = document("a", b"cap", image("generate"), b"z")
    second = document("b", b"hi")
    cut_text = document("c", b"abcdef")
    third = document("d", audio("given"), b"pqrs")
    rows = [
        [whole(first), whole(second)],
        [Piece(cut_text, Place(0, 2), Place(1, 0)), Piece(third, Place(), Place(1, 1))],
    ]
    return pack_batch(rows, [ones, ones], model=MODEL, sequence_latents=16)


def test_grid_of_a_small_mix_is_as_written_out(mix: Batch) -> None:
    grid = mix.grid
    assert grid.kind_BS.tolist() == [
        [START, TEXT, TEXT, HEADER, NOISED, NOISED, CLEAN, CLEAN, CLOSING, TEXT, START, TEXT, TEXT, PAD, PAD, PAD],
        [START, TEXT, TEXT, START, HEADER, CLEAN, CLEAN, CLOSING, TEXT, *[PAD] * 7],
    ]
    assert grid.modality_BS.tolist() == [
        [-1, 0, 0, 1, 1, 1, 1, 1, 1, 0, -1, 0, 0, -1, -1, -1],
        [-1, 0, 0, -1, 2, 2, 2, 2, 0, *[-1] * 7],
    ]
    assert grid.document_BS.tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, -1, -1, -1],
        [0, 0, 0, 1, 1, 1, 1, 1, 1, *[-1] * 7],
    ]
    assert grid.span_BS.tolist() == [
        [-1, -1, -1, -1, 0, 0, 1, 1, *[-1] * 8],
        [-1, -1, -1, -1, -1, 1, 1, *[-1] * 9],
    ]
    assert grid.media_BS.tolist() == [
        [-1, -1, -1, 0, 0, 0, 0, 0, 0, *[-1] * 7],
        [-1, -1, -1, -1, 0, 0, 0, 0, *[-1] * 8],
    ]
    assert grid.blind_BS.nonzero().tolist() == [[0, 3], [0, 4], [0, 5]]
    assert grid.axes_BSX[0, :, 0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8, 9, 0, 0, 0]
    assert grid.axes_BSX[1, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 7, *[0] * 7]
    # the image's grid is 1 x 2 patches: x runs; the audio's patches run along t
    assert grid.axes_BSX[0, 4:8, 1:].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert grid.axes_BSX[1, 5:7, 1:].tolist() == [[0, 0, 0], [1, 0, 0]]
    assert grid.axes_BSX[..., 1:].sum() == 3


def test_text_of_a_small_mix_is_as_written_out(mix: Batch) -> None:
    text = mix.text
    c, a, p, z, h, i, e, f, q = b"capzhiefq"
    assert text.symbol_U.tolist() == [c, a, p, END, z, END, h, i, END, e, f, END, p, q]
    assert text.coda_input_U.tolist() == [BEGIN, c, a, p, BEGIN, z, BEGIN, h, i, BEGIN, e, f, BEGIN, p]
    assert text.piece_U.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    assert text.place_U.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, 2, 0, 1]
    assert text.patch_U.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 7, 7]
    assert text.document_U.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert text.slot_P.tolist() == [1, 2, 9, 11, 12, 17, 18, 24]
    assert mix.num_bytes == 3 + 1 + 2 + 2 + 2
    assert mix.num_documents == 4
    assert mix.document_keys == ("a", "b", "c", "d")


def test_media_of_a_small_mix_are_as_written_out(mix: Batch) -> None:
    units = mix.media["image"]
    assert torch.equal(units.value_NF, patchify(torch.from_numpy(image("given").latent), rank=2, patch=2))
    assert (units.noise_QF == 1).all()
    assert units.span_N.tolist() == [0, 0]
    assert units.time_T.tolist() == [0.25]
    assert units.bucket_J.tolist() == [1]
    assert (units.header_slot_J.tolist(), units.closing_slot_J.tolist()) == ([3], [8])
    assert (units.noised_row_Q.tolist(), units.noised_slot_Q.tolist()) == ([0, 1], [4, 5])
    assert (units.clean_row_Q.tolist(), units.clean_slot_Q.tolist()) == ([0, 1], [6, 7])
    given = mix.media["audio"]
    assert given.value_NF.tolist() == [[0, 1], [2, 3]]
    assert given.noise_QF.shape == (0, 2) and given.time_T.tolist() == [0]
    assert (given.noised_row_Q.numel(), given.noised_slot_Q.numel()) == (0, 0)
    assert (given.clean_row_Q.tolist(), given.clean_slot_Q.tolist()) == ([0, 1], [21, 22])
    assert (given.header_slot_J.tolist(), given.closing_slot_J.tolist()) == ([20], [23])
    assert given.document_J.tolist() == [3]
    assert mix.counts() == {"text": 14.0, "router": 13.0, "image": 16.0, "audio": 0.0}


def test_router_questions_of_a_small_mix_are_as_written_out(mix: Batch) -> None:
    route = mix.route
    inside, after, free = [YES, NO, NO, NO, NO], [NO, YES, YES, YES, NO], [YES, YES, YES, YES, NO]
    expected = [
        (0, 0, free, NO, -1),  # start of a: text
        (1, 0, inside, NO, -1),
        (2, 1, after, YES, 1),  # caption's end: an image of bucket 1
        (8, 0, free, YES, -1),  # closing: text
        (9, 3, after, YES, -1),  # end of a
        (10, 0, free, NO, -1),
        (11, 0, inside, NO, -1),
        (12, 3, after, YES, -1),  # end of b
        (16, 0, inside, NO, -1),  # start inside a cut text
        (17, 0, inside, NO, -1),
        (18, 3, after, YES, -1),  # end of c
        (19, 2, free, NO, 0),  # start of d: audio
        (23, 0, free, YES, -1),
        # slot 24, where d's text goes on elsewhere, is not asked
    ]
    seen = zip(
        route.slot_R.tolist(),
        route.target_R.tolist(),
        route.legal_RM.tolist(),
        route.span_end_R.tolist(),
        route.bucket_R.tolist(),
        strict=True,
    )
    assert list(seen) == expected
    assert route.document_R.tolist() == [0] * 5 + [1] * 3 + [2] * 3 + [3] * 2


def test_recurrent_is_legal_only_if_the_config_allows_it() -> None:
    batch = build_batch([document("a", b"abc")], model=config(recurrent=True), sequence_latents=8)
    assert batch.route.legal_RM[:, -1].all()
    assert batch.route.legal_RM[1].tolist() == [YES, NO, NO, NO, YES]


def test_a_generated_span_that_ends_its_document_has_no_clean_copy() -> None:
    last, followed = document("a", b"c", image("generate")), document("b", b"c", image("generate"), audio("generate"))
    assert document_positions(last, model=MODEL) == 1 + 1 + 4
    assert document_positions(followed, model=MODEL) == 1 + 1 + 6 + 4
    kinds = build_batch([followed], model=MODEL, sequence_latents=12).grid.kind_BS
    assert kinds.tolist() == [
        [START, TEXT, HEADER, NOISED, NOISED, CLEAN, CLEAN, CLOSING, HEADER, NOISED, NOISED, CLOSING]
    ]


def test_text_is_cut_at_a_patch_and_media_never() -> None:
    text = document("a", b"abcdefg")  # four patches
    assert cut(text, Place(), room=3, model=MODEL) == (Piece(text, Place(), Place(0, 2)), 3)
    rest = cut(text, Place(0, 2), room=9, model=MODEL)
    assert rest is not None and rest == (Piece(text, Place(0, 2), Place(1, 0)), 3) and ended(rest[0])
    assert cut(text, Place(), room=1, model=MODEL) is None
    pair = document("b", b"c", image("generate"))
    for room in (2, 3, 4, 5):
        assert cut(pair, Place(), room=room, model=MODEL) == (Piece(pair, Place(), Place(1, 0)), 2)
    assert cut(pair, Place(1, 0), room=4, model=MODEL) is None
    assert cut(pair, Place(), room=6, model=MODEL) == (Piece(pair, Place(), Place(2, 0)), 6)


def test_a_document_cut_between_spans_is_not_asked_what_goes_on_elsewhere() -> None:
    pair = document("b", b"c", image("generate"))
    piece = Piece(pair, Place(), Place(1, 0))
    batch = pack_batch([[piece], [Piece(pair, Place(1, 0), Place(2, 0))]], [ones] * 2, model=MODEL, sequence_latents=6)
    assert batch.text.symbol_U.tolist() == [ord("c"), END]
    assert batch.route.slot_R.tolist() == [0, 6, 6 + 4]
    assert batch.route.target_R.tolist() == [0, 1, 3]
    assert batch.num_documents == 1


def test_an_absent_modality_has_rows_of_zero_length() -> None:
    batch = build_batch([document("a", b"abc")], model=MODEL, sequence_latents=4)
    assert batch.media["image"].value_NF.shape == (0, 8)
    assert batch.media["audio"].noise_QF.shape == (0, 2)
    assert batch.media["image"].clean_slot_Q.dtype == torch.int64


def test_an_open_prompt_has_no_end_and_no_question_after_it() -> None:
    prompt = Document("p", (text_span(b"abc", PATCHER, ended=False),))
    empty = Document("q", (TextSpan(b"", np.zeros(0, np.int32), ended=False),))
    batch = build_batch([prompt, empty], model=MODEL, sequence_latents=4)
    assert batch.text.symbol_U.tolist() == list(b"abc")
    assert batch.route.slot_R.tolist() == [0, 1, 4]
    assert batch.grid.kind_BS[1].tolist() == [START, PAD, PAD, PAD]


def test_neighbouring_texts_become_one_span() -> None:
    assert len(document("a", b"ab", b"", b"c", image("given"), b"d").spans) == 3


def test_a_latent_without_a_bucket_is_refused() -> None:
    for shape in ((2, 4, 4), (3, 2, 2)):
        with pytest.raises(DataError, match="buckets"):
            media_span(np.zeros(shape, np.float32), "image", media=MODEL.media["image"], role="given")


def test_a_document_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ParcelError, match="sequence_latents"):
        build_batch([document("a", b"abcdef")], model=MODEL, sequence_latents=3)


@pytest.mark.parametrize("sampler", ["uniform", "logit_normal", "mode"])
def test_training_noise_depends_on_step_lane_and_span_alone(sampler: TimeSampler) -> None:
    def draw(step: int, lane: int, span: int) -> Noise:
        noise = draw_training_noise(
            seed=0, step=step, lane=lane, blind_probability=0.5, time_shift=1.0, time_sampler=sampler
        )
        return noise("k", span, (2, 3))

    first, again = draw(1, 2, 3), draw(1, 2, 3)
    assert first.time == again.time and (first.epsilon == again.epsilon).all() and first.epsilon.dtype == np.float32
    for other in (draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4)):
        assert other.time != first.time and (other.epsilon != first.epsilon).all()
    blinds = [draw(step, 0, 0).blind for step in range(400)]
    assert 150 < sum(blinds) < 250


def test_heldout_noise_does_not_depend_on_packing() -> None:
    pair, other = document("b", b"c", image("generate")), document("x", b"yy", image("generate"))
    alone = with_noise(build_batch([pair], model=MODEL, sequence_latents=8), time=0.5, seed=0, index=3)
    rows = [[whole(other), whole(pair)]]
    packed = with_noise(pack_batch(rows, [draw_zeros], model=MODEL, sequence_latents=20), time=0.5, seed=0, index=3)
    noise = packed.media["image"].noise_QF
    assert torch.equal(noise[2:], alone.media["image"].noise_QF)
    assert (noise[:2] != noise[2:]).all()
    assert packed.media["image"].time_T.tolist() == [0.5, 0.5]
    again = with_noise(packed, time=0.5, seed=0, index=4)
    assert (again.media["image"].noise_QF != noise).all()


def test_heldout_noise_does_not_depend_on_where_batches_end() -> None:
    """A document of seven pictures, cut between rows; one that is whole has the noise of its key and its first span."""
    pictures = [text for number in range(7) for text in (b"c%d" % number, image("generate"))]
    documents = [
        document("whole", b"x", image("generate")),
        document("cut", *pictures),
        document("w", image("generate")),
    ]
    config = tiny_run()
    config = config.model_copy(update={"model": MODEL, "data": config.data.model_copy(update={"sequence_latents": 16})})
    found = []
    for rows in (1, 2, 3, 20):
        run = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": rows})})
        batches = list(pack_documents(documents, config=run))
        assert [key for batch in batches for key in batch.document_keys].count("cut") == len(batches)
        noised = [with_noise(one, time=0.5, seed=0, index=3, before=before) for one, before in with_before(batches)]
        found.append([torch.cat([one.media["image"].noise_QF for one in those]) for those in (batches, noised)])
    for those in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(those, found[0], strict=True))
    whole = generator(0, "heldout", "whole", "image", 0, 3).standard_normal(found[0][1][:2].shape, dtype=np.float32)
    assert torch.equal(found[0][1][:2], torch.from_numpy(whole))
    assert len(torch.unique(found[0][1], dim=0)) == len(found[0][1])  # no two spans have one noise
