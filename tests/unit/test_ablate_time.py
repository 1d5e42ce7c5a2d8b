"""The ablation of time conditionings: arms that run, differences seed by seed, a document that says what is there."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matformer.engine.clean_errors import LOG_SNRS
from matformer.errors import ConfigError
from tests.made import tiny_run

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "ablate"))  # tools are scripts, not a package

import cost
import jobs
import scores
import tables
import time_arms
import time_document as paper


@pytest.mark.parametrize("arm", time_arms.ARMS)
def test_an_arm_differs_from_the_others_in_its_objective_and_conditioning_alone(arm: str) -> None:
    config, reference = time_arms.load_arm(arm), time_arms.load_arm("flow-add")
    objective, conditioning = arm.split("-")
    for media in config.model.media.values():
        assert (media.objective, media.time_conditioning) == (objective, conditioning)
    own = {"objective": "flow", "time_conditioning": "add"}
    media = {name: one.model_copy(update=own) for name, one in config.model.media.items()}
    model = config.model.model_copy(update={"media": media})
    assert config.model_copy(update={"name": "flow-add", "model": model}) == reference


def test_every_config_is_an_arm_or_their_base() -> None:
    assert len(time_arms.ARMS) == 18
    assert {file.stem for file in time_arms.FOLDER.glob("*.yaml")} == {*time_arms.ARMS, "base"}
    with pytest.raises(ConfigError, match="an arm must be one of flow-none, .* got flow-film"):
        time_arms.load_arm("flow-film")


def test_a_difference_is_taken_seed_by_seed() -> None:
    found = tables.difference_by_seed([1.0, 2.0, 3.0], [0.5, 1.5, 2.6])
    assert found["by_seed"] == pytest.approx([0.5, 0.5, 0.4])
    assert found["value"] == pytest.approx(1.4 / 3) and found["stderr"] == pytest.approx(0.1 / 3)
    assert tables.difference_by_seed([1.0], [2.0])["stderr"] is None
    assert tables.verdict(found) == "above"
    assert tables.verdict(found | {"by_seed": [0.5, 0.5, -0.1]}) == "not clearly apart from"


def test_of_nothing_one_in_twenty_is_called_a_difference() -> None:
    assert tables.clear_over_seeds(3) == pytest.approx(4.3027, abs=1e-4)  # any table of Student's t
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    sides = [tables.verdict(tables.difference_by_seed(list(three), [0.0, 0.0, 0.0])) for three in draws]
    called = sum(side != "not clearly apart from" for side in sides)
    assert 0.035 < called / len(draws) < 0.06  # a few of the 5 % have not one sign


def stood_in(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """A scorer that leaves a trace of each call."""
    with (folder / "calls").open("a") as file:
        file.write("x")
    return {"numbers": {"wanted": asked["amount"]}}


def test_what_was_scored_is_scored_again_only_if_something_else_is_asked(tmp_path: Path) -> None:
    job = jobs.Job("flow-add", 0, 4, time_arms.config_file("flow-add"), tmp_path)
    job.folder.mkdir()
    for amount, calls in ((3, 1), (3, 1), (4, 2)):
        found = scores.score_all([job, job], stood_in, asked={"amount": amount}, file="numbers.json", at_once=1)
        assert found == {job: {"asked": {"amount": amount}, "numbers": {"wanted": amount}}}
        assert len((job.folder / "calls").read_text()) == calls


def test_a_cost_is_measured_once_for_a_config(tmp_path: Path) -> None:
    found = cost.MediaCost(parameters=5, flops_a_step=2.0, cpu_seconds_a_step=0.1)
    calls: list[int] = []

    def measure() -> cost.MediaCost:
        calls.append(1)
        return found

    config = tiny_run(host="plain")
    for one in (config, config.model_copy(update={"name": config.name, "eval": config.eval})):
        assert cost.kept_cost(one, tmp_path, kind=cost.MediaCost, measure=measure) == found
    assert len(calls) == 1
    cost.kept_cost(tiny_run(host="plain", layers=4), tmp_path, kind=cost.MediaCost, measure=measure)
    assert len(calls) == 2


def numbers(*, factor: float, flow: bool, bits: float, top1: float) -> dict[str, float]:
    """What a run's evaluation gives, all errors times `factor`."""
    found = {"heldout/text/bits_per_byte": bits}
    for modality in ("image", "audio"):
        found |= {f"heldout/{modality}/x0_error_snr{snr}": factor * math.exp(-snr / 4) for snr in LOG_SNRS}
        found[f"heldout/{modality}/{'flow' if flow else 'ddpm_v'}_loss"] = factor
        found[f"heldout/captions/{modality}_gain_z"] = 2.5
    samples = {"frechet": 40.0, "frechet_real": 1.4, "top1": top1, "top1_shuffled": 0.02, "top1_real": 0.37}
    samples |= {"top1_gain": top1 - 0.02, "top1_gain_stderr": 0.01, "top1_majority": 0.16}
    return found | {f"heldout/samples/image_{name}": value for name, value in samples.items()}


def results() -> dict[str, Any]:
    """Three arms, two seeds: `token` better by a tenth, DDPM worse, once better and once worse in text."""
    cost = {"parameters": 12e6, "flops_a_step": 32e9, "cpu_seconds_a_step": 0.85}
    arms = {
        "flow-add": {"objective": "flow", "conditioning": "add", **cost},
        "flow-token": {"objective": "flow", "conditioning": "token", **cost, "flops_a_step": 33e9},
        "ddpm_v-add": {"objective": "ddpm_v", "conditioning": "add", **cost},
    }
    runs = {
        "flow-add": [numbers(factor=f, flow=True, bits=4.0, top1=0.1) for f in (1.0, 1.1)],
        "flow-token": [numbers(factor=f, flow=True, bits=b, top1=0.12) for f, b in ((0.9, 3.9), (0.99, 4.05))],
        "ddpm_v-add": [numbers(factor=f, flow=False, bits=4.1, top1=0.04) for f in (1.2, 1.3)],
    }
    made = {"command": "python it", "date": "2026-11-26", "machine": "2 cores", "torch": "2", "seeds": [0, 1]}
    made |= {"steps": 120, "text_bytes": 30_000, "media_spans": 48, "captioned_spans": 32, "judged_samples": 128}
    seeded = {arm: [{"seed": seed, **one} for seed, one in enumerate(own)] for arm, own in runs.items()}
    return {"made": made, "reference": "add", "arms": arms, "runs": seeded}


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """First cell -> the others, of the table under a title."""
    section = text.split(f"## {title}")[1].split("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith(("| `", "| *"))]
    return {cells[0].strip(" `*"): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_document_says_what_is_there() -> None:
    text = paper.render(results(), picture="it.png")
    pictures = rows_of(text, "Pictures: held-out errors")
    assert list(pictures) == ["flow-add", "flow-token", "ddpm_v-add"]
    assert pictures["flow-add"][0] == "1.050 ± 0.071" and pictures["flow-add"][-2] == ""
    assert pictures["flow-token"][3] == "0.9450 ± 0.0636"  # log-SNR 0
    assert pictures["flow-token"][-2] == "-10.0 % (0.0)", "a tenth less at every level under either seed"
    assert pictures["ddpm_v-add"][0] == "", "it has no flow loss"
    drawn = rows_of(text, "Pictures that were drawn")
    assert drawn["flow-token"] == ["40.000 ± 0.000", "0.120 ± 0.000", "0.020 ± 0.000", "+0.100 (0.010)"]
    assert drawn["real pictures"][:2] == ["1.400", "0.370"] and drawn["the commonest kind"][1] == "0.160"
    words = rows_of(text, "Text in the joint run, and what a step costs")
    assert words["flow-token"] == ["3.975 ± 0.106", "-0.025 (0.075)", "12.00", "33.0", "0.85"]
    assert words["flow-add"][1] == "" and words["ddpm_v-add"][1] == ""
    assert (
        "Smallest errors of the clean latent, all levels together: `flow-token`.\n- Below `flow-add`: `flow-token`."
        in text
    )
    assert "- Not clearly apart from `flow-add`: `flow-token`." in text, "of text the seeds do not agree"
    assert "**These are short runs**: 120 steps for 12.0 M parameters" in text and "![Errors" in text


def test_every_row_has_as_many_cells_as_its_head() -> None:
    text = paper.render(results(), picture="it.png")
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_run_without_samples_sounds_or_seeds_is_written_all_the_same(tmp_path: Path) -> None:
    few = copy.deepcopy(results())
    for arm, runs in few["runs"].items():
        gone = ("heldout/samples", "heldout/audio", "heldout/captions")
        few["runs"][arm] = [{key: value for key, value in runs[0].items() if not key.startswith(gone)}]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(few))
    assert paper.main([str(file), "--out", str(tmp_path / "docs" / "it.md")]) == 0
    text = (tmp_path / "docs" / "it.md").read_text()
    assert "Sounds" not in text and "drawn" not in text.split("## How")[0]
    assert "-10.0 % |" in text, "one seed has no standard error"
    assert (tmp_path / "docs" / "it.png").stat().st_size > 1000
