"""The sampling door: `python -m matformer.sample RUN --text "..." --want image --out DIR`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from matformer.config.schema import RunConfig
from matformer.data.patching import build_patcher
from matformer.data.sources import TextSpan, text_span
from matformer.door import door
from matformer.engine.continuation import AUTO, continue_rows
from matformer.engine.denoiser import check_solver
from matformer.engine.draws import GUIDANCE, Draws, Row, Solver, Span, guidance_for
from matformer.engine.media import MediaCodec, load_codec
from matformer.engine.motion import animated
from matformer.engine.restore import load_for_inference, run_config
from matformer.engine.video_file import write_mp4
from matformer.errors import ConfigError, DataError
from matformer.observe.drawing import drawing_bar
from matformer.parallel.process import settle

log = logging.getLogger(__name__)


@door
def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 with one sentence on stderr."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    asked = _parser().parse_args(arguments)
    _check(asked)
    settle()
    _sample(asked)
    return 0


def _sample(asked: argparse.Namespace) -> None:
    draws = _draws(asked, run_config(asked.run))
    config, host, model = load_for_inference(asked.run, ema=asked.ema)
    began = time.perf_counter()
    codecs: dict[str, MediaCodec] = {}
    opening = _opening(asked, config, codecs=codecs)
    rows = [Row(number, *opening) for number in range(asked.num)]
    given = len(opening[0])
    spans = asked.max_spans if asked.want == AUTO else asked.spans
    with drawing_bar() as watch:
        continue_rows(model, rows, want=asked.want, config=config, draws=draws, max_spans=spans, watch=watch)
    _make_folder(asked.out)
    samples = [_written(row, given=given, out=asked.out, config=config, codecs=codecs) for row in rows]
    record = {
        "run": str(asked.run),
        "step": host.steps,
        "weights": "ema" if asked.ema else "last",
        "text": asked.text,
        "image": _name(asked.image),
        "audio": _name(asked.audio),
        "media": [[name, str(path)] for name, path in asked.media],
        "want": asked.want,
        **asdict(draws),
        "samples": samples,
    }
    (asked.out / "samples.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _show(record, seconds=time.perf_counter() - began, out=asked.out)


def _draws(asked: argparse.Namespace, config: RunConfig) -> Draws:
    """How the run is to draw what is wanted. Raises ConfigError where it cannot, before anything is loaded."""
    wanted, media = (*config.model.modalities, AUTO), config.model.media
    if asked.want not in wanted:
        raise ConfigError(f"--want must be one of {', '.join(wanted)}, got {asked.want!r}; choose one of them")
    for name in media if asked.want == AUTO else media.keys() & {asked.want}:
        check_solver(asked.solver, steps=asked.steps, objective=media[name].prediction)
    names = ("seed", "temperature", "top_p", "max_bytes", "steps", "solver")
    return Draws(guidance=guidance_for(config, asked.guidance), **{name: getattr(asked, name) for name in names})


def _opening(
    asked: argparse.Namespace, config: RunConfig, *, codecs: dict[str, MediaCodec]
) -> tuple[tuple[Span, ...], bytes]:
    """What stands before the first new span: whole spans, and a prompt where text is to go on."""
    files = [(f"--{name}", name, path) for name in ("image", "audio") if (path := getattr(asked, name)) is not None]
    files += [("--media", name, path) for name, path in asked.media]
    text = asked.text.encode("utf-8", "surrogateescape")
    if asked.want == "text" and not files:
        return (), text
    spans: list[Span] = [text_span(text, build_patcher(config.data.patcher))] if text else []
    for option, name, path in files:
        if name not in config.model.media:
            known = ", ".join(config.model.modalities)
            raise ConfigError(f"{option} must give a modality of the run, which has {known}, got {name}; leave it out")
        if not path.is_file():
            raise DataError(f"{option} must name a file, got {path}; correct the path")
        spans.append(_codec(name, config, codecs=codecs).read(path))
    return tuple(spans), b""


def _codec(name: str, config: RunConfig, *, codecs: dict[str, MediaCodec]) -> MediaCodec:
    if name not in codecs:
        codecs[name] = load_codec(config, name)
    return codecs[name]


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out must be a folder that can be written, got {out} ({error}); choose another") from error


def _written(
    row: Row, *, given: int, out: Path, config: RunConfig, codecs: dict[str, MediaCodec]
) -> list[dict[str, Any]]:
    """Files of a row's new spans, and what samples.json says of each."""
    written: list[dict[str, Any]] = []
    for place, span in enumerate(row.spans[given:]):
        name = f"sample-{row.number:03d}-{place}"
        if isinstance(span, TextSpan):
            (out / f"{name}.txt").write_bytes(span.data)
            text = span.data.decode("utf-8", "replace")
            written.append({"modality": "text", "file": f"{name}.txt", "text": text, "ended": span.ended})
            continue
        codec = _codec(span.modality, config, codecs=codecs)
        codec.write(out / f"{name}{codec.suffix}", codec.decode(span.latent))
        bucket = list(span.latent.shape[1:])
        written.append({"modality": span.modality, "file": f"{name}{codec.suffix}", "bucket": bucket})
    moved = animated(row.spans, lambda modality: _codec(modality, config, codecs=codecs)) if written else None
    if moved is not None:
        frames, fps = moved
        name = f"sample-{row.number:03d}-animated.mp4"
        write_mp4(out / name, frames, fps=fps)
        written.append({"modality": "animation", "file": name, "frames": len(frames)})
    return written


def _show(record: dict[str, Any], *, seconds: float, out: Path) -> None:
    title = f"{record['run']}, step {record['step']:,}: {record['want']} with seed {record['seed']} in {seconds:.1f} s"
    table = Table("file", "modality", "what", title=title, title_justify="left", box=None)
    for spans in record["samples"]:
        for span in spans:
            table.add_row(str(out / span["file"]), span["modality"], _what(span))
    console = Console(markup=False)
    console.print(table)
    if not any(record["samples"]):
        console.print("The router ended every document at once: nothing was written but samples.json.")


def _what(span: dict[str, Any]) -> str:
    if "text" in span:
        return repr(span["text"])
    if "frames" in span:
        return f"the picture, moved: {span['frames']} frames"
    return " x ".join(map(str, span["bucket"])) + " latent cells"


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _named_file(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"must be MODALITY=FILE, got {text!r}")
    return name, Path(path)


def _check(asked: argparse.Namespace) -> None:
    rules = (
        ("steps", asked.steps >= 1, "at least 1"),
        ("num", asked.num >= 1, "at least 1"),
        ("max-bytes", asked.max_bytes >= 1, "at least 1"),
        ("max-spans", asked.max_spans >= 1, "at least 1"),
        ("spans", asked.spans >= 1, "at least 1"),
        ("temperature", asked.temperature >= 0, "at least 0"),
        ("guidance", asked.guidance is None or asked.guidance >= 0, "at least 0"),
        ("top-p", 0 < asked.top_p <= 1, "above 0 and at most 1"),
    )
    for name, holds, rule in rules:
        if not holds:
            raise ConfigError(f"--{name} must be {rule}, got {getattr(asked, name.replace('-', '_'))}; change --{name}")


def _parser() -> argparse.ArgumentParser:
    standard = Draws()
    parser = argparse.ArgumentParser(prog="python -m matformer.sample", description="Sample from a trained run.")
    parser.add_argument("run", type=Path, help="run folder, such as runs/demo")
    parser.add_argument("--text", default="", help="a caption where media are wanted, a prompt where text is")
    parser.add_argument("--image", type=Path, help="a picture that stands after the text")
    parser.add_argument("--audio", type=Path, help="a sound that stands after the text and the picture")
    parser.add_argument(
        "--media", type=_named_file, action="append", default=[], metavar="MODALITY=FILE",
        help="a file of any modality that stands after these, such as video=clip.mp4; may be given several times",
    )  # fmt: skip
    parser.add_argument("--want", default=AUTO, help="a modality, or auto: the router decides (default)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files and samples.json")
    parser.add_argument("--num", type=int, default=1, help="samples, drawn side by side")
    parser.add_argument("--seed", type=int, default=standard.seed)
    parser.add_argument("--temperature", type=float, default=standard.temperature, help="0 takes the likeliest")
    parser.add_argument("--top-p", type=float, default=standard.top_p, help="probability mass that may be drawn")
    parser.add_argument("--max-bytes", type=int, default=standard.max_bytes, help="new bytes of a text span")
    parser.add_argument("--max-spans", type=int, default=8, help="new spans under auto")
    parser.add_argument("--spans", type=int, default=1, help="new media spans of --want: of motion one is a frame")
    parser.add_argument("--steps", type=int, default=standard.steps, help="of denoising")
    parser.add_argument("--guidance", type=float, help=f"1 is none ({GUIDANCE:g}, without data.blind_probability 1)")
    parser.add_argument("--solver", choices=get_args(Solver), default=standard.solver)
    parser.add_argument("--no-ema", dest="ema", action="store_false", help="the last weights, not their average")
    return parser


if __name__ == "__main__":
    sys.exit(main())
