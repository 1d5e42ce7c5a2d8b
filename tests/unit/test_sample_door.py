"""What the doors of sampling and evaluation refuse before they load anything: these run folders hold no weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from matformer import evaluate, sample
from matformer.config.load import save_resolved
from matformer.engine.draws import GUIDANCE, guidance_for
from matformer.engine.sample_quality import DRAWS, draws_for
from tests.made import tiny_run, with_media


def run_folder(folder: Path, *, blind: float, objective: str = "flow") -> Path:
    run = tiny_run()
    data = run.data.model_copy(update={"blind_probability": blind})
    folder.mkdir()
    model = with_media(run.model, objective=objective)
    save_resolved(run.model_copy(update={"data": data, "model": model}), folder / "config.yaml")
    return folder


def said(door: object, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert door.main(arguments) == 2  # type: ignore[attr-defined]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_guidance_of_a_run_that_never_learned_without_conditions_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = run_folder(tmp_path / "run", blind=0.0), ["--out", str(tmp_path / "out"), "--want", "image"]
    sentence = "--guidance must be 1 (none) where data.blind_probability is 0"
    assert sentence in said(sample, [str(folder), *out, "--guidance", "3"], capsys)
    assert sentence in said(evaluate, [str(folder), "--judged-samples", "4", "--guidance", "3"], capsys)
    for allowed in ([], ["--guidance", "1"]):
        assert "must hold a checkpoint" in said(sample, [str(folder), *out, *allowed], capsys)
    other = run_folder(tmp_path / "other", blind=0.1)
    assert "must hold a checkpoint" in said(sample, [str(other), *out, "--guidance", "3"], capsys)


@pytest.mark.parametrize(("blind", "guidance", "judged"), [(0.0, 1.0, 1.0), (0.1, GUIDANCE, DRAWS.guidance)])
def test_guidance_is_none_unless_it_was_learned(blind: float, guidance: float, judged: float) -> None:
    run = tiny_run()
    run = run.model_copy(update={"data": run.data.model_copy(update={"blind_probability": blind})})
    assert guidance_for(run) == guidance
    assert draws_for(run).guidance == judged


def test_more_steps_than_dpm_solver_has_indices_are_refused_where_media_are_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", blind=0.1, objective="ddpm_v")
    asked = [str(folder), "--out", str(tmp_path / "out"), "--solver", "dpm", "--steps"]
    for want in ("image", "auto"):
        error = said(sample, [*asked, "988", "--want", want], capsys)
        assert "--steps must be at most 987 for --solver dpm under ddpm_v, got 988" in error
    for steps, want in (("987", "image"), ("988", "text")):
        assert "must hold a checkpoint" in said(sample, [*asked, steps, "--want", want], capsys)
