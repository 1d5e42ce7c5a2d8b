"""Held-out evaluation: by hand, free of packing and ranks; captions of other concepts; the door."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from matformer.checkpoint.store import save
from matformer.config.load import save_resolved
from matformer.config.schema import ParallelConfig, RunConfig
from matformer.data.loader import heldout_batches, heldout_documents, pack_documents
from matformer.data.packing import build_batch, with_noise
from matformer.data.shards import ShardWriter
from matformer.data.sources import Document, MediaSpan, open_source
from matformer.engine import clean_errors as errors_of_clean_latents
from matformer.engine import evaluate as evaluation
from matformer.engine.baselines import Baselines, compute_baselines
from matformer.engine.clean_errors import clean_errors
from matformer.engine.document_sums import document_sums
from matformer.engine.evaluate import HeldOut, evaluate, media_by_document, text_by_document
from matformer.engine.paired import caption_gain, other_captions, spread, subjects_of
from matformer.engine.restore import load_for_inference
from matformer.engine.tree_arms import tree_arms
from matformer.errors import CheckpointError
from matformer.evaluate import main
from matformer.hosts.plain import PlainHost
from matformer.model import Matformer
from matformer.parallel.groups import Groups
from matformer.parallel.seeds import generator
from matformer.parcels import Batch
from tests.made import as_diffused

MODEL = {
    "atto": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn_width": 16, "rotary_pairs": (1, 1, 1, 1)},
    "text": {
        "width": 8,
        "heads": 1,
        "ffn_width": 8,
        "preludio_layers": 1,
        "coda_layers": 1,
        "window": 6,
        "ngram_rows": 64,
    },
    "media": {
        "image": {"channels": 2, "rank": 2, "patch": 2, "buckets": ((4, 4),), "coda_width": 8},
        "audio": {"channels": 3, "rank": 1, "patch": 2, "buckets": ((4,), (8,)), "coda_width": 8},
    },
}
SOURCES = {
    "text": {"path": "text", "form": "text", "weight": 0.5},
    "images": {"path": "images", "form": "pairs", "modality": "image", "weight": 0.3},
    "speech": {"path": "speech", "form": "pairs", "modality": "audio", "weight": 0.2},
}
TIMES = [(k - 0.5) / 8 for k in range(1, 9)]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_text(folder: Path, *, name: str) -> None:
    draws = generator(1, name)
    parts = [bytes(draws.integers(97, 110, size=size, dtype=np.uint8)) for size in draws.integers(5, 90, 12)]
    facts = [{"source": "s", "lang": "en", "key": str(i)} for i in range(len(parts))]
    with ShardWriter(folder, form="text") as writer:
        offsets = npy(np.cumsum([0, *map(len, parts)]))
        writer.add("b", {"bytes": b"".join(parts), "docs.npy": offsets, "json": json.dumps(facts).encode()})


def write_pairs(folder: Path, *, modality: str, shapes: Sequence[tuple[int, ...]], styles: Sequence[str]) -> None:
    """Seven concepts in each style; the first comes in two variants, the last shares its words with the first."""
    channels = shapes[0][0]
    extra = {"latents": {"shift": [0.0] * channels, "scale": 1.0}}
    with ShardWriter(folder, form="pairs", extra=extra) as writer:
        for style in styles:
            for number in range(8):
                concept, shape = f"c{number % 7}", shapes[number // 4 % len(shapes)]
                words = "thing 0" if number == 6 else f"thing {number}"
                texts = [{"lang": "en", "text": words}, {"lang": "it", "text": f"cosa {number}"}]
                facts = {"modality": modality, "concept": concept, "base": concept, "style": style, "texts": texts}
                latent = generator(2, modality, style, number).standard_normal(shape).astype(np.float16)
                members = {"json": json.dumps({**facts, "bucket": shape[1:]}).encode(), "moments.npy": npy(latent)}
                writer.add(f"{style}-{number}", members)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "heldout"):
        write_text(root / "text" / split, name=split)
        write_pairs(root / "images" / split, modality="image", shapes=[(2, 4, 4)], styles=["flat", "round"])
        write_pairs(root / "speech" / split, modality="audio", shapes=[(3, 4), (3, 8)], styles=["low"])
    return root


def config(root: Path, *, micro_batch: int = 2, length: int = 48, seed: int = 3, **asked: Any) -> RunConfig:
    data = {
        "root": str(root),
        "lanes": 8,
        "sequence_latents": length,
        "patcher": {"kind": "static", "patch_bytes": 3},
        "sources": SOURCES,
    }
    train = {"steps": 10, "global_batch": 4, "micro_batch": micro_batch, "lr": 1e-3}
    asked = {"text_bytes": 300, "media_spans": 5} | asked
    tree = {"name": "t", "seed": seed, "model": MODEL, "data": data, "train": train, "eval": asked}
    tree["parallel"] = {"threads": 1}
    return RunConfig.model_validate(tree)


def build(run: RunConfig, *, trained: bool = True) -> tuple[PlainHost, Matformer]:
    """`trained`: every weight moved, so that no part is silent (outputs begin at zero)."""
    host = PlainHost(run)
    model = Matformer(run.model, trunk=host.build_trunk())
    host.prepare(model)
    if trained:
        for name, parameter in model.named_parameters():
            draws = generator(5, name).standard_normal(tuple(parameter.shape)).astype(np.float32)
            parameter.data += 0.3 * torch.from_numpy(draws)
    return host, model


@pytest.fixture(scope="module")
def numbers(root: Path) -> dict[str, float]:
    run = config(root)
    return evaluate(build(run)[0], run, full=True)


def test_all_promised_numbers_are_there(numbers: dict[str, float]) -> None:
    with_error = ["text/bits_per_byte", "image/flow_loss", "audio/flow_loss", "router/span_end_accuracy"]
    with_error += [f"{name}/x0_error_snr{snr}" for name in ("image", "audio") for snr in (-4, -2, 0, 2, 4)]
    gains = ["captions/image_gain", "captions/audio_gain"]
    expected = [*with_error, *gains, *(f"{name}_stderr" for name in [*with_error, *gains])]
    expected += [f"{name}_{end}" for name in gains for end in ("z", "num_concepts")]
    expected += ["router/majority", "router/accuracy"]
    assert sorted(numbers) == sorted(f"heldout/{name}" for name in expected)
    assert all(math.isfinite(value) for value in numbers.values())


def test_a_rivals_margin_is_the_mean_difference_over_documents(root: Path, numbers: dict[str, float]) -> None:
    run = config(root)
    host, _ = build(run)
    asked = {"text_bytes": 300, "media_spans": 5}
    rivals = compute_baselines(run, **asked)
    found = evaluate(host, run, full=False, rivals=rivals)
    for name, score, rival in (
        ("text/below_order2", "text/bits_per_byte", "text/order2"),
        ("image/below_gaussian", "image/flow_loss", "image/gaussian"),
        ("audio/below_gaussian_channel", "audio/flow_loss", "audio/gaussian_channel"),
    ):
        assert found[f"heldout/{name}"] == pytest.approx(rivals.numbers[rival] - numbers[f"heldout/{score}"], rel=1e-5)
        assert found[f"heldout/{name}_stderr"] > 0
    # a rival that is equally bad at every document: all that is left is our own spread
    sevens = {document.key: 7.0 * 32 for document in heldout_documents(run, "images", max_spans=5)}
    found = evaluate(host, run, full=False, rivals=Baselines({}, {"image/seven": sevens}))
    assert found["heldout/image/below_seven"] == pytest.approx(7.0 - numbers["heldout/image/flow_loss"], rel=1e-5)
    assert found["heldout/image/below_seven_stderr"] == pytest.approx(
        numbers["heldout/image/flow_loss_stderr"], rel=1e-4
    )


@pytest.mark.parametrize(("micro_batch", "length"), [(1, 48), (3, 131)])
def test_numbers_do_not_depend_on_packing(root: Path, numbers: dict[str, float], micro_batch: int, length: int) -> None:
    run = config(root, micro_batch=micro_batch, length=length, seed=3)
    again = evaluate(build(run)[0], run, full=True)
    for name, value in numbers.items():
        assert again[name] == pytest.approx(value, rel=1e-4 if name.endswith("_z") else 1e-5, abs=1e-6), name


@pytest.mark.parametrize("objective", ["masked_diffusion", "block_diffusion"])
def test_numbers_of_diffused_text_do_not_depend_on_the_microbatch(root: Path, objective: str) -> None:
    found = []
    for micro_batch in (1, 4):
        run = config(root, micro_batch=micro_batch, length=20, text_bytes=10**6)
        run = run.model_copy(update={"model": as_diffused(run.model, objective)})
        keys = [key for batch in heldout_batches(run, "text") for key in batch.document_keys]
        assert len(keys) > len(set(keys))  # some document is cut between two batches
        found.append(text_by_document(build(run)[0], run))
    for key, (bits, num_bytes) in found[0].items():
        assert found[1][key] == pytest.approx((bits, num_bytes), rel=1e-5), key


def test_numbers_of_media_that_a_batch_leaves_off_do_not_depend_on_the_microbatch(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document of eight pictures, in rows that hold two."""
    latents = generator(3, "pictures").standard_normal((8, 2, 4, 4)).astype(np.float32)
    spans = tuple(MediaSpan("image", latent, 0, "generate") for latent in latents)

    def batches(run: RunConfig, modality: str) -> list[Batch]:
        return list(pack_documents([Document("pictures", spans)], config=run))

    for module in (evaluation, errors_of_clean_latents):
        monkeypatch.setattr(module, "media_batches", batches)
    found = []
    for micro_batch in (1, 4):
        run = config(root, micro_batch=micro_batch, length=24)
        assert len(batches(run, "image")) == 4 // micro_batch
        host, _ = build(run)
        flow = media_by_document(host, run, modality="image")["pictures"][0]
        found.append({"flow": flow, **clean_errors(host, run, modality="image")})
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_what_is_scored_does_not_depend_on_the_seed_of_the_run(root: Path, numbers: dict[str, float]) -> None:
    host, _ = build(config(root))
    assert evaluate(host, config(root, seed=9), full=True) == numbers


def test_two_ranks_share_the_batches_and_add_up_to_one(root: Path) -> None:
    run = config(root)
    host, model = build(run)
    held_out = HeldOut(run)
    held_out(host)
    tables = list((held_out._tables or {}).values())
    assert sum(len(table.batches) for table in tables) % 2, "an odd number, so that one rank must repeat a batch"
    whole = document_sums(host, tables)
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    parts, forwards = [], []
    for rank in range(2):
        host.groups = Groups(dp_rank=rank, dp_size=2)  # world 1: nothing is summed over ranks here
        parts.append(document_sums(host, tables))
        forwards.append(len(calls))
        calls.clear()
    hook.remove()
    assert forwards[0] == forwards[1]
    for one, first, second in zip(whole, *parts, strict=True):
        for name in one:
            np.testing.assert_allclose(first[name] + second[name], one[name], rtol=1e-12)


def test_ranks_that_do_not_speak_add_nothing(root: Path) -> None:
    run = config(root)
    host, _ = build(run)
    held_out = HeldOut(run)
    held_out(host)
    host.groups = Groups(tp_rank=1, tp_size=2)
    sums = document_sums(host, list((held_out._tables or {}).values()))
    assert all((column == 0).all() for table in sums for column in table.values())


@torch.no_grad()
def test_bits_per_byte_is_that_of_each_document_alone(root: Path, numbers: dict[str, float]) -> None:
    run = config(root)
    _, model = build(run)
    bits, sizes = [], []
    for document in heldout_documents(run, "text", max_bytes=300):
        batch = build_batch([document], model=run.model, sequence_latents=48)
        logits = model.text_logits(model.latents(batch).flatten(0, 1), batch.text)
        nats = F.cross_entropy(logits, batch.text.symbol_U, reduction="sum")
        bits.append(float(nats) / math.log(2))
        sizes.append(len(document.spans[0].data))  # pyright: ignore
    value, n = sum(bits) / sum(sizes), len(sizes)
    assert numbers["heldout/text/bits_per_byte"] == pytest.approx(value, rel=1e-5)
    residuals = [b - value * size for b, size in zip(bits, sizes, strict=True)]
    stderr = math.sqrt(n / (n - 1) * sum(r * r for r in residuals)) / sum(sizes)
    assert numbers["heldout/text/bits_per_byte_stderr"] == pytest.approx(stderr, rel=1e-4)


@torch.no_grad()
def test_the_error_of_the_clean_latent_is_that_of_x_t_less_t_times_the_velocity(
    root: Path, numbers: dict[str, float]
) -> None:
    run = config(root)
    _, model = build(run)
    for index, log_snr in enumerate((-4, -2, 0, 2, 4), start=9):
        t, total, scalars = 1 / (1 + math.exp(log_snr / 2)), 0.0, 0
        for document in heldout_documents(run, "images", max_spans=5):
            batch = with_noise(
                build_batch([document], model=run.model, sequence_latents=48), time=t, seed=0, index=index
            )
            units = batch.media["image"]
            clean = (1 - t) * units.value_NF + t * units.noise_QF
            clean = clean - t * model.code["image"](model.latents(batch).flatten(0, 1), units)
            total += float((clean - units.value_NF).square().sum())
            scalars += clean.numel()
        assert numbers[f"heldout/image/x0_error_snr{log_snr}"] == pytest.approx(total / scalars, rel=1e-5)


def test_errors_of_clean_latents_are_the_same_for_all_objectives_where_the_network_says_nothing(root: Path) -> None:
    run, found = config(root), []
    for objective in ("flow", "ddpm_eps", "ddpm_v", "next_latent"):
        media = {name: one.model_copy(update={"objective": objective}) for name, one in run.model.media.items()}
        few = run.eval.model_copy(update={"text_bytes": 0, "captioned_spans": 0})
        asked = run.model_copy(update={"model": run.model.model_copy(update={"media": media}), "eval": few})
        evaluated = evaluate(build(asked, trained=False)[0], asked, full=True)
        loss = "next_latent_flow_loss" if objective == "next_latent" else f"{objective}_loss"
        assert f"heldout/image/{loss}" in evaluated
        found.append({name: value for name, value in evaluated.items() if "/x0_error" in name})
    assert len(found[0]) == 20
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4), name
        assert found[2][name] == pytest.approx(value, rel=1e-4), name
        assert found[3][name] == pytest.approx(value, rel=1e-4), name
    assert found[0]["heldout/image/x0_error_snr-4"] > 5 * found[0]["heldout/image/x0_error_snr4"]


@torch.no_grad()
def test_flow_loss_is_the_mean_over_scalars_and_eight_times(root: Path, numbers: dict[str, float]) -> None:
    run = config(root)
    _, model = build(run)
    total, scalars = 0.0, 0
    for document in heldout_documents(run, "speech", max_spans=5):
        plain = build_batch([document], model=run.model, sequence_latents=48)
        for k, t in enumerate(TIMES, start=1):
            batch = with_noise(plain, time=t, seed=0, index=k)
            units = batch.media["audio"]
            velocity = model.code["audio"](model.latents(batch).flatten(0, 1), units)
            total += float((velocity - (units.noise_QF - units.value_NF)).square().sum())
            scalars += velocity.numel()
    assert numbers["heldout/audio/flow_loss"] == pytest.approx(total / scalars, rel=1e-5)


def test_majority_is_the_share_of_the_commonest_answer_at_ends_of_spans(root: Path) -> None:
    run = config(root)
    held_out = HeldOut(run)
    found = held_out(build(run)[0])
    assert held_out._tables is not None
    batches = held_out._tables["router"].batches
    ends = torch.cat([batch.route.target_R[batch.route.span_end_R] for batch in batches])
    assert found["heldout/router/majority"] == float(torch.bincount(ends).max()) / len(ends)
    kinds = {int(target) for target in ends}
    assert len(kinds) > 2, "documents of several forms"
    keys = {key.split("/")[0] for batch in batches for key in batch.document_keys}
    assert keys == set(SOURCES)


def test_parts_that_are_asked_for_nothing_are_left_out(root: Path) -> None:
    run = config(root, text_bytes=0)
    assert not any("text" in name for name in evaluate(build(run)[0], run, full=False))
    run = config(root, media_spans=0)
    found = evaluate(build(run)[0], run, full=True)
    assert sorted(found) == ["heldout/text/bits_per_byte", "heldout/text/bits_per_byte_stderr"]


def test_other_captions_are_of_other_concepts_and_the_same_kin(root: Path) -> None:
    run = config(root)
    source = open_source("images", data=run.data, model=run.model, split="heldout")
    subjects = subjects_of(source, by_style=True)
    others = other_captions(subjects)
    owners = {(subject.kin, subject.caption): set[str]() for subject in subjects}
    for subject in subjects:
        owners[subject.kin, subject.caption].add(subject.concept)
    assert {subject.kin[-1] for subject in subjects} == {"flat", "round"}
    for subject in subjects:
        captions = others[subject.index]
        assert len(captions) == 4
        for caption in captions:
            assert caption != subject.caption
            assert owners[subject.kin, caption] - {subject.concept}
            assert caption.startswith("thing")
    first = [others[subject.index][0] for subject in subjects if subject.kin[-1] == "flat" and subject.rank == 0]
    assert len(set(first)) >= len(first) - 1, "a derangement gives each caption away once (two concepts share words)"


def test_other_captions_of_sounds_have_their_length(root: Path) -> None:
    run = config(root)
    source = open_source("speech", data=run.data, model=run.model, split="heldout")
    subjects = subjects_of(source, by_style=False)
    others = other_captions(subjects)
    of_caption = {subject.caption: subject.kin for subject in subjects if subject.caption != "thing 0"}
    assert {len(captions) for captions in others.values()} == {3}, "four concepts a length have three others"
    for subject in subjects:
        assert all(of_caption.get(caption, subject.kin) == subject.kin for caption in others[subject.index])


def test_every_concept_comes_once_before_any_comes_twice(root: Path) -> None:
    run = config(root)
    source = open_source("images", data=run.data, model=run.model, split="heldout")
    subjects = spread(subjects_of(source, by_style=True))
    assert len({subject.concept for subject in subjects[:7]}) == 7
    assert len(subjects) == 16


def test_a_model_that_sees_no_caption_gains_nothing(root: Path) -> None:
    """Fresh weights predict zero: the two arms are equal only if latents, noise and t are."""
    run = config(root)
    found = caption_gain(build(run, trained=False)[0], run, modality="image", num_spans=16)
    assert found["heldout/captions/image_gain"] == 0
    assert found["heldout/captions/image_gain_num_concepts"] == 7
    trained = caption_gain(build(run)[0], run, modality="image", num_spans=16)
    assert trained["heldout/captions/image_gain"] != 0


def in_trees(run: RunConfig, *, tree: str = "own") -> RunConfig:
    """The same run, its pictures a patch a cell in trees of at most half as many leaves."""
    budget = {"share": 0.5, "levels": 2, "noised_tree": tree}
    image = {**MODEL["media"]["image"], "patch": 1, "budget": budget}
    model = {**MODEL, "media": {**MODEL["media"], "image": image}}
    return RunConfig.model_validate(run.model_dump() | {"model": model})


def test_arms_of_trees_differ_in_the_tree_alone(root: Path) -> None:
    run = in_trees(config(root))
    host, model = build(run)
    found = tree_arms(host, model, run, modality="image")
    names = [f"{arm}_tree_flow_loss" for arm in ("own", "predicted", "shuffled")]
    errors = [f"{name}_stderr" for name in names]
    assert sorted(found) == sorted(f"heldout/image/{name}" for name in (*names, *errors, "tree_nats"))
    own = evaluate(host, run, full=False)["heldout/image/flow_loss"]
    assert found["heldout/image/own_tree_flow_loss"] == pytest.approx(own, rel=1e-6)
    assert len({round(found[f"heldout/image/{name}"], 6) for name in names}) == 3
    assert found == tree_arms(host, model, run, modality="image")


def test_a_shuffled_tree_is_another_pictures(root: Path) -> None:
    own, shuffled = (
        open_source("images", data=config(root).data, model=in_trees(config(root), tree=tree).model, split="train")
        for tree in ("own", "shuffled")
    )
    for index in range(len(own)):
        (_, one), (_, other) = (source.pick(index, direction="generate").spans for source in (own, shuffled))
        assert isinstance(one, MediaSpan) and isinstance(other, MediaSpan)
        (_, far) = own.pick((index + 8) % 16, direction="generate").spans
        assert (one.latent == other.latent).all() and (one.tree == other.tree).all()
        assert isinstance(far, MediaSpan) and (other.noised_tree == far.noised_tree).all()


@pytest.fixture
def run_folder(root: Path, tmp_path: Path) -> Path:
    run = config(root)
    host, _ = build(run)
    weights = host.state().weights
    tensors = {f"weights/{name}": value for name, value in weights.items()}
    tensors |= {f"ema/{name}": value / 2 for name, value in weights.items()}
    folder = tmp_path / "t"
    save(folder / "checkpoints", 7, tensors=tensors, state={}, keep=1)
    save_resolved(run, folder / "config.yaml")
    return folder


def test_inference_takes_the_weights_or_their_average(root: Path, run_folder: Path) -> None:
    _, trained = build(config(root))
    for ema, factor in ((False, 1.0), (True, 0.5)):
        _, host, model = load_for_inference(run_folder, ema=ema)
        assert host.steps == 7
        for ours, theirs in zip(model.parameters(), trained.parameters(), strict=True):
            assert torch.equal(ours, factor * theirs)


def test_inference_forgets_the_layout_that_trained(root: Path, run_folder: Path) -> None:
    run = config(root)
    wide = ParallelConfig(tp=2, cp=2, pp=2, virtual_stages=2, dp=2, recompute="full", threads=1)
    save_resolved(run.model_copy(update={"parallel": wide}), run_folder / "config.yaml")
    found, _, _ = load_for_inference(run_folder, ema=False)
    assert found.parallel == ParallelConfig(host="plain", threads=1)


def test_the_door_writes_what_it_shows(
    run_folder: Path, numbers: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    media_alone = [str(run_folder), "--text-bytes", "0", "--json"]
    assert main(media_alone) == 0
    shown = capsys.readouterr().out.splitlines()
    line = json.loads(shown[-1])
    loss = line["heldout/image/flow_loss"]
    assert loss == pytest.approx(numbers["heldout/image/flow_loss"], rel=1e-6)
    assert not any(name.startswith("text/") for name in line["baselines"])
    (row,) = [row.split() for row in shown if row.split()[:1] == ["image/flow_loss"]]
    error, below = line["heldout/image/flow_loss_stderr"], f"heldout/image/below_{row[4]}"
    assert line[below] == pytest.approx(line["baselines"][f"image/{row[4]}"] - loss)
    better = line[below] / line[f"{below}_stderr"]
    assert row[1:4] == [f"{loss:.4f}", "±", f"{error:.4f}"]
    assert row[-1] == f"{better:+.1f}"
    assert json.loads((run_folder / "baselines.json").read_text()) == line["baselines"]
    assert main([*media_alone, "--ema"]) == 0
    kept = json.loads((run_folder / "evaluation.json").read_text())
    assert kept["step"] == 7
    assert kept["heldout_ema/image/flow_loss"] != kept["heldout/image/flow_loss"] == loss


def test_parts_that_are_evaluated_one_after_the_other_stand_together(run_folder: Path) -> None:
    def kept(*amounts: str) -> tuple[dict[str, float], dict[str, float]]:
        assert main([str(run_folder), *amounts, "--judged-samples", "0"]) == 0
        read = [json.loads((run_folder / f"{name}.json").read_text()) for name in ("evaluation", "baselines")]
        return read[0], read[1]

    text, text_bases = kept("--text-bytes", "300", "--media-spans", "0")
    both, both_bases = kept("--text-bytes", "0", "--media-spans", "2")
    assert both.items() > text.items() and "heldout/image/flow_loss" in both
    assert both_bases.items() > text_bases.items() and "image/gaussian_channel" in both_bases
    one, one_bases = kept("--text-bytes", "1", "--media-spans", "0")  # one document, which has no standard error
    assert "heldout/text/bits_per_byte_stderr" in both and "heldout/text/bits_per_byte_stderr" not in one
    assert "text/order0_stderr" in both_bases and "text/order0_stderr" not in one_bases
    (run_folder / "evaluation.json").write_text(json.dumps(both | {"step": 6}))
    assert kept("--text-bytes", "300", "--media-spans", "0") == (text, text_bases)


def test_another_text_set_is_scored_whole_and_nothing_is_kept(
    root: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every byte of its held-out documents counts once; they are what this run's own text would give, in full."""
    before = sorted(run_folder.iterdir())
    for split in ("train", "heldout"):
        write_text(tmp_path / "other" / split, name=split)
    assert main([str(run_folder), "--data", str(tmp_path / "other"), "--json"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not any("image" in key or "router" in key or "captions" in key for key in line)
    run = config(root, text_bytes=10**9, media_spans=0)
    whole = evaluate(build(run)[0], run, full=False)
    assert line["heldout/text/bits_per_byte"] == pytest.approx(whole["heldout/text/bits_per_byte"], rel=1e-6)
    documents = [d for batch in heldout_batches(run, "text", max_bytes=10**9) for d in batch.document_keys]
    assert len(set(documents)) == 12
    assert {"text/order0", "text/order2", "text/xz"} <= set(line["baselines"])
    assert sorted(run_folder.iterdir()) == before
    assert main([str(run_folder), "--data", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err


def test_the_door_says_in_one_sentence_what_is_missing(
    root: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path) -> str:
        assert main([str(folder)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "config.yaml" in refused(tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    save_resolved(config(root), empty / "config.yaml")
    assert "must hold a checkpoint, got none" in refused(empty)
    other = config(root).model_dump()
    other["model"]["atto"]["ffn_width"] = 24
    save_resolved(RunConfig.model_validate(other), run_folder / "config.yaml")
    assert "another model" in refused(run_folder)
    with pytest.raises(CheckpointError, match="another model"):
        load_for_inference(run_folder, ema=True)
