"""A small byte model that says how uncertain the next symbol is: where a patch begins under the entropy patchers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.data.scoring import LONGEST_KEY, ContextMemo, context_keys, entropies_of_normed, entropy_of
from matformer.errors import DataError
from matformer.layers.local_attention import LocalBlock, local_view
from matformer.layers.ngrams import NgramEmbedding, NgramSettings, ngram_hashes
from matformer.layers.norm import RMSNorm, rms_norm
from matformer.layers.saved import Saved, saved
from matformer.shapes import BEGIN, NUM_SYMBOLS, NUM_TARGETS

SETTINGS_FILE, WEIGHTS_FILE = "entropy.json", "entropy.safetensors"
ROW_SYMBOLS, LOOKUP_ROW_SYMBOLS = 1 << 14, 1 << 16
"""Symbols that are scored at once, with layers and without: memory stays flat however long a document is."""

REMEMBERED = 1 << 14
"""Exact entropies that are kept: of short contexts the same come again."""


@dataclass(frozen=True, slots=True)
class EntropySettings:
    """Sizes of the model. ngrams: sizes of hashed n-grams, `ngram_rows` rows of each.

    heads, ffn_width, window (symbols looked back): of the layers. With none the model is a sum of lookups and a head,
    which in the seconds that the demo has learns more than one with attention, and scores in a fraction of the time.
    """

    width: int = 32
    heads: int = 2
    ffn_width: int = 128
    layers: int = 0
    window: int = 32
    ngrams: tuple[int, ...] = (2, 3, 4, 5)
    ngram_rows: int = 32768

    @property
    def sight(self) -> int:
        """Inputs that a prediction can depend on, its own included."""
        return self.layers * (self.window - 1) + max(self.ngrams, default=1)


class EntropyModel(nn.Module):
    """Logits of the next symbol after `<begin>` and each byte, from those shortly before. Source: BLT, section 2.3."""

    def __init__(self, settings: EntropySettings) -> None:
        super().__init__()
        self.settings = settings
        width = settings.width
        self.embedding = nn.Embedding(NUM_SYMBOLS, width)
        sizes = NgramSettings(settings.ngrams, rows=settings.ngram_rows, gain=8.0)
        self.ngram_embedding = NgramEmbedding(width, sizes) if settings.ngrams else None
        self.blocks = nn.ModuleList(
            LocalBlock(width, settings.heads, inner=settings.ffn_width) for _ in range(settings.layers)
        )
        self.output_norm = RMSNorm(width)
        self.head = nn.Linear(width, NUM_TARGETS, bias=False)

    def forward(
        self, symbol_U: Int[Tensor, " U"], piece_U: Int[Tensor, " U"], place_U: Int[Tensor, " U"]
    ) -> Float[Tensor, "U 257"]:
        """`symbol` are inputs of pieces one after the other; nothing crosses from piece to piece."""
        return self.head(self.output_norm(self.hidden(symbol_U, piece_U, place_U)))

    def hidden(
        self, symbol_U: Int[Tensor, " U"], piece_U: Int[Tensor, " U"], place_U: Int[Tensor, " U"]
    ) -> Float[Tensor, "U D"]:
        """What stands before the output norm."""
        x_UD = self.looked_up(symbol_U, self.ngram_hashes(symbol_U, place_U))
        if self.settings.layers:
            head_size = self.settings.width // self.settings.heads
            view = local_view(piece_U, place_U, window=self.settings.window, head_size=head_size)
            for block in self.blocks:
                x_UD = block(x_UD, view)
        return x_UD

    def ngram_hashes(self, symbol_U: Int[Tensor, " U"], place_U: Int[Tensor, " U"]) -> Int[Tensor, "U n"]:
        """Of the n-grams that end with each symbol, one a size."""
        sizes = self.settings.ngrams
        return ngram_hashes(symbol_U, place_U, sizes=sizes) if sizes else symbol_U.new_empty(len(symbol_U), 0)

    def looked_up(self, symbol_U: Int[Tensor, " U"], hash_Un: Int[Tensor, "U n"]) -> Float[Tensor, "U D"]:
        """What enters the first layer, from symbols and the hashes of their n-grams: they need not stand together."""
        x_UD = self.embedding(symbol_U)
        return x_UD if self.ngram_embedding is None else x_UD + self.ngram_embedding.of_hashes(hash_Un)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of settings and weights: what a data set's manifest remembers of the model that cut it."""
        return self._saved().fingerprint

    def save(self, folder: Path) -> None:
        """Write settings and weights into `folder`, which is made when missing."""
        self._saved().write(folder, settings_file=SETTINGS_FILE, weights_file=WEIGHTS_FILE)

    def _saved(self) -> Saved:
        return saved(self, asdict(self.settings), sort_keys=False)


def load_entropy_model(folder: Path) -> EntropyModel:
    """What `EntropyModel.save` wrote. Raises DataError if a file is missing, damaged or of another model."""
    try:
        tree = json.loads((folder / SETTINGS_FILE).read_bytes())
        model = EntropyModel(EntropySettings(**{**tree, "ngrams": tuple(tree["ngrams"])}))
        model.load_state_dict(safetensors.torch.load((folder / WEIGHTS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(
            f"{folder} must hold an entropy model ({SETTINGS_FILE}, {WEIGHTS_FILE}), got: {error}; train one with "
            "`python -m data_prep.train_entropy_model` or set data.patcher.entropy_model"
        ) from error
    return model.eval().requires_grad_(False)


def input_symbols(data: bytes | np.ndarray) -> Int[np.ndarray, " n1"]:
    """`<begin>` and the bytes: after input i the model predicts symbol i of the bytes and `<end>`."""
    symbols = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    return np.concatenate([[BEGIN], symbols.astype(np.int64)])


@torch.no_grad()
def entropies(model: EntropyModel, documents: Sequence[bytes]) -> list[Float[np.ndarray, " n1"]]:
    """Of each document: H(symbol i | bytes before i) in nats, i = 0 .. n (the last symbol is `<end>`); float32.

    Documents are scored side by side in rows of bounded length; a longer one is cut into pieces that begin with
    as much of what stands before them as the model can see. Memory beside the result does not grow with the documents.
    """
    found: list[list[np.ndarray]] = [[] for _ in documents]
    score = _Scorer(model, num_symbols=sum(map(len, documents)) + len(documents))
    longest = ROW_SYMBOLS if model.settings.layers else LOOKUP_ROW_SYMBOLS
    for pieces in _rows(documents, longest=longest, sight=model.settings.sight):
        lengths = np.array([piece.end - piece.first for piece in pieces])
        ends = np.cumsum(lengths)
        numbers = np.repeat(np.arange(len(pieces)), lengths)
        places = np.arange(ends[-1]) + (np.array([piece.first for piece in pieces]) - ends + lengths)[numbers]
        nats = score(_inputs(pieces, documents, places=places), numbers, places)
        for piece, end in zip(pieces, ends.tolist(), strict=True):
            found[piece.document].append(nats[end - piece.end + piece.scored_from : end])
    return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in found]


class _Scorer:
    """Entropies after each input of a row of pieces.

    Without attention a prediction depends on a few symbols, most of which stand together many times in a text: those
    are scored once, as long as the memo knows them.
    """

    def __init__(self, model: EntropyModel, *, num_symbols: int) -> None:
        self._model = model
        self._head_VD = model.head.weight * model.output_norm.weight
        short = not model.settings.layers and model.settings.sight <= LONGEST_KEY
        self._memo = ContextMemo(num_symbols, self._head_VD.dtype) if short else None

    def __call__(self, inputs: np.ndarray, numbers: np.ndarray, places: np.ndarray) -> np.ndarray:
        """`numbers` say of each input to which piece it belongs, `places` where it stands in its document."""
        model = self._model
        symbol_U, piece_U, place_U = map(torch.from_numpy, (inputs, numbers, places))
        if self._memo is None:
            return self._of(model.hidden(symbol_U, piece_U, place_U))
        hash_Un = model.ngram_hashes(symbol_U, place_U)

        def score(chosen: np.ndarray) -> np.ndarray:
            chosen_R = torch.from_numpy(chosen)
            return self._of(model.looked_up(symbol_U[chosen_R], hash_Un[chosen_R]))

        return self._memo(context_keys(inputs, places, length=model.settings.sight), score)

    def _of(self, hidden_UD: Float[Tensor, "U D"]) -> Float[np.ndarray, " U"]:
        no_weight = hidden_UD.new_ones(hidden_UD.shape[1])  # the norm's own is in the head
        normed_UD = rms_norm(hidden_UD, no_weight, epsilon=self._model.output_norm.epsilon)
        return entropies_of_normed(normed_UD, self._head_VD).numpy()


class _Piece(NamedTuple):
    """Inputs `first` to `end` of a document; those before `scored_from` are context, scored elsewhere."""

    document: int
    first: int
    end: int
    scored_from: int


def _inputs(pieces: Sequence[_Piece], documents: Sequence[bytes], *, places: np.ndarray) -> Int[np.ndarray, " U"]:
    """As `input_symbols` gives them, piece after piece."""
    data = b"".join([documents[piece.document][max(0, piece.first - 1) : piece.end - 1] for piece in pieces])
    inputs = np.full(len(places), BEGIN, np.int64)
    inputs[places > 0] = np.frombuffer(data, np.uint8)
    return inputs


def _rows(documents: Sequence[bytes], *, longest: int, sight: int) -> Iterator[list[_Piece]]:
    row: list[_Piece] = []
    size = 0
    for piece in _pieces(documents, longest=longest, sight=sight):
        length = piece.end - piece.first
        if row and size + length > longest:
            yield row
            row, size = [], 0
        row.append(piece)
        size += length
    if row:
        yield row


def _pieces(documents: Sequence[bytes], *, longest: int, sight: int) -> Iterator[_Piece]:
    for number, data in enumerate(documents):
        for begin in range(0, len(data) + 1, longest):
            yield _Piece(number, max(0, begin - sight + 1), min(begin + longest, len(data) + 1), begin)


class ExactEntropy:
    """H after one prefix, the same number however a document came: in float64, over rows of one fixed shape.

    A prediction depends on the last `sight` inputs alone; they stand at the end of a row whose rest is another piece.
    """

    def __init__(self, model: EntropyModel) -> None:
        double = EntropyModel(model.settings)
        double.load_state_dict(model.state_dict())
        self._model = double.double().eval().requires_grad_(False)
        self._sight = model.settings.sight
        self._known = lru_cache(REMEMBERED)(self._after)

    def __call__(self, inputs: Int[np.ndarray, " n1"]) -> float:
        """Nats of the symbol after all of these inputs (`<begin>` and bytes)."""
        first = max(0, len(inputs) - self._sight)
        return self._known(inputs[first:].tobytes(), min(first, 1))

    @torch.no_grad()
    def _after(self, inputs: bytes, first: int) -> float:
        """first: 0 if they are all there are, else 1, wherever they stand: only distances matter."""
        kept = np.frombuffer(inputs, np.int64)
        missing = self._sight - len(kept)
        symbols = torch.from_numpy(np.concatenate([np.zeros(missing, np.int64), kept]))
        piece = torch.cat((torch.zeros(missing, dtype=torch.int64), torch.ones(len(kept), dtype=torch.int64)))
        place = torch.cat((torch.arange(missing), torch.arange(first, first + len(kept))))
        return float(entropy_of(self._model(symbols, piece, place)[-1:]))
