"""The report: one file, no network, every input shown, and a missing one said instead of a crash."""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from matformer.report import main, write_report

CONFIG = """name: made-up
seed: 3
model: {media: {image: {channels: 4}, audio: {channels: 4}}}
data: {root: ROOT}
parallel: {tp: 1, pp: 1, dp: 2, dtype: bfloat16}
train: {steps: 1200}
"""


def write_metrics(folder: Path, *, steps: int) -> None:
    draws = np.random.default_rng(0)
    rows = []
    for step in range(1, steps + 1):
        text = 2.1 + 5.9 * math.exp(-step / 90) + 0.12 * draws.normal()
        rows.append({
            "step": step,
            "loss": text + 1.6,
            "text/bits_per_byte": text,
            "image/flow_loss": 0.66 + 1.2 * math.exp(-step / 60) + 0.04 * draws.normal(),
            "audio/flow_loss": 1.05 + 0.9 * math.exp(-step / 80) + 0.05 * draws.normal(),
            "router/accuracy": 1 - 0.5 * math.exp(-step / 40),
            "router/span_end_accuracy": 0.95 - 0.6 * math.exp(-step / 60),
            "grad_norm": None if step == 40 else 0.4 + 8 * math.exp(-step / 30) + 0.1 * abs(draws.normal()),
            "lr": 2e-3 * min(1, step / 50, (steps - step + 1) / (0.2 * steps)),
            "bytes_per_second": 11_000 + 900 * draws.normal(),
            "latents_per_second": 2_900 + 150 * draws.normal(),
            "seconds": step * 0.7,
            "bytes_seen": step * 7_700.0,
            "latents_seen": step * 2_048.0,
        })  # fmt: skip
        if step % (steps // 6) == 0:
            rows.append({
                "step": step,
                "heldout/text/bits_per_byte": text + 0.1,
                "heldout/text/bits_per_byte_stderr": 0.05,
                "heldout_ema/text/bits_per_byte": text + 0.06 + 2 * math.exp(-step / 200),
                "heldout_ema/text/bits_per_byte_stderr": 0.05,
                "heldout/image/flow_loss": 0.69 + math.exp(-9 * step / steps),
                "heldout/image/flow_loss_stderr": 0.01,
                "heldout/audio/flow_loss": 1.2 + math.exp(-9 * step / steps),
                "heldout/audio/flow_loss_stderr": 0.3,
                "heldout/router/span_end_accuracy": 0.5,
                "heldout/router/span_end_accuracy_stderr": 0.02,
                "heldout/router/majority": 0.62,
                "heldout/captions/image_gain": 0.3,
                "heldout/captions/image_gain_stderr": 0.04,
            })  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_samples(folder: Path, *, count: int) -> None:
    samples = folder / "samples"
    samples.mkdir()
    y, x = np.mgrid[0:64, 0:64]
    images, audio, caption = [], [], []
    for i in range(count):
        entry = {"caption": f"disque orange n° {i} – un soleil au-dessus de la mer"}
        for j, kind in enumerate(("real", "reconstructed", "generated")):
            inside = (x - 32) ** 2 + (y - 30 - j) ** 2 < (12 + 2 * i) ** 2
            colour = np.where(inside[..., None], [240, 150 - 9 * i, 60 + 20 * j], [250, 250, 250])
            Image.fromarray(colour.astype(np.uint8)).save(samples / f"i{i}{kind}.png")
            entry[kind] = f"i{i}{kind}.png"
        images.append(entry)
        caption.append({"image": f"i{i}real.png", "truth": "sun with <b>rays</b>", "generated": "orange circle"})
    t = np.arange(8000) / 8000
    for i, words in enumerate(("thank you for calling", "press three")):
        soundfile.write(samples / f"a{i}.wav", np.sin(900 * t * (1 + i)) * np.exp(-3 * t) * 0.5, 8000)
        audio.append({"transcript": words, "real": f"a{i}.wav", "reconstructed": f"a{i}.wav", "generated": None})
    prompt, rest = "The sea was calm, and ", "the boat went on\nalong the <shore> of the island, where no wind"
    cut = [whole[i : i + 4] for whole in (prompt, rest) for i in range(0, len(whole), 4)]
    broken = {"bytes": base64.b64encode(b"\xe2\x82").decode()}
    text = [
        {"label": "a story", "prompt": prompt, "patches": [*cut, broken], "prompt_patches": 6},
        {
            "label": "python",
            "prompt": "def f",
            "patches": ["def ", "f(x)", ":\n  ", "retu", "rn x"],
            "prompt_patches": 2,
        },
    ]
    index = {"text": text, "image": images, "audio": audio, "caption": caption}
    (samples / "samples.json").write_text(json.dumps(index))


def write_run(root: Path, *, steps: int = 60, count: int = 2) -> Path:
    folder = root / "made-up"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.replace("ROOT", str(root)))
    write_metrics(folder, steps=steps)
    write_samples(folder, count=count)
    write = {
        "machine.json": {"cpu": "Some Processor, 2 cores", "memory_gb": 16, "torch": "2.13.0"},
        "baselines.json": {
            "text/order0": 4.99, "text/order2": 3.4, "text/order2_stderr": 0.09, "text/xz": 2.98,
            "image/gaussian": 0.78, "image/gaussian_stderr": 0.03, "audio/gaussian_channel": 1.35,
        },
        "statistics.json": {
            "parameters": 7_012_345,
            "text": {"bytes_per_patch": 4.0, "patches": 120_000},
            "sequences": {"fill": 0.993, "kinds": {"text": 0.5, "noised": 0.2, "clean": 0.1}},
        },
    }  # fmt: skip
    for name, tree in write.items():
        (folder / name).write_text(json.dumps(tree))
    source = {"name": "Some drawings", "licence": "CC-BY-4.0", "attribution": "Their authors"}
    (root / "demo.json").write_text(json.dumps({"sources": [source, {**source, "name": "More of them"}]}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return read(write_run(tmp_path_factory.mktemp("runs")))


def read(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_the_page_asks_no_network(html: str) -> None:
    addresses = re.findall(r"""(?:src|href|url\()=?["'(]?([^"')>\s]+)""", html)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)


def test_every_input_is_on_the_page(html: str) -> None:
    assert html.count("data:image/png;base64") == 2 * 3 + 2
    assert html.count("<audio") == 4
    assert html.count('class="curve"') == 7
    for shown in ("7.0 M", "disque orange n° 1", "thank you for calling", "Some Processor", "0.993", "name: made-up"):
        assert shown in html
    assert "Some drawings, More of them" in html
    assert "here:" not in html


def test_marks_are_those_of_the_standard_errors(html: str) -> None:
    for mark in (
        "✗ behind order 2",
        "✓ beats Gaussian<",
        "≈ level with Gaussian by channel",
        "✗ behind always",
        "✓ beats zero",
    ):
        assert mark in html


def test_what_the_model_wrote_cannot_become_markup(html: str) -> None:
    assert "<shore>" not in html and "<b>rays" not in html
    assert re.sub(r"<[^>]+>", "", html).count("&lt;sho") == 1


def test_patches_stand_apart_and_the_continuation_is_marked_once(html: str) -> None:
    samples = re.findall(r'<p class="sample">(.*?)</p>', html, flags=re.S)
    assert [sample.count("<i") for sample in samples] == [23, 5]
    assert [sample.count("▸") for sample in samples] == [1, 1]
    assert samples[0].count("class=new") == 17
    assert "<u>e2 82</u>" in samples[0]


def test_curves_take_the_pages_colours_and_keep_their_ids_apart(html: str) -> None:
    curves = re.findall(r'<svg viewBox[^>]*class="curve".*?</svg>', html, flags=re.S)
    assert not any("#0101" in curve for curve in curves)
    ids = [name for curve in curves for name in re.findall(r' id="([^"]+)"', curve)]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "machine.json", "baselines.json", "samples/samples.json", "statistics.json", "config.yaml"],
)
def test_a_missing_input_leaves_the_rest(run: Path, name: str) -> None:
    (run / name).unlink()
    page = read(run)
    assert "<h1>made-up</h1>" in page and "</footer>" in page
    assert "here:" in page or name in ("baselines.json", "metrics.jsonl")


def test_damaged_inputs_count_as_missing(run: Path, caplog) -> None:
    for name in ("machine.json", "baselines.json", "statistics.json"):
        (run / name).write_text('{"torn": ')
    assert "machine.json is missing" in read(run)
    assert len(caplog.records) == 3


def test_a_run_that_just_began_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.5}\n')
    assert read(tmp_path).count("No ") >= 6


def test_the_door_says_what_a_run_folder_is(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "must hold config.yaml or metrics.jsonl" in capsys.readouterr().err


def test_the_last_evaluation_counts(run: Path) -> None:
    (run / "evaluation.json").write_text(json.dumps({"step": 60, "heldout/captions/audio_gain": 0.0123}))
    page = read(run)
    assert "Captions used: audio" in page and "0.012" in page


def test_drawn_pictures_stand_beside_those_of_other_captions_and_real_ones(run: Path) -> None:
    key = "heldout_ema/samples/image_top1"
    numbers = {"": 0.16, "_stderr": 0.03, "_shuffled": 0.14, "_gain": 0.02, "_gain_stderr": 0.004, "_real": 0.37}
    (run / "evaluation.json").write_text(json.dumps({"step": 60, **{f"{key}{end}": n for end, n in numbers.items()}}))
    page = read(run)
    assert "✓ beats captions of other concepts" in page, "by the error of the difference, not of each"
    assert "0.370 <span class=error>real ones" in page


def test_a_column_that_no_sample_fills_is_left_out(run: Path) -> None:
    index = run / "samples" / "samples.json"
    samples = json.loads(index.read_text())
    samples["image"] = [{**one, "real": None} for one in samples["image"]]
    index.write_text(json.dumps(samples))
    page = read(run)
    assert page.count("<span>reconstructed</span>") == 2 + 2
    assert page.count("<span>real</span>") == 2
