"""A sentencepiece model over bytes that loses nothing: every byte string comes back as it was."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Int

from matformer.errors import DataError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space inside a piece
_CHARACTERS = [chr(byte) if 0x20 <= byte <= 0x7E else chr(0x100 + byte) for byte in range(256)]
_BYTE_OF = {character: byte for byte, character in enumerate(_CHARACTERS)} | {_SPACE: 0x20}
_LONGEST_SENTENCE = 4096


def as_text(data: bytes) -> str:
    """A character a byte: printable ASCII itself, the others U+0100 + byte. Source: SEMANTICS, Text."""
    return data.decode("latin-1").translate(_TO_TEXT)


def as_bytes(text: str) -> bytes:
    """The inverse of `as_text`; sentencepiece's sign for a space is one too."""
    return bytes(_BYTE_OF[character] for character in text)


_TO_TEXT = dict(enumerate(_CHARACTERS))


class Pieces:
    """What cuts bytes into pieces of a vocabulary."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def __len__(self) -> int:
        return self.processor.vocab_size()

    @property
    def unknown(self) -> int:
        """The number that sentencepiece keeps for what it does not know; of ours it stands for nothing."""
        return self.processor.unk_id()

    def ids(self, data: bytes) -> list[int]:
        """The pieces' numbers."""
        return self.processor.encode(as_text(data), out_type=int)

    def lengths(self, data: bytes) -> Int[np.ndarray, " pieces"]:
        """How many bytes each piece holds."""
        return np.array([len(piece) for piece in self.processor.encode(as_text(data), out_type=str)], np.int32)

    @cached_property
    def number_of(self) -> dict[bytes, int]:
        """The number of each piece's bytes; sentencepiece's own sign for the unknown stands for none."""
        numbers = (number for number in range(len(self)) if number != self.unknown)
        return {as_bytes(self.processor.id_to_piece(number)): number for number in numbers}

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of pieces."""
        return b"".join(as_bytes(self.processor.id_to_piece(number)) for number in ids)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model: what a data set's manifest remembers."""
        return hashlib.sha256(self.model).hexdigest()


def load_pieces(path: Path) -> Pieces:
    """Raises DataError if there is none, or it is not one of ours: some byte would be lost."""
    if not path.is_file():
        raise DataError(
            f"{path} must be a sentencepiece model, got nothing there; make it with "
            "`python -m data_prep.train_sentencepiece` or change data.patcher.sentencepiece"
        )
    try:
        pieces = Pieces(path.read_bytes())
    except RuntimeError as error:
        raise DataError(
            f"{path} must be a sentencepiece model, got a file that is none ({error}); change "
            "data.patcher.sentencepiece"
        ) from error
    every_byte = bytes(range(256)) + b"  a  "
    known = all(number != pieces.unknown for number in pieces.ids(every_byte))
    if not known or pieces.decode(pieces.ids(every_byte)) != every_byte:
        raise DataError(
            f"{path} must give every byte back, got one that does not; make it with "
            "`python -m data_prep.train_sentencepiece` or change data.patcher.sentencepiece"
        )
    return pieces


def train_pieces(texts: Iterable[bytes], *, vocabulary: int, longest: int, threads: int = 1) -> Pieces:
    """Byte-pair merges of whole documents, in stretches of a few kB. Raises DataError if `vocabulary` cannot be had."""
    stretches = (
        as_text(text[first : first + _LONGEST_SENTENCE])
        for text in texts
        for first in range(0, len(text), _LONGEST_SENTENCE)
    )
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=stretches,
            model_writer=written,
            model_type="bpe",
            vocab_size=vocabulary,
            required_chars="".join(character for character in _CHARACTERS if character != " "),
            character_coverage=1.0,
            max_sentencepiece_length=longest,
            max_sentence_length=8 * _LONGEST_SENTENCE,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = re.sub(r"\s+", " ", str(error)).strip()
        raise DataError(
            f"a vocabulary of {vocabulary} pieces must be learnt from the text, sentencepiece says: {reason}; change "
            "--vocabulary or --data"
        ) from error
    return Pieces(written.getvalue())
