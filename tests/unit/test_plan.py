"""The plan of a cluster: what it says of layouts, and the files that it chose."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from matformer.command import main as command
from matformer.config.check import check
from matformer.config.device import DeviceConfig, load_device
from matformer.config.load import load_run
from matformer.config.schema import RunConfig
from matformer.errors import ConfigError
from matformer.parallel.counts import Counts, Pairs, document_pairs
from matformer.parallel.expected import Guess, expected_counts, guess_of, heaviest_counts
from matformer.parallel.flops import part_flops
from matformer.parallel.layouts import RECOMPUTES, Estimate, estimate, estimates, load_of, no_layout
from matformer.parallel.memory import rank_memory, stages, worst_rank
from matformer.parallel.parameters import parameters_by_part
from matformer.parallel.parts import atto_layer
from matformer.parallel.tables import best, detail_rows, plan_file
from matformer.plan import main
from tools.calibrate import layer_config, layer_work
from tools.model_family import FAMILY, yaml_of

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = load_device(CONFIGS / "device" / "h100.yaml")


def run_of(name: str, *overrides: str) -> RunConfig:
    return load_run(CONFIGS / "run" / f"{name}.yaml", overrides)


def estimate_of(run: RunConfig, device: DeviceConfig = H100) -> Estimate:
    check(run)
    return estimate(run, load_of(run, guess_of(run)), device)


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
        (("parallel.dp=4", "parallel.cp=2"), "activations"),
        (("parallel.zero_stage=3",), "masters"),
        (("train.optimizer=sgd",), "moments"),
    ):
        other = estimate_of(run_of("1b", "parallel.dp=8", *overrides)).memory
        assert getattr(other, key) <= getattr(whole, key)
    assert estimate_of(run_of("1b", "parallel.dp=8", "parallel.zero_stage=3")).memory.weights == whole.weights / 8


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.pp=8",),
        ("parallel.pp=8", "train.global_batch=4"),  # rank 4 holds gradients that rank 1 has not yet
        ("parallel.pp=8", "train.global_batch=4", "parallel.dtype=float32"),
        ("parallel.pp=4", "parallel.virtual_stages=3", "train.global_batch=8"),
        ("parallel.pp=4", "parallel.stage_layers=[2,2,12,8]"),
    ],
)
def test_the_worst_rank_is_the_worst_of_all(overrides: tuple[str, ...]) -> None:
    run = run_of("1b", *overrides)
    check(run)
    for counts in heaviest_counts(run, guess_of(run)):
        every = [rank_memory(run, counts, stage).peak for stage in stages(run)]
        assert worst_rank(run, counts).peak == max(every)


def test_layers_of_uneven_stages_are_those_of_the_config() -> None:
    run = run_of("1b", "parallel.pp=2", "parallel.stage_layers=[10,14]")
    assert [stage.layers for stage in stages(run)] == [10, 14]
    run = run_of("1b", "parallel.pp=2", "parallel.virtual_stages=2", "parallel.stage_layers=[4,7,6,7]")
    assert [stage.layers for stage in stages(run)] == [10, 14]


def test_stages_in_turn_shorten_the_bubble_and_send_more() -> None:
    keys = ("parallel.pp=4", "train.global_batch=16")
    once, thrice = (estimate_of(run_of("1b", *keys, f"parallel.virtual_stages={virtual}")) for virtual in (1, 3))
    assert thrice.bubble == 3 / (3 * 16 + 3)
    assert thrice.time.bubble == pytest.approx(once.time.bubble / 3) and thrice.time.compute == once.time.compute
    assert thrice.time.pipeline == 3 * once.time.pipeline and thrice.traffic.pipeline == 3 * once.traffic.pipeline
    assert thrice.memory.activations > once.memory.activations and thrice.memory.weights == once.memory.weights


def test_context_ranks_exchange_heads_and_share_everything_else() -> None:
    """Of the 1 B model: 24 layers, 8,192 positions, 16 heads of 128 over 8 of keys and values; bfloat16."""
    keys = ("train.global_batch=16", "parallel.dp=2")
    alone, both = (estimate_of(run_of("1b", *keys, f"parallel.cp={cp}", "parallel.pp=4")) for cp in (1, 2))
    assert alone.traffic.context == alone.time.context == 0.0
    assert both.traffic.context == 8 * 6 * 2 * (8192 / 2) * (2 * 2048 + 2 * 1024) * 2 / 2
    assert both.traffic.pipeline == alone.traffic.pipeline / 2
    assert both.time.compute == alone.time.compute / 2
    assert both.time.share * both.time.total == pytest.approx(alone.time.share * alone.time.total / 2)
    assert both.memory.moments == alone.memory.moments / 2 and both.memory.weights == alone.memory.weights
    # 16 ranks have one head each, and a copy of every second's keys and values
    all_heads = estimate_of(run_of("1b", "train.global_batch=16", "parallel.cp=16"))
    assert all_heads.traffic.context == pytest.approx(16 * 24 * 2 * (8192 / 16) * 4 * 2048 * 2 * 15 / 16)
    again = estimate_of(run_of("1b", *keys, "parallel.cp=2", "parallel.pp=4", "parallel.recompute=selective"))
    assert again.traffic.context == both.traffic.context * 3 / 2


def test_gradients_are_reduced_over_context_and_data_ranks() -> None:
    one, other = (estimate_of(run_of("1b", *keys)) for keys in (("parallel.dp=8",), ("parallel.dp=2", "parallel.cp=4")))
    assert one.traffic.data == other.traffic.data and one.memory.state == other.memory.state


def test_the_search_tries_context_parallelism_where_it_can_help() -> None:
    run = run_of("8b", "data.sequence_latents=131072", "train.global_batch=32")
    found = estimates(run, guess_of(run), H100, gpus=64)
    context = [one for one in found if one.config.parallel.cp > 1]
    assert best(found, H100, count=1)[0] in context
    assert {one.config.train.micro_batch for one in context} == {1}
    by_plan: dict[str, dict[int, list[Estimate]]] = {}
    for one in found:
        check(one.config)
        parallel = one.config.parallel
        kept = parallel.model_copy(update={"cp": 1, "dp": parallel.reduce_ranks, "recompute": "none"})
        by_plan.setdefault(kept.model_dump_json(), {}).setdefault(parallel.cp, []).append(one)
    for by_degree in by_plan.values():
        fastest = math.inf
        for cp, alike in sorted(by_degree.items()):
            assert fastest == math.inf or alike[0].config.parallel.share_ranks <= H100.devices_a_node, cp
            fastest = min([fastest, *(one.time.total for one in alike if one.fits(H100))])


def test_what_is_computed_again_costs_time_and_is_no_work_of_the_model() -> None:
    """Of the 1 B model: 24 layers, 8,192 positions, width 2,048, 5,632 in the feed-forward; 16 sequences."""
    keys = ("parallel.tp=2", "parallel.sequence_parallel=true", "train.global_batch=16")
    none, selective, full = (estimate_of(run_of("1b", *keys, f"parallel.recompute={one}")) for one in RECOMPUTES)
    assert none.time.again == 0.0
    run = run_of("1b", *keys)
    pairs = expected_counts(run, guess_of(run)).atto.seen
    inner = 4 * pairs * 2048 + 2 * 8192 * 3 * 2048 * 5632
    outer = 2 * 8192 * 2048 * (2 * 2048 + 2 * 1024)
    rate = 989e12 * 0.62 * 1024 / (1024 + 256)
    assert selective.time.again == pytest.approx(16 * 24 * inner / 2 / rate)
    assert full.time.again == pytest.approx(16 * 24 * (inner + outer) / 2 / rate)
    works = [one.time.share * one.time.total for one in (none, selective, full)]
    assert works == pytest.approx([works[0]] * 3)
    assert [one.traffic.tensor for one in (selective, full)] == pytest.approx(
        [none.traffic.tensor * 12 / 10, none.traffic.tensor * 14 / 10]
    )


def test_each_recompute_is_slower_and_smaller_than_the_one_before_it() -> None:
    """So the search may take the first that fits."""
    for keys in (("parallel.dp=8",), ("parallel.pp=4", "parallel.virtual_stages=2"), ("parallel.tp=4",)):
        found = [estimate_of(run_of("1b", *keys, f"parallel.recompute={one}")) for one in RECOMPUTES]
        for less, more in pairwise(found):
            assert less.time.total < more.time.total and less.memory.peak > more.memory.peak


def test_full_recompute_keeps_one_stream_a_layer() -> None:
    shallow, deep = (
        estimate_of(run_of("1b", "parallel.recompute=full", f"model.atto.layers={layers}")).memory.activations
        for layers in (23, 24)
    )
    assert deep - shallow == pytest.approx(8192 * 2048 * 2)


def on_host(one: Estimate) -> str:
    """What the plan says of the host's memory."""
    return next(row[1] for row in detail_rows(one, H100) if row[0] == "in the host's memory")


def test_an_offloaded_optimizer_stands_in_the_hosts_memory() -> None:
    """Of 8 ranks: a master, two moments and their gradient in float32; ZeRO 2: two bfloat16 copies, ZeRO 3: a sum."""
    number = sum(parameters_by_part(run_of("1b").model).values())
    for stage, each in ((2, 16 + 4), (3, 16 + 4)):
        keys = ("parallel.dp=8", f"parallel.zero_stage={stage}")
        here, there = (
            estimate_of(run_of("1b", *keys)),
            estimate_of(run_of("1b", *keys, "parallel.offload_optimizer=true")),
        )
        assert here.memory.host == 0.0 and there.memory.host == pytest.approx(each * number / 8)
        assert there.memory.masters == there.memory.moments == 0.0
        assert here.memory.state - there.memory.state >= 12 * number / 8
        assert here.time.update - there.time.update == pytest.approx(28 * number / 8 / 2.8e12)
        assert "the optimizer" in on_host(there)
        assert "the optimizer" not in on_host(here)


def test_what_a_rank_writes_of_a_checkpoint_stands_in_the_hosts_memory() -> None:
    """Weights, two moments and the average in float32, of the whole stage, in at most eight ranks."""
    number = sum(parameters_by_part(run_of("1b").model).values())
    for keys, ranks in ((["parallel.dp=4"], 4), (["parallel.tp=2", "parallel.dp=16"], 8)):
        one = estimate_of(run_of("1b", *keys))
        assert one.memory.saving == pytest.approx(16 * number / ranks)
        assert f"as {ranks} a stage do" in on_host(one)


def test_the_search_interleaves_and_computes_again_only_what_does_not_fit() -> None:
    run = run_of("8b")
    small = H100.model_copy(update={"memory_gib": 40.0})
    found = estimates(run, guess_of(run), small, gpus=64)
    assert {one.config.parallel.virtual_stages for one in found} > {1, 2, 11}
    by_layout: dict[str, list[Estimate]] = {}
    for one in found:
        key = one.config.model_copy(update={"parallel": one.config.parallel.model_copy(update={"recompute": "none"})})
        by_layout.setdefault(key.model_dump_json(), []).append(one)
        check(one.config)
    for same in by_layout.values():
        assert {one.config.parallel.recompute for one in same} == set(RECOMPUTES[: len(same)])
        assert sum(one.fits(small) for one in same) <= 1 and (len(same) == 3 or same[-1].fits(small))
    assert {len(same) for same in by_layout.values()} == {1, 2, 3}


def test_of_steps_as_good_as_equal_the_best_needs_least_memory() -> None:
    run = run_of("1b")
    found = estimates(run, guess_of(run), H100, gpus=64)
    for one in best(found, H100, count=100):
        degrees = {key: getattr(one.config.parallel, key) for key in ("tp", "cp", "pp", "zero_stage")}
        alike = [
            other
            for other in found
            if other.fits(H100) and {key: getattr(other.config.parallel, key) for key in degrees} == degrees
        ]
        fastest = min(other.time.total for other in alike)
        assert one.time.total <= 1.01 * fastest
        assert not any(o.memory.peak < one.memory.peak and o.time.total <= 1.01 * fastest for o in alike)


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


def test_float32_is_timed_at_its_own_peak_where_the_device_says_one() -> None:
    half, full = (run_of("1b", "parallel.dp=8", f"parallel.dtype={dtype}") for dtype in ("bfloat16", "float32"))
    assert estimate_of(full).time.compute == pytest.approx(989 / 67 * estimate_of(half).time.compute)
    works = [(one := estimate_of(run).time).share * one.total * peak for run, peak in ((half, 989), (full, 67))]
    assert works[0] == pytest.approx(works[1])
    again = [
        run.model_copy(update={"parallel": run.parallel.model_copy(update={"recompute": "full"})})
        for run in (half, full)
    ]
    assert estimate_of(again[1]).time.again == pytest.approx(989 / 67 * estimate_of(again[0]).time.again)
    cpu = load_device(CONFIGS / "device" / "cpu.yaml")
    assert estimate_of(full, cpu).time.compute == estimate_of(half, cpu).time.compute


def test_a_layer_is_calibrated_by_the_work_that_plans_count() -> None:
    model = run_of("demo").model.model_copy(update={"atto": layer_config(192)})
    counts = Counts(positions=512, atto=Pairs(seen=document_pairs([("causal", 512)])))
    assert layer_work(192, 512) == part_flops(list(atto_layer(model, counts))).total


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


def test_a_coda_that_attends_sees_its_window() -> None:
    run = run_of("1b", "model.media.image.coda=dit", "model.media.image.coda_window=8")
    found = expected_counts(run, Guess(symbols=4.0)).media["image"]
    assert found.pairs.seen == found.noised * 15 > 0 and found.leaves == ()


def test_a_budget_leaves_the_sequence_fewer_latents_of_a_span() -> None:
    given = "data.sources.images.generate_probability=0"
    budget = "model.media.image.budget={share: 0.5, levels: 2}"
    for keys, latents in (((), (256, 576, 1024)), ((budget,), (127, 288, 511))):  # a split adds three
        run = run_of("1b", given, *keys)
        check(run)
        found = expected_counts(run, Guess(symbols=4.0), source="images").media["image"]
        assert found.spans == round(8192 / (round(sum(latents) / 3) + 3 + 64 / 4))
        assert found.clean == pytest.approx(found.spans * (256 + 576 + 1024) / 3, rel=0.05) and found.noised == 0


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus", "0"], "--gpus: must be a whole number of at least 1, got 0"),
        (["--gpus", "-8"], "--gpus: must be a whole number of at least 1, got -8"),
        (["--gpus", "2", "--best", "0"], "--best: must be a whole number of at least 1, got 0"),
        (["--gpus", "2", "--patch-bytes", "-2"], "--patch-bytes: must be a number of more than 0, got -2"),
        (["--gpus", "2", "--check"], "--check: not allowed with argument --gpus"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(CONFIGS / "run" / "demo.yaml"), *options])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--write", "--best", "--patch-bytes", "--device"])
def test_options_of_the_search_need_a_number_of_devices(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(CONFIGS / "run" / "demo.yaml"), option, "3"]) == 2
    assert capsys.readouterr().err.startswith(f"{option} must stand beside --gpus N")


def test_a_plan_is_written_into_a_new_folder_and_a_folder_is_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, options = tmp_path / "new" / "two.yaml", ["--gpus", "2", "--device", "cpu", "--write"]
    assert main([str(CONFIGS / "run" / "demo.yaml"), *options, str(file)]) == 0
    assert yaml.safe_load(file.read_text()) == {"dp": 2}
    assert main([str(CONFIGS / "run" / "demo.yaml"), *options, str(file.parent)]) == 2
    assert "--write must be a file that can be written" in capsys.readouterr().err


def test_a_layout_that_does_not_fit_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "70b.yaml"
    assert main([str(CONFIGS / "run" / "1b.yaml"), "model=70b", "--gpus", "8", "--write", str(file)]) == 2
    assert re.search(r"must fit into the 70.0 GiB that can be used of one H100 SXM, got \d+", capsys.readouterr().err)
    assert not file.exists()


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


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_the_command_says_its_doors(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([option]) == 0
    assert capsys.readouterr().out.startswith("usage: matformer {plan,train,sample,evaluate,report}")


def test_a_name_that_is_no_door_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["plann"]) == 2
    assert "one of plan, train, sample, evaluate, report, got plann" in capsys.readouterr().err
