"""Our byte path as BLT's, against transformers' BLT with the same weights: equal where theirs is right."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from matformer.config.schema import ModelConfig
from matformer.data.entropy import EntropyModel, EntropySettings
from matformer.data.packing import Piece, Place, build_batch, draw_zeros, pack_batch
from matformer.data.patching import EntropyPatcher
from matformer.data.sources import Document, TextSpan
from matformer.engine.from_blt import load_blt, model_config_of
from matformer.hosts.plain import PlainTrunk
from matformer.model import Matformer
from matformer.parcels import Batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import BltConfig, BltForCausalLM
    from transformers.models.blt.modeling_blt import BltPatcher

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-4
WINDOW = 12
SIZES = (1, 2, 5, 23, 40, 61)
Rows = list[tuple[bytes, list[int]]]


def blt(*, k: int = 2, window: int | None = WINDOW, encoder_layers: int = 2) -> BltForCausalLM:
    """A small random BLT, every weight far from its start."""
    local = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "cross_attn_k": k}
    local |= {"hidden_size_global": 32 * k, "max_position_embeddings": 512}
    config = BltConfig(
        patch_in_forward=False,
        cross_attn_k=k,
        local_attention_window_len=window,
        encoder_hash_byte_group_vocab=101,
        encoder_config=local | {"num_hidden_layers": encoder_layers, "cross_attn_all_layers": encoder_layers > 1},
        decoder_config=local | {"num_hidden_layers": 3, "cross_attn_all_layers": True},
        global_config={
            "hidden_size": 32 * k,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_hidden_layers": 2,
            "intermediate_size": 96,
            "max_position_embeddings": 512,
        },
        attn_implementation="eager",
    )
    torch.manual_seed(k)
    model = BltForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(1.5)
    return model


def ours_of(theirs: BltForCausalLM) -> Matformer:
    """The same model in our modules."""
    config = model_config_of(theirs.config)
    model = Matformer(config, trunk=PlainTrunk(config.atto)).eval()
    load_blt(model, theirs.config, theirs.state_dict())
    return model


def texts(seed: int, sizes: Sequence[int] = SIZES) -> Rows:
    """Random bytes of each size, cut at random: lengths sum to size + 1."""
    dice = np.random.default_rng(seed)
    rows = []
    for size in sizes:
        cuts = np.flatnonzero(dice.random(size) < 0.3) + 1
        lengths = np.diff(np.concatenate([[0], cuts, [size + 1]]))
        rows.append((dice.integers(0, 256, size, dtype=np.uint8).tobytes(), lengths.tolist()))
    return rows


def logits_of_theirs(model: BltForCausalLM, rows: Rows, *, left: int = 0) -> list[Tensor]:
    """`[n + 1, 257]` a row, of one batch padded on the right to its longest row, and on the left by `left`."""
    width = max(len(data) for data, _ in rows) + 1
    ids = torch.full((len(rows), left + width), 3)
    lengths = torch.zeros(len(rows), max(len(cuts) for _, cuts in rows) + 1 + (left > 0), dtype=torch.long)
    for i, (data, cuts) in enumerate(rows):
        ids[i, left : left + len(data) + 1] = torch.tensor([1, *(byte + 4 for byte in data)])
        mine = [left] * (left > 0) + [1, *cuts]
        lengths[i, : len(mine)] = torch.tensor(mine)
    mask = torch.ones_like(ids)
    mask[:, :left] = 0
    with torch.no_grad():
        out = model(ids, attention_mask=mask if left else None, use_cache=False, patch_lengths=lengths).logits
    return [_ours_first(out[i, left : left + len(data) + 1]) for i, (data, _) in enumerate(rows)]


def _ours_first(logits: Tensor) -> Tensor:
    """Bytes, then `<end>`."""
    return torch.cat((logits[:, 4:260], logits[:, 2:3]), dim=1)


def logits_of_ours(model: Matformer, batch: Batch) -> list[Tensor]:
    """`[n + 1, 257]` a document, in the order of the batch."""
    with torch.no_grad():
        latents, inputs = model.run(batch)
        logits = model.text_logits(latents, batch.text, inputs)
        again = model.text_logits(model.latents(batch).flatten(0, 1), batch.text)
    assert (logits - again).abs().max() < 1e-5  # what generation computes
    sizes = torch.bincount(batch.text.document_U)
    return list(logits.split(sizes.tolist()))


def batch_of(rows: Rows, config: ModelConfig, *, packed: bool) -> Batch:
    documents = [
        Document(str(i), (TextSpan(data, np.asarray(cuts, np.int32), True),)) for i, (data, cuts) in enumerate(rows)
    ]
    if packed:
        pieces = [Piece(document, Place(), Place(1)) for document in documents]
        length = sum(len(cuts) + 1 for _, cuts in rows) + 3
        return pack_batch([pieces], [draw_zeros], model=config, sequence_latents=length)
    return build_batch(documents, model=config, sequence_latents=max(len(cuts) for _, cuts in rows) + 1)


def largest_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Over all documents."""
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_logits_are_theirs(k: int, packed: bool) -> None:
    theirs = blt(k=k)
    ours, rows = ours_of(theirs), texts(k)
    wanted = logits_of_theirs(theirs, rows)
    assert float(wanted[-1].std()) > 0.3  # the weights say something
    found = logits_of_ours(ours, batch_of(rows, ours.model_config, packed=packed))
    assert largest_difference(found, wanted) < TOLERANCE


def test_one_layer_encoder_without_window() -> None:
    """Their other setting: attention over the whole text, one cross-attention."""
    theirs = blt(window=None, encoder_layers=1)
    config = model_config_of(theirs.config, window=64)
    ours = Matformer(config, trunk=PlainTrunk(config.atto)).eval()
    load_blt(ours, theirs.config, theirs.state_dict())
    rows = texts(9)
    found = logits_of_ours(ours, batch_of(rows, config, packed=True))
    assert largest_difference(found, logits_of_theirs(theirs, rows)) < TOLERANCE


@pytest.mark.parametrize("part", ["slot_norm", "query_key_value", "readers.1", "table", "project", "start"])
def test_a_weight_that_is_not_theirs_is_seen(part: str) -> None:
    """The comparison would notice each kind of mistake in the conversion."""
    theirs = blt()
    ours, rows = ours_of(theirs), texts(2)
    wanted = logits_of_theirs(theirs, rows)
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if part in name and "router" not in name:
                weight.mul_(1.05)
    assert largest_difference(logits_of_ours(ours, batch_of(rows, ours.model_config, packed=True)), wanted) > TOLERANCE


def test_padding_on_the_left_changes_theirs_and_not_ours() -> None:
    """Their n-grams and patches see the padding; ours has none to see: rows lie one after the other."""
    theirs = blt()
    rows = texts(3)[2:]
    alone = logits_of_theirs(theirs, rows)
    assert largest_difference(logits_of_theirs(theirs, rows, left=5), alone) > 0.05
    ours = ours_of(theirs)
    longer = [(b"before it, another row", [23]), *rows]
    found = logits_of_ours(ours, batch_of(longer, ours.model_config, packed=True))[1:]
    assert largest_difference(found, alone) < TOLERANCE


def test_packed_documents_change_theirs_and_not_ours() -> None:
    """They have no mask of documents: the second of a row reads the first. Ours: the packed tests above."""
    theirs = blt()
    (first, cuts), (second, more) = texts(4)[-2:]
    alone = logits_of_theirs(theirs, [(second, more)])[0]
    ids = torch.tensor([[1, *(b + 4 for b in first), 2, 1, *(b + 4 for b in second)]])
    with torch.no_grad():
        lengths = torch.tensor([[1, *cuts, 1, *more]])
        out = theirs(ids, use_cache=False, patch_lengths=lengths).logits[0]
    assert (_ours_first(out)[len(first) + 2 :] - alone).abs().max() > 0.05


def test_a_first_patch_of_several_bytes_leaks_in_theirs_and_cannot_be_said_in_ours() -> None:
    """With BOS and three bytes in the first patch their logits of byte 0 change with byte 2; ours never do."""
    theirs = blt()
    data, _ = texts(5)[3]
    other = data[:2] + bytes([data[2] ^ 1]) + data[3:]
    lengths = torch.tensor([[4] * 6])

    def first_logits(text: bytes) -> Tensor:
        with torch.no_grad():
            ids = torch.tensor([[1, *(byte + 4 for byte in text)]])
            return theirs(ids, use_cache=False, patch_lengths=lengths).logits[0, 0]

    assert (first_logits(data) - first_logits(other)).abs().max() > 1e-3
    ours = ours_of(theirs)
    here, there = (
        logits_of_ours(ours, batch_of([(text, [3, 4, 4, 4, 4, 4, 1])], ours.model_config, packed=False))[0]
        for text in (data, other)
    )
    assert torch.equal(here[:3], there[:3])
    assert not torch.equal(here[3:], there[3:])


def test_their_patcher_gives_impossible_lengths_for_ragged_rows_and_ours_does_not() -> None:
    entropies = torch.tensor([[0.0, 9, 0, 9, 0, 9, 0, 9], [0.0, 0, 0, 0, 0, 0, 9, 0]])
    assert int(BltPatcher.patch_lengths_from_entropies(entropies, 8, 4, 1.0).min()) < 0
    model = EntropyModel(EntropySettings(width=8, heads=1, layers=1))
    patcher = EntropyPatcher(model, threshold=1.0, max_patch_bytes=16)
    for row in entropies.numpy():
        lengths = patcher.lengths_of(b"seven by", nats=row)
        assert lengths.min() > 0 and lengths.sum() == 8
