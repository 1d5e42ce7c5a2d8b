"""sentencepiece over bytes loses nothing, the bpe patcher cuts at its pieces, and their ends are paid for."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli

from data_prep import train_sentencepiece
from matformer.config.schema import PatcherConfig
from matformer.data.patching import BpePatcher, build_patcher, text_symbols
from matformer.data.pieces import Pieces, as_bytes, as_text, load_pieces, train_pieces
from matformer.errors import DataError
from matformer.losses.text import end_nats
from matformer.shapes import END, NUM_TARGETS
from tests.made import write_text

WORDS = b"the cat sat on a mat and every dog lay under some table while rain fell over our small town".split()
TEXTS = [b"the cat sat on the mat, the dog sat on the cat  and so on\n" * 20, "perché città é così\n".encode() * 20]


@pytest.fixture(scope="module")
def pieces() -> Pieces:
    return train_pieces(TEXTS, vocabulary=300, longest=8)


def random_texts(seed: int, count: int) -> list[bytes]:
    """Bytes of every kind, words and runs of spaces among them."""
    dice = np.random.default_rng(seed)
    made = [dice.integers(0, 256, int(dice.integers(0, 40)), dtype=np.uint8).tobytes() for _ in range(count)]
    return [
        one + b" " * int(dice.integers(0, 4)) + TEXTS[i % 2][: int(dice.integers(0, 30))] for i, one in enumerate(made)
    ]


def test_a_byte_is_a_character_and_comes_back() -> None:
    every = bytes(range(256))
    assert as_text(b"a ~") == "a ~"
    assert as_text(b"\n\x00\xff") == "\u010a\u0100\u01ff"
    assert len(set(as_text(every))) == 256
    assert as_bytes(as_text(every)) == every


def test_random_bytes_come_back_from_pieces(pieces: Pieces) -> None:
    texts = [b"", b" ", b"   ", bytes(range(256)), *random_texts(0, 1000)]
    for data in texts:
        assert pieces.decode(pieces.ids(data)) == data
        assert as_bytes(pieces.processor.decode(pieces.ids(data))) == data
        lengths = pieces.lengths(data)
        assert lengths.sum() == len(data) and (lengths > 0).all()
    assert pieces.lengths(TEXTS[0]).mean() > 1.5  # it has learnt something


def test_bpe_patches_are_the_pieces_and_end_stands_alone(pieces: Pieces) -> None:
    patcher = BpePatcher(pieces, max_patch_bytes=4)
    for data in [b"", b"x", *random_texts(1, 200)]:
        lengths = patcher.lengths(text_symbols(data))
        assert lengths.dtype == np.int32 and lengths.min() > 0 and lengths.max() <= 4
        assert lengths.sum() == len(data) + 1 and lengths[-1] == 1
        cuts, of_pieces = set(np.cumsum(lengths).tolist()), np.cumsum(pieces.lengths(data)).tolist()
        assert cuts >= set(of_pieces)
        assert patcher.lengths(text_symbols(data, ended=False)).sum() == len(data)
        boundary = patcher.boundary()
        ends = np.isin(np.arange(1, len(data) + 2), list(cuts))
        said = [boundary.push(int(s), ends=bool(e)) for s, e in zip(text_symbols(data), ends, strict=True)]
        assert said == ends.tolist()


def test_the_boundary_of_a_piece_depends_on_later_bytes(pieces: Pieces) -> None:
    """Why the Coda has to be told: no rule over the bytes so far gives these cuts."""
    patcher = BpePatcher(pieces, max_patch_bytes=8)
    whole, prefix = (np.cumsum(patcher.lengths(text_symbols(data)))[:-1].tolist() for data in (b"the cat", b"th"))
    assert patcher.learned
    assert 2 in prefix and 2 not in whole


def test_nats_of_the_end_are_torchs() -> None:
    torch.manual_seed(0)
    logits, symbol = torch.randn(6, NUM_TARGETS), torch.tensor([5, 255, 0, END, 7, END])
    patch = torch.tensor([0, 0, 1, 2, 3, 3])
    ends = torch.tensor([0.0, 1, 1, 1, 0, 1])
    wanted = -Bernoulli(logits=logits[torch.arange(6), symbol]).log_prob(ends)
    assert torch.allclose(end_nats(logits, symbol, patch), wanted * (symbol != END))
    assert end_nats(torch.zeros(1, NUM_TARGETS), torch.tensor([3]), torch.tensor([0])).item() == pytest.approx(
        math.log(2)
    )
    assert end_nats(logits[:0], symbol[:0], patch[:0]).shape == (0,)


def test_the_command_writes_a_model_for_a_mean_patch(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    texts = [b" ".join(dice.choice(WORDS, size=40).tolist()) for _ in range(60)]
    for split in ("train", "heldout"):
        write_text(tmp_path / "text" / split, blocks=[texts])
    out = tmp_path / "pieces.model"
    asked = ["--data", str(tmp_path / "text"), "--out", str(out), "--threads", "1"]
    assert train_sentencepiece.main([*asked, "--mean-patch", "3.0"]) == 0
    found = load_pieces(out)
    assert train_sentencepiece.mean_patch(found, texts) == pytest.approx(3.0, rel=0.05)
    patcher = build_patcher(PatcherConfig(kind="bpe", sentencepiece=str(out)))
    assert patcher.identity() == {"kind": "bpe", "max_patch_bytes": 16, "pieces": found.fingerprint}


def test_what_cannot_be_had_is_one_sentence_and_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "heldout"):
        write_text(tmp_path / "text" / split, blocks=[TEXTS])
    out = tmp_path / "pieces.model"
    asked = ["--data", str(tmp_path / "text"), "--out", str(out), "--threads", "1"]
    for more, word in (
        (["--vocabulary", "90000"], "--vocabulary"),
        (["--mean-patch", "15"], "--mean-patch"),
        (["--vocabulary", "300", "--data", str(tmp_path / "none")], "none"),
    ):
        assert train_sentencepiece.main([*asked, *more]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and word in said
    assert not list(tmp_path.glob("*pieces*"))


def test_a_model_that_loses_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.patcher.sentencepiece"):
        load_pieces(tmp_path / "absent.model")
    (tmp_path / "text.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="must be a sentencepiece model"):
        load_pieces(tmp_path / "text.model")
