"""The door that checks a config before anything starts: `python -m matformer.plan CONFIG [key=value ...]`.

With `--gpus N` it also says what each part costs, what a rank holds and how long a step takes, and which layouts of N
devices are best: docs/plan.md. Imports neither torch nor a host, so that scripts may ask it at every start.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matformer.config.check import check
from matformer.config.load import load_run, value_of
from matformer.config.schema import RunConfig
from matformer.door import amount, door, positive
from matformer.errors import ConfigError
from matformer.files import write_whole

SPLITS = ("train", "heldout")
DEVICE, BEST = "h100", 5


@door
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr for a config that cannot run, or has no layout to write."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    asked = _parser().parse_intermixed_args(arguments)
    _require_gpus(asked)
    config = load_run(asked.config, asked.overrides)
    check(config)
    lines = _answer(config, asked=asked)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def missing_data(config: RunConfig) -> list[Path]:
    """The data sets (a source's split each) that have no manifest below data.root; names come from the config alone.

    Under the recipe `demo` all of them, where what stands there is its synthetic stand-in.
    """
    sets = [Path(config.data.root, source.path, split) for source in config.data.sources.values() for split in SPLITS]
    if config.data.recipe == "demo" and _kind(Path(config.data.root)) == "synthetic":
        return sets
    return [one for one in sets if not (one / "manifest.json").is_file()]


def _kind(root: Path) -> str | None:
    """What data_prep.demo says that it made there."""
    try:
        return json.loads((root / "demo.json").read_bytes())["kind"]
    except (OSError, ValueError, KeyError):
        return None


def rows(config: RunConfig) -> list[tuple[str, str]]:
    """What the run will be, as (name, value) for a table."""
    model, data, parallel, train = config.model, config.data, config.parallel, config.train
    accumulated = config.microbatches
    degrees = f"tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp} x dp {parallel.dp}"
    if parallel.virtual_stages > 1:
        degrees += f" ({parallel.virtual_stages} stages a rank)"
    again = f", recompute {parallel.recompute}" if parallel.recompute != "none" else ""
    media = ", ".join(f"{name} ({_largest(one.buckets, patch=one.patch)})" for name, one in model.media.items())
    return [
        ("run", f"{config.name}, into {Path(config.run.folder, config.name)}"),
        (
            "ranks",
            f"{parallel.ranks} = {degrees}, ZeRO {parallel.zero_stage}, {parallel.dtype}{again}, {parallel.host}",
        ),
        ("atto", f"{model.atto.layers} layers, width {model.atto.width}, {model.atto.heads} heads"),
        ("layers a stage", ", ".join(map(str, dict.fromkeys(parallel.layers_of_stages(model.atto.layers))))),
        ("media", media or "none"),
        ("sequence", f"{data.sequence_latents} latents"),
        (
            "global batch",
            f"{train.global_batch} sequences, {accumulated} microbatch(es) of {train.micro_batch} a rank",
        ),
        ("latents a step", f"{train.global_batch * data.sequence_latents:,}"),
        ("latents in all", f"{train.steps * train.global_batch * data.sequence_latents:,} in {train.steps:,} steps"),
        ("sources", ", ".join(f"{name} {share:.0%}" for name, share in _shares(config).items())),
        ("data missing", ", ".join(map(str, missing_data(config))) or "none"),
    ]


def _answer(config: RunConfig, *, asked: argparse.Namespace) -> list[str]:
    if asked.check:
        return []
    if asked.ranks:
        return [str(config.parallel.ranks)]
    if asked.missing:
        return [str(one) for one in missing_data(config)]
    if asked.show:
        return [_plain(value_of(config, key)) for key in asked.show]
    lines = _table(rows(config))
    return lines if asked.gpus is None else [*lines, "", *_cluster(config, asked)]


def _cluster(config: RunConfig, asked: argparse.Namespace) -> list[str]:
    """Parts, the config's own layout where it has as many ranks, and the best layouts of `--gpus` devices."""
    from matformer.config.device import load_device  # here, as scripts that ask for one value pay for every import
    from matformer.parallel import tables
    from matformer.parallel.expected import guess_of
    from matformer.parallel.layouts import estimate, estimates, load_of, no_layout

    device = load_device(_device_file(asked.device or DEVICE, config_file=Path(asked.config)))
    guess = guess_of(config, patch_bytes=asked.patch_bytes)
    lines = [f"parts (a sequence of {config.data.sequence_latents:,} latents, forward and backward)"]
    lines += _table(tables.parts_rows(config, guess), head=tables.PARTS_HEAD)
    lines += ["", *_table([tables.guess_row(guess), ("device", f"{device.name}: {device.source}")])]
    if config.parallel.ranks == asked.gpus:
        own = estimate(config, load_of(config, guess), device)
        lines += ["", "the config's own layout", *_table([tables.layout_row(own, device)], head=tables.LAYOUTS_HEAD)]
        lines += _table(tables.detail_rows(own, device))
    found = estimates(config, guess, device, gpus=asked.gpus)
    chosen = tables.best(found, device, count=asked.best or BEST)
    if not chosen:
        raise no_layout(config, gpus=asked.gpus)
    lines += ["", f"best layouts of {asked.gpus:,} x {device.name}, of {len(found)} that break no rule"]
    lines += _table([tables.layout_row(one, device) for one in chosen], head=tables.LAYOUTS_HEAD)
    lines += ["", "the first of them", *_table(tables.detail_rows(chosen[0], device))]
    if asked.write:
        if not chosen[0].fits(device):
            raise tables.too_large(chosen[0], device)
        command = f"python -m matformer.plan {asked.config} --gpus {asked.gpus} --device {asked.device or DEVICE}"
        _write(asked.write, tables.plan_file(chosen[0], command=" ".join([command, *asked.overrides])))
    return lines


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise ConfigError(f"--write must be a file that can be written, got {error}; change --write") from None


def _require_gpus(asked: argparse.Namespace) -> None:
    """What only a search uses is not passed over in silence."""
    given = [name for name in ("device", "patch_bytes", "best", "write") if getattr(asked, name) is not None]
    if given and asked.gpus is None:
        option = f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"{option} must stand beside --gpus N, got {option} alone; add --gpus, or leave it out")


def _device_file(name: str, *, config_file: Path) -> Path:
    """A file, or the name of one in configs/device beside the run file's folder (or its parents)."""
    if name.endswith(".yaml"):
        return Path(name)
    beside = [parent / "device" / f"{name}.yaml" for parent in config_file.resolve().parents]
    return next((one for one in beside if one.is_file()), Path("configs", "device", f"{name}.yaml"))


def _table(cells: Sequence[tuple[str, ...]], *, head: Sequence[str] = ()) -> list[str]:
    from rich.console import Console  # here, because scripts that ask for one value pay for every import
    from rich.table import Table

    table = Table(show_header=bool(head), box=None)
    for name in head:
        table.add_column(name)
    for row in cells:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, 110)  # narrower, a row of numbers is no row
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


def _plain(value: Any) -> str:
    return "" if value is None else str(value)


def _largest(buckets: tuple[tuple[int, ...], ...], *, patch: int) -> str:
    largest = max(buckets, key=math.prod)
    return f"{len(buckets)} shape(s), up to {math.prod(cells // patch for cells in largest)} patches"


def _shares(config: RunConfig) -> dict[str, float]:
    total = sum(source.weight for source in config.data.sources.values())
    return {name: source.weight / total for name, source in config.data.sources.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m matformer.plan", description="Check a config; start nothing.")
    parser.add_argument("config", help="run file, such as configs/run/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--device", help=f"with --gpus: a name in configs/device, or a file ({DEVICE})")
    parser.add_argument(
        "--patch-bytes", type=amount, metavar="X", help="with --gpus: mean bytes of a patch of this data"
    )
    parser.add_argument("--best", type=positive, metavar="N", help=f"with --gpus: how many layouts are shown ({BEST})")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="with --gpus: write the best layout as a file of configs/plan"
    )
    answers = parser.add_mutually_exclusive_group()
    answers.add_argument(
        "--gpus", type=positive, metavar="N", help="say what N devices would make of it, and the best layouts"
    )
    answers.add_argument("--check", action="store_true", help="say nothing when the config can run")
    answers.add_argument("--ranks", action="store_true", help="say only the number of ranks")
    answers.add_argument("--missing", action="store_true", help="say only which data sets are missing, one a line")
    answers.add_argument("--show", action="append", metavar="KEY", help="say only the value of a key (repeatable)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
