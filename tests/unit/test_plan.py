"""The plan of a cluster: what it says of layouts, and the files that it chose."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from matformer.config.check import check
from matformer.config.device import DeviceConfig, load_device
from matformer.config.load import load_run
from matformer.config.schema import RunConfig
from matformer.errors import ConfigError
from matformer.parallel.counts import document_pairs
from matformer.parallel.expected import Guess, expected_counts, guess_of, heaviest_counts
from matformer.parallel.layouts import Estimate, estimate, estimates, no_layout
from matformer.parallel.memory import Stage, stages, worst_rank
from matformer.parallel.parameters import parameters_by_part
from matformer.parallel.tables import best, plan_file
from matformer.plan import main
from tools.model_family import FAMILY, yaml_of

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = load_device(CONFIGS / "device" / "h100.yaml")


def run_of(name: str, *overrides: str) -> RunConfig:
    return load_run(CONFIGS / "run" / f"{name}.yaml", overrides)


def estimate_of(run: RunConfig, device: DeviceConfig = H100) -> Estimate:
    check(run)
    return estimate(run, guess_of(run), device)


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_is_what_its_tool_writes_and_its_names_say(name: str) -> None:
    assert (CONFIGS / "model" / f"{name}.yaml").read_text() == yaml_of(name)
    run = run_of("1b", f"model={name}")
    check(run)
    number = sum(parameters_by_part(run.model).values())
    said = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert number == pytest.approx(1.3e9 if name == "1b" else said, rel=0.15)


@pytest.mark.parametrize("file", sorted((CONFIGS / "plan").glob("*h100.yaml")), ids=lambda file: file.stem)
def test_plans_of_the_large_models_are_what_plan_chooses(file: Path) -> None:
    text = file.read_text()
    found = re.fullmatch(r"# by `python -m matformer.plan (\S+) --gpus (\d+) --device h100 ?(.*)`", text.split("\n")[0])
    assert found is not None
    config, gpus, overrides = found[1], int(found[2]), found[3].split()
    run = load_run(CONFIGS.parent / config, overrides)
    (first,) = best(estimates(run, guess_of(run), H100, gpus=gpus), H100, count=1)
    command = text.split("`")[1]
    assert plan_file(first, command=command) == text
    assert first.fits(H100) and first.config.parallel.ranks == gpus
    planned = load_run(CONFIGS.parent / config, [*overrides, f"plan={file.stem}"])
    check(planned)
    assert planned.parallel == first.config.parallel


def test_each_axis_takes_memory_away() -> None:
    one = run_of("1b", "parallel.dp=8")
    whole = estimate_of(one).memory
    for overrides, key in (
        (("parallel.dp=64",), "moments"),
        (("parallel.dp=4", "parallel.pp=2"), "weights"),
        (("parallel.dp=4", "parallel.tp=2"), "activations"),
        (("parallel.zero_stage=3",), "masters"),
        (("train.optimizer=sgd",), "moments"),
    ):
        other = estimate_of(run_of("1b", "parallel.dp=8", *overrides)).memory
        assert getattr(other, key) <= getattr(whole, key)
    assert estimate_of(run_of("1b", "parallel.dp=8", "parallel.zero_stage=3")).memory.weights == whole.weights / 8


def test_a_stage_holds_as_many_microbatches_as_follow_it() -> None:
    assert [Stage(number, 4, 6).in_flight(16) for number in range(4)] == [4, 3, 2, 1]
    assert [Stage(number, 4, 6).in_flight(2) for number in range(4)] == [2, 2, 2, 1]


def test_layers_of_uneven_stages_are_those_of_the_config() -> None:
    run = run_of("1b", "parallel.pp=2", "parallel.stage_layers=[10,14]")
    assert [stage.layers for stage in stages(run)] == [10, 14]
    run = run_of("1b", "parallel.pp=2", "parallel.virtual_stages=2", "parallel.stage_layers=[4,7,6,7]")
    assert [stage.layers for stage in stages(run)] == [10, 14]


def test_the_bubble_is_that_of_1f1b() -> None:
    run = run_of("1b", "parallel.pp=4", "train.global_batch=16")
    found = estimate_of(run)
    assert found.bubble == 3 / (16 + 3)
    alone = estimate_of(run_of("1b", "train.global_batch=16"))
    assert found.time.bubble > 0 and alone.time.bubble == 0 and alone.time.pipeline == 0


def test_traffic_is_that_of_rings() -> None:
    """Of a stream of 8,192 x 2,048 numbers in bfloat16, 24 layers; of 1.3 G parameters, gradients in float32."""
    stream = 8192 * 2048 * 2
    run = run_of("1b", "parallel.tp=2", "parallel.dp=1", "train.global_batch=4")
    assert estimate_of(run).traffic.tensor == 4 * 24 * 8 * stream / 2
    piped = estimate_of(run_of("1b", "parallel.pp=2", "train.global_batch=4"))
    assert piped.traffic.pipeline == 4 * stream and piped.traffic.data == 0
    spread = run_of("1b", "parallel.dp=4")
    number = sum(parameters_by_part(spread.model).values())
    assert estimate_of(spread).traffic.data == pytest.approx(number * 3 / 4 * (2 * 4 + 2))


def test_a_slower_device_takes_longer_and_a_smaller_holds_less() -> None:
    run = run_of("1b", "parallel.dp=8")
    half = H100.model_copy(update={"peak_tflops": H100.peak_tflops / 2, "memory_gib": 10.0})
    fast, slow = estimate_of(run), estimate_of(run, half)
    assert slow.time.compute == pytest.approx(2 * fast.time.compute)
    assert fast.fits(H100) and not slow.fits(half)


def test_encoders_shared_out_over_tensor_ranks_take_less_time() -> None:
    two, four = (estimate_of(run_of("1b", f"parallel.tp={tp}")) for tp in (2, 4))
    assert four.memory.activations < two.memory.activations
    narrower = H100.half_width  # what a narrower product of the Atto loses, at most
    width = run_of("1b").model.atto.width
    assert four.time.compute < two.time.compute / 2 * (width / 4 + narrower) / (width / 2 + narrower) * 2


def test_expected_counts_fill_the_sequence() -> None:
    run = run_of("demo")
    counts = expected_counts(run, Guess(symbols=4.0))
    places = counts.text.patches + sum(one.noised + one.clean + 2 * one.spans for one in counts.media.values())
    assert places < counts.positions < 1.1 * places  # and the starts
    text = next(one for one in heaviest_counts(run, Guess(symbols=4.0)) if not any(m.spans for m in one.media.values()))
    documents = run.train.micro_batch
    assert text.atto.seen == documents * document_pairs([("causal", run.data.sequence_latents)])
    assert text.text.symbols == round(4.0 * (text.positions - documents)) + documents


def test_memory_is_that_of_the_worst_source() -> None:
    run = run_of("demo")
    worst = max(worst_rank(run, counts).peak for counts in heaviest_counts(run, guess_of(run)))
    assert estimate_of(run).memory.peak == worst > worst_rank(run, expected_counts(run, guess_of(run))).peak


def test_gpus_that_no_layout_can_use_are_refused_with_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("1b")
    assert estimates(run, guess_of(run), H100, gpus=7) == []
    assert "train.global_batch must be a multiple of parallel.dp * train.micro_batch" in str(no_layout(run, gpus=7))
    assert main([str(CONFIGS / "run" / "1b.yaml"), "--gpus", "7"]) == 2
    assert "got none" in capsys.readouterr().err


def test_what_fits_nowhere_is_shown_as_too_much() -> None:
    run = run_of("1b", "model=70b")
    small = H100.model_copy(update={"memory_gib": 1.0})
    chosen = best(estimates(run, guess_of(run), small, gpus=8), small, count=2)
    assert len(chosen) == 2 and not any(one.fits(small) for one in chosen)


def test_an_unknown_device_and_a_wrong_key_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="h999.yaml, which does not exist"):
        load_device(CONFIGS / "device" / "h999.yaml")
    wrong = yaml.safe_load((CONFIGS / "device" / "h100.yaml").read_text()) | {"peak_tflops": -1}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(ConfigError, match=r"greater than 0 at peak_tflops; change peak_tflops"):
        load_device(tmp_path / "wrong.yaml")


def test_the_door_plans_thousands_of_devices_without_torch() -> None:
    code = (
        "import sys; from matformer.command import main; "
        f"code = main(['plan', {str(CONFIGS / 'run' / '8b.yaml')!r}, 'train.global_batch=8192', 'data.lanes=8192', "
        "'--gpus', '8192', '--device', 'h200']); assert not {'torch', 'megatron', 'deepspeed'} & set(sys.modules); "
        "sys.exit(code)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent, check=True)
    assert "best layouts of 8,192 x H200" in shown.stdout and "coda/audio" in shown.stdout


def test_a_name_that_is_no_door_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from matformer.command import main as command

    assert command(["plann"]) == 2
    assert "one of plan, train, sample, evaluate, report, got plann" in capsys.readouterr().err
