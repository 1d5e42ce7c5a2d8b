"""The interference ablation: arms that share the joint arm's units, differences in pairs, and what noise hides."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from matformer.config.load import load_run, save_resolved
from matformer.data.statistics import with_statistics
from matformer.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "ablate"))  # tools are scripts, not a package

import interference
import interference_document as paper
import jobs

ALL = (*interference.SINGLE, *interference.JOINT)


@pytest.mark.parametrize("arm", ALL)
def test_an_arm_is_a_config_that_can_run_on_the_same_atto(arm: str) -> None:
    config, joint = interference.load_arm(arm), interference.load_arm("joint")
    assert config.name == arm
    assert config.model.atto == joint.model.atto and config.model.text == joint.model.text
    alike = {"global_batch": True, "micro_batch": True}
    assert config.train.model_dump(exclude=alike) == joint.train.model_dump(exclude=alike)
    assert config.data.sequence_latents == joint.data.sequence_latents


def test_the_single_batches_are_the_joint_one() -> None:
    batches = {arm: interference.load_arm(arm).train.global_batch for arm in ALL}
    assert batches["text"] + batches["image"] + batches["audio"] == batches["joint"] == batches["joint_apart"]


def test_a_single_arm_has_one_modality() -> None:
    shows = {
        arm: {(source.form, source.shows) for source in interference.load_arm(arm).data.sources.values()}
        for arm in interference.SINGLE
    }
    assert shows["text"] == {("text", "both"), ("pairs", "caption")}
    assert shows["image"] == shows["audio"] == {("pairs", "medium")}
    assert list(interference.load_arm("image").model.media) == ["image"]
    assert not interference.load_arm("text").model.media


def test_every_config_is_an_arm_or_their_base() -> None:
    assert {file.stem for file in interference.FOLDER.glob("*.yaml")} == {*ALL, "base"}


def units(**joint: float) -> dict[str, list[dict[str, float]]]:
    return {"text": [{"text": 100.0}], "image": [{"image": 50.0}], "audio": [{"audio": 20.0}], "joint": [joint]}


def test_unequal_units_are_refused() -> None:
    interference.require_equal_units(units(text=104.0, image=48.0, audio=20.0))
    with pytest.raises(ConfigError, match="joint must see as much image as the arm image within 5%, got 45 and 50"):
        interference.require_equal_units(units(text=100.0, image=45.0, audio=20.0))


def test_units_are_those_of_the_last_step(tmp_path: Path) -> None:
    rows = [
        '{"step": 1, "loss": 1.0, "bytes_seen": 10.0, "image/patches_seen": 3.0}',
        '{"step": 2, "loss": 1.0, "bytes_seen": 0.0, "image/patches_seen": 7.0}',
        '{"step": 2, "heldout/image/flow_loss": 0.5}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert interference.units_seen(tmp_path) == {"image": 7.0}


def test_a_run_whose_config_was_filled_in_from_its_data_is_seen_to_be_finished(tmp_path: Path) -> None:
    manifest = tmp_path / "data" / "images" / "train" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"latents": {"shift": [0.0] * 32, "scale": 2.0, "channel_variance": [0.25] * 32}}))
    job = jobs.Job("image", 0, 4, interference.FOLDER / "image.yaml", tmp_path, (f"data.root={tmp_path / 'data'}",))
    job.folder.mkdir()
    config = with_statistics(load_run(job.config, job.keys))
    assert config.model.media["image"].channel_variance == (1.0,) * 32
    save_resolved(config, job.folder / "config.yaml")
    assert not jobs.finished(job)
    (job.folder / "finished").touch()
    assert jobs.finished(job)


def columns(*losses: float) -> dict[str, Any]:
    return {"keys": ["a", "b"], "sizes": [10, 20], "losses": list(losses)}


def test_a_difference_is_taken_document_by_document() -> None:
    single = [columns(20.0, 60.0), columns(22.0, 62.0)]
    joint = [columns(17.0, 54.0), columns(19.0, 56.0)]
    found = interference.difference(joint, single)
    assert found["value"] == pytest.approx(-9 / 30)
    assert found["by_seed"] == pytest.approx([-0.3, -0.3])
    assert found["stderr"] == pytest.approx(0.0) and found["stderr_of_seeds"] == pytest.approx(0.0)


def test_seeds_that_differ_widen_the_error() -> None:
    single = [columns(20.0, 60.0)] * 2
    found = interference.difference([columns(20.0, 60.0), columns(23.0, 66.0)], single)
    assert found["stderr_of_seeds"] == pytest.approx(0.15)
    assert found["stderr"] >= 0.15


def results(*, self_cosine: float = 0.5, seeds: int = 2) -> dict[str, Any]:
    """Two layers and all of them, two looks a seed; text a little worse, pictures better beside the others."""
    looks = []
    for seed in range(seeds):
        for step in (10, 20):
            row: dict[str, float] = {"step": step}
            for place in ("layer_00", "layer_01", "atto"):
                for pair in (*paper.PAIRS, "image_audio"):
                    row[f"gradients/{place}/{pair}_cosine"] = -0.1 - 0.01 * seed
                    row[f"gradients/{place}/{pair}_norm_ratio"] = 4.0
                for name in paper.SELVES:
                    row[f"gradients/{place}/{name}_self_cosine"] = self_cosine
            looks.append(row)
    per_seed = [looks[2 * seed : 2 * seed + 2] for seed in range(seeds)]
    parts = {"text": 4.0, "image": 0.8, "audio": 1.4}
    losses = {name: {name: [value] * seeds} for name, value in parts.items()}
    losses["joint"] = {name: [value] * seeds for name, value in parts.items()} | {"image captioned": [0.7] * seeds}
    one = {"value": 0.2, "stderr": 0.05, "stderr_of_seeds": 0.0, "by_seed": [0.2] * seeds}
    better = {"value": -0.1, "stderr": 0.01, "stderr_of_seeds": 0.0, "by_seed": [-0.1] * seeds}
    unclear = {"value": 0.1, "stderr": 0.2, "stderr_of_seeds": 0.0, "by_seed": [0.1] * seeds}
    made = {"command": "python x", "date": "2026-11-26", "machine": "2 cores", "torch": "2", "steps": 20}
    made |= {"heldout_documents": 3, "heldout_bytes": 900, "heldout_image": 4, "heldout_audio": 4}
    units = {"text": {"text": 2000.0}, "image": {"image": 50.0}, "audio": {"audio": 20.0}}
    units["joint"] = {"text": 2010.0, "image": 50.0, "audio": 20.0}
    return {
        "made": made | {"seeds": list(range(seeds))},
        "arms": {arm: {"parameters": 5e6, "units": [seen] * seeds} for arm, seen in units.items()},
        "losses": losses,
        "differences": {"joint": {"text": one, "image": better, "audio": unclear, "image captioned": better}},
        "gradients": {"joint": per_seed},
    }


def test_noise_is_taken_out_of_a_cosine() -> None:
    # halves that agree to 1/2 make a whole of reliability 2/3: the mean of -0.10 and -0.11 over 2/3
    assert paper.without_noise(results(), "joint", "atto", "text", "media") == pytest.approx(-0.105 * 1.5)
    assert paper.without_noise(results(self_cosine=1.0), "joint", "atto", "text", "media") == pytest.approx(-0.105)
    assert paper.without_noise(results(self_cosine=-0.1), "joint", "atto", "text", "media") is None


def test_the_document_says_who_was_helped_and_who_was_hurt() -> None:
    text = paper.render(results(), picture="x.png")
    assert "text hurt (+5.0 %), pictures helped (-12.5 %), sounds neither (+7.1 %)" in text
    assert "text and media pull apart: mean cosine -0.1050" in text
    assert "4 of 4" in text and "These are short runs" in text


def test_every_row_has_as_many_cells_as_the_head() -> None:
    found = results()
    tables = [paper.units_table(found), paper.losses_table(found)]
    tables += [paper.cosines_table(found, "joint"), paper.ratios_table(found, "joint")]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
        assert len(table.splitlines()) > 2


def test_one_seed_is_written_too(tmp_path: Path) -> None:
    found = results(seeds=1)
    found["differences"]["joint"]["text"]["stderr"] = None
    paper.write(found, tmp_path / "out.md")
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert "are not clearly apart from orthogonal" in (tmp_path / "out.md").read_text()
