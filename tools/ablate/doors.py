"""The doors of all ablations: what they take, how they end, and what results say of where they were made."""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from paper import Results

from matformer.door import door

log = logging.getLogger("ablate")


def add_arguments(parser: argparse.ArgumentParser, *, arms: Sequence[str], out: Path, document: Path) -> None:
    """Arms, seeds, runs at once, where to, and overrides for all of them."""
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(arms))
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at once, a thread each")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--document", type=Path, default=document)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.set_defaults(command=sys.argv[1:])


@door
def run_door(
    asked: argparse.Namespace,
    *,
    ablate: Callable[[argparse.Namespace], dict[str, Any]],
    write: Callable[[Results, Path], None],
) -> int:
    """Results as results.json and as a document. Exit code: 0, or the error's with one sentence on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    log.setLevel(logging.INFO)
    results = ablate(asked)
    (asked.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    write(results, asked.document)
    log.info("%s", asked.document)
    if asked.json:
        sys.stdout.write(json.dumps(results) + "\n")
    return 0


def made(tool: str, asked: argparse.Namespace) -> dict[str, Any]:
    """When, where and by which command."""
    return {
        "command": " ".join(["python", f"tools/ablate/{tool}", *(asked.command or [])]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "torch": torch.__version__,
        "seeds": asked.seeds,
    }


def machine() -> str:
    """Cores that this process may use, and of what."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{len(os.sched_getaffinity(0))} cores of {model}"
