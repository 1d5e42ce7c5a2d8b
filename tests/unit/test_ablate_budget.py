"""The ablation of budgets: arms that differ in their copies alone, the same documents, differences in pairs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.write import npy
from matformer.data.shards import ShardWriter
from matformer.data.statistics import with_statistics
from matformer.errors import ConfigError
from matformer.parcels import Batch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "ablate"))  # tools are scripts, not a package

import budgeted_patches as ablation
import budgeted_patches_document as paper
import jobs

SMALL = (
    "model.atto={width: 32, layers: 1, heads: 2, kv_heads: 2, ffn_width: 32, rotary_pairs: [2, 2, 2, 2]}",
    "model.text={width: 16, ffn_width: 16, preludio_ngrams: [], coda_ngrams: []}",
    "model.media.image.coda_width=16",
    "data.sources.drawn.weight=2",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures with a caption in each split."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "heldout"):
        draws = np.random.default_rng(len(split))
        extra = {"latents": {"shift": [0.0] * 32, "scale": 1.0, "channel_variance": [1.0] * 32}}
        with ShardWriter(root / "images" / split, form="pairs", extra=extra) as writer:
            for number in range(6):
                facts = {"modality": "image", "bucket": [8, 8], "texts": [{"lang": "en", "text": f"thing {number}"}]}
                latent = draws.standard_normal((32, 8, 8)).astype(np.float16)
                writer.add(f"{split}-{number}", {"json": json.dumps(facts).encode(), "moments.npy": npy(latent)})
    return root


def small(root: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.root={root}", "data.recipe=null", *more]


@pytest.mark.parametrize("arm", ablation.ARMS)
def test_an_arm_differs_in_its_pictures_copies_alone(arm: str) -> None:
    config, reference = ablation.load_arm(arm), ablation.load_arm("full")
    assert config.name == arm
    own = {"patch": 1, "budget": None}
    media = {"image": config.model.media["image"].model_copy(update=own)}
    assert config.model.model_copy(update={"media": media}) == reference.model
    alike = {"name": "full", "model": reference.model, "data": reference.data}
    assert config.model_copy(update=alike) == reference
    weights = {name: (one.path, one.weight) for name, one in config.data.sources.items()}
    given = {"given": ("images", 8.0), "drawn": ("images", 4.0)}
    assert weights == (given if arm in paper.CLEAN else {"drawn": ("images", 8.0)})


def test_every_config_is_an_arm_or_their_base() -> None:
    assert {file.stem for file in ablation.FOLDER.glob("*.yaml")} == {*ablation.ARMS, "base"}
    with pytest.raises(ConfigError, match="an arm must be one of full, .* got third"):
        ablation.load_arm("third")


def test_arms_take_the_latents_that_they_are_named_for(root: Path) -> None:
    wanted = {"full": 64, "half": 31, "quarter": 16, "ninth": 7, "coarse": 16, "blank": 0}
    wanted |= {"grid": 64, "tree_half": 31, "tree_quarter": 16, "shuffled_quarter": 16, "coarse_grid": 16}
    for arm in ablation.ARMS:
        config = with_statistics(ablation.load_arm(arm, small(root)))
        assert ablation.latents_of_a_picture(config, spans=4) == wanted[arm], arm


def test_arms_of_a_kind_see_the_same_documents_and_noise(root: Path) -> None:
    def steps(arm: str, seed: int) -> Iterator[Batch]:
        return ablation.training_batches(with_statistics(ablation.load_arm(arm, small(root, f"seed={seed}"))))

    def seen(arm: str, seed: int = 0) -> list[tuple[str, ...]]:
        return [batch.document_keys for batch in islice(steps(arm, seed), 3)]

    first = next(steps("full", 0))
    assert [sum(key.startswith(name) for key in first.document_keys) for name in ("given", "drawn")] == [6, 2]
    assert len(first.grid.kind_BS) == 10  # of six pictures, two are shown twice
    for arm in paper.CLEAN:
        assert seen(arm) == seen("full")
        assert next(steps(arm, 0)).num_bytes == first.num_bytes
    assert seen("full") != seen("full", seed=1)
    half, noise = next(steps("half", 0)).media["image"], first.media["image"]
    assert (half.noise_QF == noise.noise_QF).all() and (half.time_T == noise.time_T).all()


def asked(root: Path, out: Path, *arms: str, spans: int = 4, more: tuple[str, ...] = ()) -> list[str]:
    found = ["--arms", ",".join(arms), "--seeds", "0", "--steps", "2", "--spans", str(spans), "--jobs", "1"]
    return [*found, "--out", str(out), "--document", str(out / "found.md"), *small(root, *more)]


def test_the_door_writes_a_document_and_goes_on_where_it_stood(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: what a pool of processes would do is not what is tested here."""
    trained = []

    def at_once(every: list[jobs.Job], scorer: Any, *, asked: Any, file: str, at_once: int) -> dict[jobs.Job, Any]:
        for job in every:
            if not (job.folder / file).is_file():
                trained.append(job.arm)
                (job.folder / file).write_text(json.dumps(scorer(job.folder, asked)))
        return {job: json.loads((job.folder / file).read_text()) for job in every}

    monkeypatch.setattr(ablation, "score_all", at_once)
    arms = ("full", "blank", "grid", "tree_half")
    assert ablation.main(asked(root, tmp_path, *arms)) == 0
    text = (tmp_path / "found.md").read_text()
    assert "`tree_half` | own trees of half the patches | 31.0 | 52%" in text and "predicted" in text
    assert (tmp_path / "found.png").stat().st_size > 1000
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["made"]["captions"] == 4 and found["made"]["pictures"] == 2
    assert set(found["differences"]) == {"blank", "tree_half"}
    assert set(found["differences"]["tree_half"]) == {"own", "predicted", "shuffled"}
    assert len(found["differences"]["blank"]["captions"]["stderr_by_seed"]) == 1
    assert trained == list(arms)
    assert ablation.main(asked(root, tmp_path, *arms)) == 0 and trained == list(arms)
    assert json.loads((tmp_path / "results.json").read_text())["losses"] == found["losses"]
    assert ablation.main(asked(root, tmp_path, "grid", more=("train.lr=1.0e-3",))) == 0
    assert trained == [*arms, "grid"]


def test_an_arm_without_its_reference_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation.main(asked(root, tmp_path, "full", "tree_half")) == 2
    assert "--arms must hold grid, which tree_half is held against, got full,tree_half" in capsys.readouterr().err


def columns(*losses: float) -> dict[str, Any]:
    return {"keys": ["a", "b"], "sizes": [10, 20], "losses": list(losses)}


def test_a_difference_has_the_error_over_documents_of_each_seed() -> None:
    reference = [columns(20.0, 60.0), columns(20.0, 60.0)]
    found = ablation.difference([columns(21.0, 62.0), columns(24.0, 60.0)], reference)
    assert found["by_seed"] == pytest.approx([3 / 30, 4 / 30])
    # of the first, both documents are 1/10 a unit above; of the second, 4 of 10 units and 0 of 20
    assert found["stderr_by_seed"] == pytest.approx([0.0, np.sqrt(2 * 2 * (4 - 4 / 3) ** 2) / 30])
    assert ablation.difference([columns(21.0, 62.0)], reference[:1])["by_seed"] == pytest.approx([0.1])
