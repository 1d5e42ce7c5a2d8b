"""The loader: exact under resume and any dp, shares of the mixture, damage, held-out documents."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from matformer.config.schema import ParallelConfig, RunConfig
from matformer.data.holdings import scored_sources
from matformer.data.loader import Loader, heldout_batches, heldout_documents, merge_states
from matformer.data.mixture import BadSamples, Mixture
from matformer.data.packing import document_positions
from matformer.data.patching import StaticPatcher, text_symbols
from matformer.data.shards import ShardWriter
from matformer.data.sources import MediaSpan, Stream, TextSpan, open_source
from matformer.errors import ConfigError, DataError, ParcelError
from matformer.parallel.seeds import generator
from matformer.parcels import Batch, Kind
from matformer.shapes import END, MASK
from tests.made import as_diffused

MODEL = {
    "atto": {"width": 8, "layers": 1, "heads": 2, "kv_heads": 1, "ffn_width": 8, "rotary_pairs": (1, 1, 0, 0)},
    "text": {"width": 4, "heads": 1, "ffn_width": 4, "preludio_layers": 1, "coda_layers": 1},
    "media": {
        "image": {"channels": 2, "rank": 2, "patch": 2, "buckets": ((4, 4),), "coda_width": 4},
        "audio": {"channels": 3, "rank": 1, "patch": 2, "buckets": ((4,), (8,)), "coda_width": 4},
    },
}
SOURCES = {
    "text": {"path": "text", "form": "text", "weight": 0.5},
    "images": {"path": "images", "form": "pairs", "modality": "image", "weight": 0.3},
    "albums": {"path": "albums", "form": "documents", "weight": 0.2},
}
STEPS = 7


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_text(folder: Path, *, patch_bytes: int = 3, blocks: int = 3) -> list[bytes]:
    """Blocks of ten documents of 1 to 150 bytes; gives the documents."""
    draws = generator(1, "text")
    documents: list[bytes] = []
    with ShardWriter(folder, form="text", extra={"patcher": {"kind": "static", "patch_bytes": patch_bytes}}) as writer:
        for block in range(blocks):
            parts = [draws.integers(0, 256, size=size, dtype=np.uint8).tobytes() for size in draws.integers(1, 150, 10)]
            lengths = [StaticPatcher(patch_bytes).lengths(text_symbols(part)) for part in parts]
            members = {
                "bytes": b"".join(parts),
                "docs.npy": npy(np.cumsum([0, *map(len, parts)])),
                "patches.npy": npy(np.concatenate(lengths).astype(np.int32)),
                "json": json.dumps([{"source": "s", "lang": "en", "key": str(i)} for i in range(10)]).encode(),
            }
            writer.add(f"b{block}", members)
            documents += parts
    return documents


def write_images(folder: Path, *, count: int = 12) -> None:
    extra = {"latents": {"shift": [1.0, -1.0], "scale": 2.0}}
    texts = [{"lang": "en", "text": "a picture"}, {"lang": "it", "text": "un quadro"}]
    with ShardWriter(folder, form="pairs", extra=extra) as writer:
        for i in range(count):
            facts = {"modality": "image", "key": f"i{i}", "texts": texts}
            latent = np.full((2, 4, 4), i, np.float16)
            writer.add(f"i{i}", {"moments.npy": npy(latent), "txt": b"a picture", "json": json.dumps(facts).encode()})


def write_albums(folder: Path) -> None:
    extra = {"latents": {"image": {"shift": [0, 0], "scale": 1.0}, "audio": {"shift": [0, 0, 0], "scale": 1.0}}}
    with ShardWriter(folder, form="documents", extra=extra) as writer:
        for i in range(5):
            spans = [
                {"text": f"album {i}: "},
                {"text": "look"},
                {"modality": "image", "member": "0.moments.npy", "role": "generate"},
                {"text": "listen"},
                {"modality": "audio", "member": "1.moments.npy", "role": "given"},
            ]
            members = {
                "0.moments.npy": npy(np.full((2, 4, 4), i, np.float16)),
                "1.moments.npy": npy(np.full((3, 8), i, np.float16)),
                "json": json.dumps({"spans": spans}).encode(),
            }
            writer.add(f"d{i}", members)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "heldout"):
        write_text(root / "text" / split)
        write_images(root / "images" / split)
        write_albums(root / "albums" / split)
    return root


def config(root: Path, *, sources: dict[str, Any] = SOURCES, **data: Any) -> RunConfig:
    section = {
        "root": str(root),
        "lanes": 8,
        "sequence_latents": 48,
        "patcher": {"kind": "static", "patch_bytes": 3},
        "sources": sources,
        **data,
    }
    train = {"steps": 10, "global_batch": 4, "micro_batch": 2, "lr": 1e-3}
    return RunConfig.model_validate({"name": "t", "seed": 3, "model": MODEL, "data": section, "train": train})


def numbers(batch: Batch) -> list[torch.Tensor]:
    records = [batch.grid, batch.text, batch.read, batch.route, *batch.media.values()]
    values = [getattr(record, field.name) for record in records for field in fields(record)]
    return [value for value in values if value is not None]  # what is known only once a batch stands on a device


def equal(first: Batch, second: Batch) -> bool:
    pairs = zip(numbers(first), numbers(second), strict=True)
    same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    return same and first.document_keys == second.document_keys and first.num_bytes == second.num_bytes


def run(loader: Loader, steps: range) -> list[list[Batch]]:
    batches = [loader.next_global_batch(step) for step in steps]
    loader.close()
    return batches


@pytest.fixture(scope="module")
def uninterrupted(root: Path) -> list[list[Batch]]:
    return run(Loader(config(root)), range(STEPS))


def same(first: list[list[Batch]], second: list[list[Batch]]) -> bool:
    steps = zip(first, second, strict=True)
    return all(equal(a, b) for one, two in steps for a, b in zip(one, two, strict=True))


def test_a_batch_keeps_what_the_parcel_promises(uninterrupted: list[list[Batch]]) -> None:
    for batch in (batch for step in uninterrupted for batch in step):
        grid, text, route = batch.grid, batch.text, batch.route
        kind = grid.kind_BS.flatten()
        assert (kind[text.slot_P] == Kind.TEXT).all()
        assert text.slot_P.tolist() == torch.nonzero(kind == Kind.TEXT).flatten().tolist()
        assert text.patch_U[-1] + 1 == len(text.slot_P)
        assert (
            (kind[text.slot_P - 1] == Kind.START)
            | (kind[text.slot_P - 1] == Kind.TEXT)
            | (kind[text.slot_P - 1] == Kind.CLOSING)
        ).all()
        assert int((text.symbol_U != END).sum()) == batch.num_bytes
        assert route.legal_RM.gather(1, route.target_R[:, None]).all()
        for units in batch.media.values():
            assert (kind[units.noised_slot_Q] == Kind.NOISED).all()
            assert (kind[units.clean_slot_Q] == Kind.CLEAN).all()
            assert (kind[units.header_slot_J] == Kind.HEADER).all()
            assert (kind[units.closing_slot_J] == Kind.CLOSING).all()
            assert ((units.time_T > 0) == torch.isin(torch.arange(len(units.time_T)), units.time_of_Q)).all()
    slots = [sum(len(units.value_NF) for b in step for units in b.media.values()) for step in uninterrupted]
    assert sum(slots) > 0


def test_documents_of_a_lane_come_through_whole_and_in_order(root: Path) -> None:
    """Text that is cut goes on where it was cut: pieces of a key join to the document, with one `<end>`."""
    documents = write_text(root.parent / "again")
    only_text = {"text": SOURCES["text"]}
    loader = Loader(config(root, sources=only_text, lanes=4), prefetch=False)
    joined: dict[str, list[int]] = {}
    for step in range(2):  # less than an epoch: every key once
        for batch in loader.next_global_batch(step):
            for symbol, number in zip(batch.text.symbol_U.tolist(), batch.text.document_U.tolist(), strict=True):
                joined.setdefault(batch.document_keys[number], []).append(symbol)
    whole = 0
    for key, symbols in joined.items():
        block, number = key.removeprefix("text/b").split("-")
        expected = [*documents[int(block) * 10 + int(number)], END]
        complete = symbols == expected
        assert complete or symbols == expected[: len(symbols)]
        whole += complete
    assert whole >= 6


@pytest.mark.parametrize("prefetch", [False, True])
def test_resume_gives_the_same_batches(root: Path, uninterrupted: list[list[Batch]], prefetch: bool) -> None:
    first = Loader(config(root), prefetch=prefetch)
    assert same(run(first, range(3)), uninterrupted[:3])
    state = json.loads(json.dumps(first.state()))
    second = Loader(config(root), prefetch=prefetch)
    second.load_state(state)
    assert second.state() == state
    assert same(run(second, range(3, STEPS)), uninterrupted[3:])


def test_state_of_one_rank_resumes_on_two_and_back(root: Path, uninterrupted: list[list[Batch]]) -> None:
    one = Loader(config(root))
    run(one, range(2))
    two = [Loader(config(root), dp_rank=rank, dp_size=2) for rank in range(2)]
    for loader in two:
        loader.load_state(one.state())
    shares = [run(loader, range(2, 4)) for loader in two]
    for step in range(2):
        expected = rows(uninterrupted[2 + step])
        assert sorted(row for share in shares for row in rows(share[step])) == sorted(expected)
    again = Loader(config(root))
    again.load_state(merge_states([loader.state() for loader in two]))
    assert same(run(again, range(4, STEPS)), uninterrupted[4:])


@pytest.mark.parametrize("objective", ["masked_diffusion", "block_diffusion"])
def test_masks_of_text_are_the_same_after_a_restart_and_on_any_rank(objective: str, root: Path) -> None:
    run_config = config(root)
    run_config = run_config.model_copy(update={"model": as_diffused(run_config.model, objective)})
    whole = run(Loader(run_config), range(4))
    masked = [float((b.text.coda_input_U == MASK).float().mean()) for step in whole for b in step]
    assert 0.1 < min(masked) and max(masked) < 1.0 and len(set(masked)) > 2
    first = Loader(run_config)
    run(first, range(2))
    two = [Loader(run_config, dp_rank=rank, dp_size=2) for rank in range(2)]
    again = Loader(run_config)
    for loader in (again, *two):
        loader.load_state(first.state())
    assert same(run(again, range(2, 4)), whole[2:])
    shares = [run(loader, range(2, 4)) for loader in two]
    for step in range(2):
        assert sorted(row for share in shares for row in rows(share[step])) == sorted(rows(whole[2 + step]))


def rows(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """What stands in each sequence, free of how sequences fall into microbatches."""
    out: list[tuple[Any, ...]] = []
    for batch in batches:
        grid, length = batch.grid, batch.grid.kind_BS.shape[1]
        row_U = (batch.text.slot_P // length)[batch.text.patch_U]
        for row in range(len(grid.kind_BS)):
            symbols = tuple(batch.text.symbol_U[row_U == row].tolist())
            seen = tuple(batch.text.coda_input_U[row_U == row].tolist())
            noise = tuple(
                units.noise_QF[units.noised_slot_Q // length == row].flatten().tolist()
                for units in batch.media.values()
            )
            arrays = (grid.kind_BS, grid.blind_BS, grid.axes_BSX[..., 0], grid.document_BS, grid.span_BS)
            out.append((*(tuple(array[row].tolist()) for array in arrays), symbols, seen, noise))
    return out


@pytest.mark.parametrize("dp_size", [1, 2])
def test_the_union_over_ranks_is_the_same_global_batch(
    root: Path, uninterrupted: list[list[Batch]], dp_size: int
) -> None:
    loaders = [Loader(config(root), dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    shares = [run(loader, range(3)) for loader in loaders]
    for step in range(3):
        union = sorted(row for share in shares for row in rows(share[step]))
        assert union == sorted(rows(uninterrupted[step]))


def test_lanes_beyond_the_global_batch_take_turns(root: Path) -> None:
    loader = Loader(config(root), prefetch=False)
    before = loader.state()["lanes"]
    loader.next_global_batch(0)
    after = loader.state()["lanes"]
    assert [lane for lane in before if before[lane] != after[lane]] == ["0", "1", "2", "3"]


def test_state_is_that_of_the_last_batch_given(root: Path) -> None:
    ahead, plain = Loader(config(root), prefetch=True), Loader(config(root), prefetch=False)
    for step in range(2):
        ahead.next_global_batch(step)
        plain.next_global_batch(step)
        assert ahead.state() == plain.state()
    state = ahead.state()
    ahead.close()
    third = ahead.next_global_batch(2)
    ahead.load_state(state)
    assert same([ahead.next_global_batch(2)], [third])
    with pytest.raises(ParcelError, match="step 2"):
        plain.next_global_batch(5)


def streams(root: Path, *, lane: int = 0) -> dict[str, Stream]:
    run_config = config(root)
    opened = {n: open_source(n, data=run_config.data, model=run_config.model, split="train") for n in SOURCES}
    return {name: Stream(source, seed=3, lane=lane, lanes=8) for name, source in opened.items()}


def test_mixture_shares_are_in_latents(root: Path) -> None:
    weights = {name: float(source["weight"]) for name, source in SOURCES.items()}
    mixture = Mixture(streams(root), weights, seed=3, lane=0, bad=BadSamples(0))
    model = config(root).model
    for _ in range(300):
        mixture.next(lambda document: document_positions(document, model=model))
    total = sum(mixture.latents.values())
    for name, weight in weights.items():
        assert abs(mixture.latents[name] / total - weight) < 0.02
    assert abs(mixture.taken["text"] / sum(mixture.taken.values()) - 0.5) > 0.02


def test_a_source_that_is_added_does_not_flood_the_mixture(root: Path) -> None:
    weights = {"text": 0.5, "images": 0.5}
    mixture = Mixture(streams(root), weights, seed=3, lane=0, bad=BadSamples(0))
    mixture.load_state({"text": [100, 5000]})
    assert mixture.latents["images"] == 5000


def test_shares_that_change_on_resume_hold_at_once(root: Path) -> None:
    model = config(root).model

    def mixture(text: float, images: float, **more: float) -> Mixture:
        weights = {"text": text, "images": images, **more}
        return Mixture(streams(root), weights, seed=3, lane=0, bad=BadSamples(0))

    def given(made: Mixture, *, documents: int) -> dict[str, int]:
        before = dict(made.latents)
        for _ in range(documents):
            made.next(lambda document: document_positions(document, model=model))
        return {name: made.latents[name] - before[name] for name in before}

    first = mixture(9.0, 1.0)
    given(first, documents=400)
    state = json.loads(json.dumps(first.state()))
    changed = mixture(0.5, 0.5)
    changed.load_state(state)
    assert changed.taken == first.taken
    found = given(changed, documents=60)
    assert abs(found["text"] / sum(found.values()) - 0.5) < 0.1
    for same in (mixture(0.45, 0.05), mixture(9.0, 1.0, albums=10.0)):  # the known ones' proportion stays
        same.load_state(state)
        assert [same.latents[name] for name in ("text", "images")] == [first.latents[n] for n in ("text", "images")]
    old = mixture(0.5, 0.5)
    old.load_state({name: one[:2] for name, one in state.items()})
    assert old.latents == first.latents and old.taken == first.taken


def test_an_epoch_gives_every_document_once_over_all_lanes(root: Path) -> None:
    lanes = [streams(root, lane=lane)["images"] for lane in range(8)]
    keys = [lanes[place % 8].document(place // 8).key for place in range(24)]
    assert sorted(keys[:12]) == sorted(keys[12:]) == sorted(f"images/i{i}" for i in range(12))
    assert keys[:12] != keys[12:]


def test_pairs_are_normalised_and_drawn_by_the_config(root: Path) -> None:
    source = open_source("images", data=config(root).data, model=config(root).model, split="train")
    seen: Counter[tuple[str, bytes]] = Counter()
    for number in range(400):
        document = source.document(5, draws=generator(0, number))
        (media,) = [span for span in document.spans if isinstance(span, MediaSpan)]
        (text,) = [span for span in document.spans if isinstance(span, TextSpan)]
        assert (document.spans[0] is text) == (media.role == "generate")
        assert (media.latent[0] == (5 - 1) * 2).all() and (media.latent[1] == (5 + 1) * 2).all()
        seen[(media.role, text.data)] += 1
    generated = seen[("generate", b"a picture")] + seen[("generate", b"un quadro")]
    english = seen[("generate", b"a picture")] + seen[("given", b"a picture")]
    assert 240 < generated < 320
    assert 160 < english < 240


def test_a_pair_can_show_one_side_alone(root: Path) -> None:
    sides = {"words": ("caption", None), "pictures": ("medium", "image")}
    sources = {
        name: {"path": "images", "form": "pairs", "shows": shows, "modality": modality, "weight": 0.5}
        for name, (shows, modality) in sides.items()
    }
    run = config(root, sources=sources)
    words, pictures = (open_source(name, data=run.data, model=run.model, split="train") for name in sides)
    assert [span.data for span in words.pick(3).spans if isinstance(span, TextSpan)] in ([b"a picture"], [b"un quadro"])
    assert len(words.pick(3).spans) == 1
    (span,) = pictures.pick(3, direction="generate").spans
    assert isinstance(span, MediaSpan) and span.modality == "image" and span.role == "generate"
    assert scored_sources(run.data, "image") == ["pictures"]
    loader = Loader(run, prefetch=False)
    batches = [batch for step in range(4) for batch in loader.next_global_batch(step)]
    assert sum(batch.num_bytes for batch in batches) > 0
    assert sum(len(batch.media["image"].noised_row_Q) for batch in batches) > 0


def test_stored_patches_are_used_only_if_the_patcher_is_the_same(root: Path, tmp_path: Path) -> None:
    documents = write_text(tmp_path / "text" / "train", patch_bytes=5)
    for patch_bytes in (5, 4):
        run_config = config(tmp_path, patcher={"kind": "static", "patch_bytes": patch_bytes})
        source = open_source("text", data=run_config.data, model=run_config.model, split="train")
        for index, data in enumerate(documents):
            (span,) = source.pick(index).spans
            assert isinstance(span, TextSpan)
            assert span.data == data
            assert span.patch_lengths.tolist() == StaticPatcher(patch_bytes).lengths(text_symbols(data)).tolist()


def test_a_damaged_sample_is_named_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "images" / "train", count=6)
    tar = tmp_path / "images" / "train" / "shard-000000.tar"
    damaged = tar.read_bytes().replace(npy(np.full((2, 4, 4), 3, np.float16)), npy(np.full((2, 4, 4), 9, np.float16)))
    tar.write_bytes(damaged)
    only = {"images": SOURCES["images"]}
    loader = Loader(config(tmp_path, sources=only, max_bad_samples=1), prefetch=False)
    keys = {key for step in range(4) for batch in loader.next_global_batch(step) for key in batch.document_keys}
    assert keys == {f"images/i{i}" for i in (0, 1, 2, 4, 5)}
    assert len(loader.bad.seen) == 1
    assert "shard-000000.tar" in caplog.text and "i3" in caplog.text and "digest" in caplog.text
    strict = Loader(config(tmp_path, sources=only, max_bad_samples=0), prefetch=False)
    with pytest.raises(DataError, match=r"max_bad_samples"):
        run(strict, range(4))


def test_latents_of_a_wrong_shape_or_not_finite_are_named_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images" / "train"
    spoiled = {2: np.zeros((2, 4, 6), np.float16), 3: np.full((2, 4, 4), np.nan, np.float16)}
    spoiled |= {4: np.full((2, 4, 4), np.nan, np.float16), 5: np.zeros((3, 4, 4), np.float16)}
    with ShardWriter(folder, form="pairs", extra={"latents": {"shift": [1.0, -1.0], "scale": 2.0}}) as writer:
        for i in range(8):
            facts = {"modality": "image", "key": f"i{i}", "texts": [{"lang": "en", "text": "a picture"}]}
            latent = spoiled.get(i, np.full((2, 4, 4), i, np.float16))
            writer.add(f"i{i}", {"moments.npy": npy(latent), "json": json.dumps(facts).encode()})
    only = {"images": SOURCES["images"]}
    loader = Loader(config(tmp_path, sources=only, max_bad_samples=4), prefetch=False)
    keys = {key for step in range(4) for batch in loader.next_global_batch(step) for key in batch.document_keys}
    assert keys == {f"images/i{i}" for i in (0, 1, 6, 7)}
    assert len(loader.bad.seen) == 4  # two alike are two
    for i, reason in (
        (2, "a grid among"),
        (3, "must be finite"),
        (4, "must be finite"),
        (5, "must have the 2 channels"),
    ):
        (line,) = [line for line in caplog.messages if f"of key i{i} in shard" in line]
        assert reason in line and "shard-000000.tar" in line
    with pytest.raises(DataError, match=r"max_bad_samples"):
        run(Loader(config(tmp_path, sources=only, max_bad_samples=3), prefetch=False), range(4))


def coded(folder: Path, *, fingerprint: str, kind: str = "diffusers.AutoencoderKL", record: dict | None = None) -> None:
    """A data set of pictures by an autoencoder of this identity."""
    coder = {"kind": kind, "fingerprint": fingerprint} | ({"acceptance": record} if record else {})
    extra = {"modality": "image", "latents": {"shift": [1.0, -1.0], "scale": 2.0}, "autoencoder": coder}
    with ShardWriter(folder, form="pairs", extra=extra) as writer:
        facts = {"modality": "image", "key": "i", "texts": [{"lang": "en", "text": "a picture"}]}
        writer.add("i", {"moments.npy": npy(np.zeros((2, 4, 4), np.float16)), "json": json.dumps(facts).encode()})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "no record of an acceptance"),
        ({"accepted": False, "fingerprint": "a", "failed": ["ssim 0.3 where min. 0.6 was asked"]}, "ssim 0.3"),
        ({"accepted": True, "fingerprint": "b"}, "must be of fingerprint a, got b"),
    ],
)
def test_latents_of_an_autoencoder_that_was_not_accepted_are_refused(
    record: dict | None, reason: str, tmp_path: Path
) -> None:
    coded(tmp_path / "images" / "train", fingerprint="a", record=record)
    with pytest.raises(DataError, match=rf"{reason}.*data_prep\.accept_autoencoder"):
        Loader(config(tmp_path, sources={"images": SOURCES["images"]}), prefetch=False)
    assert DataError.exit_code == 2


def test_two_autoencoders_of_one_modality_are_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        coded(tmp_path / name / "train", fingerprint=name, record={"accepted": True, "fingerprint": name})
    sources = {name: {**SOURCES["images"], "path": name} for name in ("one", "other")}
    with pytest.raises(DataError, match=r"must be of one autoencoder.*data\.sources"):
        Loader(config(tmp_path, sources=sources), prefetch=False)


def test_a_source_of_which_nothing_is_sound_stops_the_run(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train", count=2)
    tar = tmp_path / "images" / "train" / "shard-000000.tar"
    tar.write_bytes(bytes(len(tar.read_bytes())))
    loader = Loader(config(tmp_path, sources={"images": SOURCES["images"]}, max_bad_samples=5), prefetch=False)
    with pytest.raises(DataError, match="digest"):
        loader.next_global_batch(0)


def test_missing_data_names_root_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root.*pretrain\.sh.*data_prep\.demo"):
        Loader(config(tmp_path / "nowhere"))


def test_configs_that_cannot_run_are_refused(root: Path) -> None:
    for wrong in ({"lanes": 6}, {"sequence_latents": 10}):
        with pytest.raises(ConfigError):
            Loader(config(root, **wrong))
    with pytest.raises(ConfigError, match="micro_batch"):
        Loader(config(root), dp_size=4)


def test_a_step_has_the_same_rows_whoever_packs_them(root: Path) -> None:
    """Rows are told by their documents; the ranks of a group deal them out by FLOPs."""

    def rows(dp_size: int, balance: int) -> list[list[str]]:
        asked = config(root).model_copy(update={"parallel": ParallelConfig(balance_ranks=balance, dp=dp_size)})
        loaders = [Loader(asked, dp_rank=rank, dp_size=dp_size, prefetch=False) for rank in range(dp_size)]
        steps = []
        for step in range(STEPS):
            batches = [batch for loader in loaders for batch in loader.next_global_batch(step)]
            assert all(len(batch.grid.kind_BS) == 2 and batch.flops > 0 for batch in batches)
            steps.append(sorted({key for batch in batches for key in batch.document_keys}))
        return steps

    assert rows(2, 8) == rows(2, 1) == rows(1, 8)


def test_a_state_of_other_lanes_or_missing_lanes_is_refused(root: Path) -> None:
    alone = config(root).model_copy(update={"parallel": ParallelConfig(balance_ranks=1)})
    state = Loader(alone, dp_rank=0, dp_size=2, prefetch=False).state()
    with pytest.raises(DataError, match="every lane"):
        Loader(config(root)).load_state(state)
    with pytest.raises(DataError, match=r"data\.lanes"):
        Loader(config(root, lanes=16)).load_state(state)


def test_heldout_text_is_whole_documents_within_the_bytes(root: Path) -> None:
    run_config = config(root)
    documents = list(heldout_documents(run_config, "text", max_bytes=600))
    total = sum(len(span.data) for d in documents for span in d.spans if isinstance(span, TextSpan))
    assert 300 < total <= 600
    assert len({d.key for d in documents}) == len(documents)
    batches = list(heldout_batches(run_config, "text", max_bytes=600))
    assert sum(batch.num_bytes for batch in batches) == total
    assert sum(int((batch.text.symbol_U == END).sum()) for batch in batches) == len(documents)
    again = list(heldout_batches(run_config.model_copy(update={"seed": 9}), "text", max_bytes=600))
    assert all(equal(a, b) for a, b in zip(batches, again, strict=True))


def test_heldout_media_are_generated_from_their_captions(root: Path) -> None:
    batches = list(heldout_batches(config(root), "images", max_spans=5))
    spans = [role for batch in batches for role in batch.media["image"].time_T.tolist()]
    assert spans == [0.5] * 5
    assert not any(bool(batch.grid.blind_BS.any()) for batch in batches)
    given = list(heldout_batches(config(root), "images", max_spans=5, direction="given"))
    assert [t for batch in given for t in batch.media["image"].time_T.tolist()] == [0.0] * 5


def test_albums_hold_all_their_spans(root: Path) -> None:
    documents: Iterator[Any] = heldout_documents(config(root), "albums", direction=None)
    spans = next(documents).spans
    kinds = [span.modality if isinstance(span, MediaSpan) else "text" for span in spans]
    assert kinds == ["text", "image", "text", "audio"]
    assert spans[0].data.endswith(b": look")
    assert (spans[1].role, spans[3].role, spans[3].bucket) == ("generate", "given", 1)


def test_reading_ahead_takes_no_second_pool_of_threads(root: Path) -> None:
    """Torch's pool of the model's thread stays; the loader's thread computes alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loader = Loader(config(root))
        loader.next_global_batch(0)
        assert loader._executor is not None
        assert loader._executor.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
        loader.close()
    finally:
        torch.set_num_threads(before)
