"""Config: composition, strict types, one sentence for each mistake, and the rules between fields."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from matformer.config.check import check
from matformer.config.load import changed_keys, load_run, save_resolved, value_of
from matformer.config.schema import RunConfig
from matformer.errors import ConfigError

Demo = Callable[..., RunConfig]


@pytest.fixture
def configs(tmp_path: Path) -> Callable[..., Path]:
    """Write files under configs/ by their stems' paths; the path of run/one.yaml comes back."""
    root = tmp_path / "configs"

    def write(**texts: str) -> Path:
        for name, text in texts.items():
            path = root / (name.replace("_", "/") + ".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        return root / "run" / "one.yaml"

    return write


MODEL = """
    atto: {width: 64, layers: 2, heads: 4, kv_heads: 2, ffn_width: 128, rotary_pairs: [2, 2, 2, 2]}
    text: {width: 32, heads: 2, ffn_width: 64, preludio_layers: 1, coda_layers: 1}
    media:
      image: {channels: 4, rank: 2, patch: 2, buckets: [[4, 4]], coda_width: 32}
"""
DATA = """
    root: somewhere
    lanes: 4
    sequence_latents: 32
    sources:
      words: {path: words, form: text, weight: 0.5}
      images: {path: images, form: pairs, modality: image, weight: 0.5}
"""
RUN = """
    name: one
    model: small
    data: small
    plan: two
    train: {steps: 10, global_batch: 4, micro_batch: 2, lr: 1e-3}
"""


@pytest.fixture
def one(configs: Callable[..., Path]) -> Path:
    return configs(model_small=MODEL, data_small=DATA, plan_two="dp: 2", run_one=RUN)


def sentence(raised: pytest.ExceptionInfo[ConfigError]) -> str:
    """The message, which must be one line."""
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_the_demo_passes_its_own_check(demo: Demo) -> None:
    check(demo())


def test_a_run_is_its_parts_with_the_plan_as_parallel(one: Path) -> None:
    config = load_run(one)
    check(config)
    assert config.model.atto.width == 64 and config.data.root == "somewhere"
    assert (config.parallel.dp, config.parallel.tp, config.parallel.ranks) == (2, 1, 2)
    assert config.train.lr == 0.001


def test_the_runs_own_section_lies_over_its_plan_and_overrides_over_both(configs: Callable[..., Path]) -> None:
    run = RUN + "    parallel: {tp: 2, threads: 3}\n"
    path = configs(model_small=MODEL, data_small=DATA, plan_two="{dp: 2, threads: 1}", run_one=run)
    parallel = load_run(path, ["parallel.tp=1"]).parallel
    assert (parallel.tp, parallel.dp, parallel.threads) == (1, 2, 3)


def test_an_override_chooses_another_file(configs: Callable[..., Path]) -> None:
    wide = MODEL.replace("width: 64", "width: 128").replace("[2, 2, 2, 2]", "[4, 4, 4, 4]")
    path = configs(model_small=MODEL, model_wide=wide, data_small=DATA, plan_two="dp: 2", run_one=RUN)
    assert load_run(path, ["model=wide"]).model.atto.width == 128


def test_a_mapping_may_start_from_a_file(configs: Callable[..., Path]) -> None:
    run = RUN.replace("model: small", "model: {from: small, atto: {layers: 6}}")
    atto = load_run(configs(model_small=MODEL, data_small=DATA, plan_two="dp: 2", run_one=run)).model.atto
    assert (atto.layers, atto.width) == (6, 64)


def test_a_run_may_start_from_another(configs: Callable[..., Path], one: Path) -> None:
    later = one.parent.parent / "ablation" / "few" / "later.yaml"
    later.parent.mkdir(parents=True)
    later.write_text("from: ../../run/one\nname: later\nmodel: {atto: {layers: 6}}\ntrain: {steps: 20}\n")
    (later.parent / "last.yaml").write_text("from: later\ntrain: {lr: 2e-3}\n")
    config = load_run(later.parent / "last.yaml", ["train.micro_batch=1"])
    assert (config.name, config.model.atto.layers, config.model.atto.width) == ("later", 6, 64)
    assert (config.train.steps, config.train.lr, config.train.micro_batch) == (20, 2e-3, 1)
    assert config.parallel.dp == 2


def test_a_part_that_names_a_file_takes_the_place_of_what_stood_below(configs: Callable[..., Path], one: Path) -> None:
    configs(model_words=MODEL.split("media:")[0] + "media: {}")
    (one.parent / "later.yaml").write_text("from: one\nmodel: {from: words, atto: {layers: 3}}\n")
    model = load_run(one.parent / "later.yaml").model
    assert (dict(model.media), model.atto.layers) == ({}, 3)
    assert load_run(one.parent / "later.yaml", ["model=small"]).model.atto.layers == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from: round", "a run must not start from itself, got from: round"),
        ("from: nowhere", "a config must be a file, got"),
        ("from: [one]", "must be the path of a run file without .yaml, got"),
    ],
)
def test_a_run_starts_from_a_file_that_is_there_and_not_from_itself(one: Path, text: str, words: str) -> None:
    (one.parent / "round.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError) as raised:
        load_run(one.parent / "round.yaml")
    assert words in sentence(raised)


def test_null_takes_an_entry_away(one: Path) -> None:
    assert list(load_run(one, ["data.sources.images=null"]).data.sources) == ["words"]


def test_scalars_are_those_of_yaml_1_2(one: Path) -> None:
    config = load_run(one, ["train.lr=1e-3", "data.sources.images.main_language=no", "data.root=2026-01-01"])
    assert config.train.lr == 0.001
    assert config.data.sources["images"].main_language == "no"
    assert config.data.root == "2026-01-01"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=5", ["train.step ", "5", "nearest is train.steps"]),
        ("steps=5", ["steps", "nearest is train.steps"]),
        ("model.media.image.chanels=5", ["model.media.image.chanels", "nearest is model.media.image.channels"]),
        ("parallell.tp=2", ["parallell", "nearest is parallel"]),
        ("train.steps=five", ["train.steps must be a valid integer", '"five"']),
        ("train.steps=-1", ["train.steps must be greater than 0", "-1"]),
        ("train.steps=1.5", ["train.steps must be a valid integer", "1.5"]),
        ("train.steps=true", ["train.steps must be a valid integer", "true"]),
        ('train.steps="5"', ["train.steps must be a valid integer", '"5"']),
        ("train.lr=.inf", ["train.lr must be a finite number", "inf"]),
        ("train.schedule=cos", ["train.schedule must be 'cosine' or 'wsd'", '"cos"']),
        ("train=5", ["train must be a mapping", "5"]),
        ("train.steps=[1", ["train.steps must be YAML"]),
        ("train.steps", ["key=value", "train.steps"]),
        ("train..steps=1", ["key=value", "train..steps"]),
        ("model=smal", ["model must be the name of a file", "smal", "nearest there is small"]),
        ("train.steps=null", ["train.steps must be given"]),
        ("trian.steps=null", ["trian"]),
    ],
)
def test_a_mistake_is_one_sentence_with_the_key_and_what_came(one: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load_run(one, [override])
    assert [word for word in words if word not in sentence(raised)] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", ["key: value"]),
        ("name: [", ["must be YAML", "line 1"]),
        ("name: one\nname: two\n", ["name stands twice"]),
        ("train: {steps: 1}\n", ["must be given"]),
    ],
)
def test_a_damaged_run_file_is_one_sentence(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "run" / "one.yaml"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_run(path)
    assert [word for word in words if word not in sentence(raised)] == []


def test_a_missing_run_file_names_the_nearest(one: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_run(one.with_name("onne.yaml"))
    assert "does not exist" in sentence(raised) and "nearest there is one" in sentence(raised)


def test_what_is_saved_is_read_back_equal(one: Path, tmp_path: Path) -> None:
    config = load_run(one, ["train.lr=1e-5", "data.sources.images=null"])
    save_resolved(config, tmp_path / "config.yaml")
    assert load_run(tmp_path / "config.yaml") == config


def test_changed_keys_are_dotted(one: Path) -> None:
    new = load_run(one, ["train.lr=0.5", "data.sources.images.weight=0.1", "parallel.tp=2"])
    assert changed_keys(load_run(one), new) == ["data.sources.images.weight", "parallel.tp", "train.lr"]
    assert changed_keys(new, new) == []


def test_a_microbatch_is_at_most_the_share_of_a_rank(one: Path) -> None:
    assert load_run(one, ["train.micro_batch=4"]).train.micro_batch == 2
    assert load_run(one, ["train.micro_batch=1"]).train.micro_batch == 1


def test_value_of_reads_a_dotted_key_and_refuses_others(demo: Demo) -> None:
    assert value_of(demo(), "data.root") == "data/demo"
    with pytest.raises(ConfigError, match="nearest is data.root"):
        value_of(demo(), "data.rot")


# The rules below name numbers: these, whatever the demo's sizes are today.
SIZES = (
    "model.atto={width: 256, layers: 8, heads: 8, kv_heads: 4, ffn_width: 704, rotary_pairs: [7, 3, 3, 3]}",
    "model.text={width: 128, heads: 4, ffn_width: 352, preludio_layers: 1, coda_layers: 3}",
    "data.lanes=8",
    "data.sequence_latents=256",
    "train.global_batch=8",
    "train.micro_batch=4",
)
BROKEN = {
    "a patch has no more places than the table": (
        ["data.patcher.max_patch_bytes=257"],
        ["256", "257", "max_patch_bytes"],
    ),
    "every channel has a variance": (
        ["model.media.image.channel_variance=[1.0,2.0]"],
        ["model.media.image.channel_variance", "2", "32"],
    ),
    "heads share the width": (["model.atto.heads=7"], ["model.atto.width", "256", "7"]),
    "kv heads share the heads": (["model.atto.kv_heads=3"], ["model.atto.kv_heads", "8", "3"]),
    "rotary pairs fill a head": (["model.atto.rotary_pairs=[8,3,3,3]"], ["17 pairs", "32"]),
    "byte width divides the atto's": (["model.text.width=96"], ["model.text.width", "256", "96"]),
    "byte heads share the byte width": (["model.text.heads=3"], ["model.text.heads", "128", "3"]),
    "byte heads are even": (["model.text.heads=128"], ["even", "128"]),
    "a symbol has no place before the first patch": (["model.text.coda_input=preludio"], ["preludio_places", "true"]),
    "the Preludio's symbols stay on their stage": (
        ["model.text.coda_input=preludio", "model.text.preludio_places=false", "parallel.pp=2"],
        ["parallel.pp", "2", "coda_input"],
    ),
    "pieces need a model": (["data.patcher.kind=bpe", "model.text.predicts_end=true"], ["data.patcher.sentencepiece"]),
    "ends of pieces are paid for": (
        ["data.patcher.kind=bpe", "data.patcher.sentencepiece=some.model"],
        ["model.text.predicts_end", "false"],
    ),
    "ends that all can see are not": (["model.text.predicts_end=true"], ["model.text.predicts_end", "static"]),
    "static patches are short": (["data.patcher.patch_bytes=17"], ["17", "16"]),
    "patches divide buckets": (["model.media.image.patch=3"], ["model.media.image.buckets", "[8, 8]", "3"]),
    "buckets have the rank": (["model.media.image.buckets=[[8]]"], ["2 axes", "[8]"]),
    "buckets are given": (["model.media.image.buckets=[]"], ["at least one shape"]),
    "buckets ascend": (["model.media.audio.buckets=[[64],[32]]"], ["ascending", "[64]"]),
    "the largest span fits": (["data.sequence_latents=130"], ["131", "130", "audio"]),
    "the time of a span has a place": (
        ["data.sequence_latents=131", "model.media.audio.time_conditioning=token"],
        ["132", "131", "its time", "audio"],
    ),
    "without clean copies less fits still": (
        ["data.sequence_latents=66", "model.media_context=noised"],
        ["67", "66", "one copy of 64 patches", "audio"],
    ),
    "a budget of latents leaves less": (
        ["data.sequence_latents=98", "model.media.audio.budget.share=0.5"],
        ["99", "98", "64 patches, the clean one of 32 latents", "audio"],
    ),
    "next latents are patches": (
        ["model.media.image.objective=next_latent", "model.media.image.budget={share: 0.5}"],
        ["model.media.image.budget must be null", "next_latent", "model.media.image.objective"],
    ),
    "next latents stand in no tree": (
        ["model.media.audio.objective=next_latent", "model.media.audio.budget={share: 0.5, noised_tree: own}"],
        ["model.media.audio.budget must be null", "next_latent"],
    ),
    "what no block fills is within the budget": (
        ["model.media.image.budget={share: 0.3, levels: 1}", "model.media.image.buckets=[[6, 10]]"],
        ["[3, 5]", "9 of 15", "0.3", "model.media.image.budget.share"],
    ),
    "the weight of SD3 is for its path": (
        ["model.media.image.objective=ddpm_v", "model.media.image.loss_weighting=cosmap"],
        ["model.media.image.loss_weighting", "ddpm_v", "cosmap"],
    ),
    "next latents tell the Atto no time": (
        ["model.media.image.objective=next_latent", "model.media.image.time_conditioning=adaln_atto"],
        ["model.media.image.time_conditioning", "adaln_atto", "next_latent"],
    ),
    "a patch by itself sees no neighbour": (
        ["model.media.image={objective: next_latent, coda: dit}"],
        ["model.media.image.coda", "dit", "next_latent"],
    ),
    "no cell of a later patch is read": (
        ["model.media.image={objective: next_latent, unet_width: 8}"],
        ["model.media.image.unet_width", "8", "next_latent"],
    ),
    "next latents have no token": (
        ["model.media.image.objective=next_latent", "model.media.image.time_conditioning=token"],
        ["model.media.image.time_conditioning", "token", "add or adaln_preludio_coda"],
    ),
    "next latents stand once": (
        [
            "data.sequence_latents=66",
            "model.media.audio.objective=next_latent",
            "model.media.image=null",
            "data.sources.images=null",
            "data.sources.albums=null",
        ],
        ["67", "66", "one copy of 64 patches", "audio"],
    ),
    "the weight of SD3 is for its path in next latents too": (
        [
            "model.media.image={objective: next_latent, next_latent: {predicts: ddpm_v}, loss_weighting: cosmap}",
        ],
        ["model.media.image.loss_weighting", "ddpm_v", "cosmap"],
    ),
    "pairs name a modality": (["data.sources.speech.modality=sound"], ["image, audio", "sound"]),
    "a caption alone names none": (
        ["data.sources.speech.shows=caption"],
        ["data.sources.speech.modality", "absent for shows caption", "audio"],
    ),
    "text is shown whole": (["data.sources.text.shows=caption"], ["data.sources.text.shows", "form text"]),
    "gradients of losses have whole weights": (
        ["parallel.dp=2", "parallel.zero_stage=3", "run.gradients_every_steps=1"],
        ["parallel.zero_stage", "1 and 3", "run.gradients_every_steps"],
    ),
    "text names none": (["data.sources.text.modality=image"], ["data.sources.text.modality", "absent"]),
    "paths stay below the root": (["data.sources.text.path=../x"], ["data.sources.text.path", "../x"]),
    "tp divides heads": (["parallel.tp=3"], ["model.atto.heads", "8", "3", "parallel.tp"]),
    "tp divides kv heads": (["parallel.tp=8"], ["model.atto.kv_heads", "4", "8"]),
    "tp and cp divide heads": (["parallel.tp=4", "parallel.cp=4"], ["model.atto.heads", "8 and 16", "parallel.cp"]),
    "cp shares key heads": (
        ["parallel.cp=4", "model.atto.heads=12", "model.atto.kv_heads=6", "model.atto.width=384"],
        ["model.atto.kv_heads", "6 / 1 and 4", "parallel.cp"],
    ),
    "tp divides the inner width": (["parallel.tp=4", "model.atto.ffn_width=702"], ["model.atto.ffn_width", "702"]),
    "pp divides layers": (["parallel.pp=3"], ["model.atto.layers", "8", "3"]),
    "sequence parallel needs tp": (["parallel.sequence_parallel=true"], ["parallel.tp"]),
    "sequence parallel divides": (
        ["parallel.tp=2", "data.sequence_latents=255"],
        ["data.sequence_latents", "255", "2"],
    ),
    "zero 2 needs one stage": (["parallel.zero_stage=2", "parallel.pp=2"], ["parallel.zero_stage", "2"]),
    "plain has one rank": (["parallel.host=plain", "parallel.dp=2"], ["parallel.host", "1 * 1 * 1 * 2"]),
    "plain is float32": (["parallel.host=plain", "parallel.dtype=bfloat16"], ["float32", "bfloat16"]),
    "lanes fill batches": (["data.lanes=12"], ["data.lanes", "12", "8"]),
    "batches fill ranks": (["parallel.dp=3"], ["train.global_batch", "8", "3 * 2 = 6"]),
    "moments decay": (["train.betas=[0.9,1.0]"], ["train.betas", "1.0"]),
    "weights name modalities": (["train.loss_weights.by_modality.video=1.0"], ["image, audio", "video"]),
    "names of modalities are free": (
        ["model.media.router={channels: 1, rank: 1, patch: 1, buckets: [[1]], coda_width: 1}"],
        ["router"],
    ),
}


@pytest.mark.parametrize("claim", BROKEN)
def test_a_broken_rule_is_one_sentence_with_its_numbers_and_keys(demo: Demo, claim: str) -> None:
    overrides, words = BROKEN[claim]
    check(demo(*SIZES))
    with pytest.raises(ConfigError) as raised:
        check(demo(*SIZES, *overrides))
    assert [word for word in words if word not in sentence(raised)] == []
    assert "change " in sentence(raised) or "rename " in sentence(raised)


def test_a_run_without_sources_is_refused(demo: Demo) -> None:
    none = [f"data.sources.{name}=null" for name in demo().data.sources]
    with pytest.raises(ConfigError, match="at least one source"):
        check(demo(*none))


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tp=2"],
        ["parallel.pp=2"],
        ["parallel.dp=2"],
        ["parallel.tp=2", "parallel.pp=2"],
        ["parallel.dp=2", "parallel.zero_stage=3"],
        ["parallel.tp=2", "parallel.sequence_parallel=true"],
        ["parallel.host=plain"],
    ],
)
def test_every_layout_of_the_bars_passes(demo: Demo, overrides: list[str]) -> None:
    check(demo("train.steps=6", *overrides))


def test_keys_of_next_latent_without_it_are_warned_of(demo: Demo, caplog: pytest.LogCaptureFixture) -> None:
    check(demo("model.media.image={objective: next_latent, next_latent: {noises: 2}}"))
    assert not caplog.messages
    check(demo("model.media.image.next_latent.noises=2"))
    (message,) = caplog.messages
    assert "model.media.image.next_latent" in message and "flow" in message


def test_a_run_shorter_than_its_warm_up_is_warned_of(demo: Demo, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check(demo("train.steps=6", "train.warmup_steps=50"))
    assert "train.warmup_steps is 50, more than train.steps 6" in caplog.text
