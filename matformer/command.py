"""The doors by one name: `matformer plan CONFIG --gpus 64` is `python -m matformer.plan CONFIG --gpus 64`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

DOORS = ("plan", "train", "sample", "evaluate", "report")
USAGE = f"usage: matformer {{{','.join(DOORS)}}} ... (each of them takes --help)\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The door's exit code, 0 for --help, or 2 for a name that is none."""
    door, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if door in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if door not in DOORS:
        sys.stderr.write(f"matformer must be followed by one of {', '.join(DOORS)}, got {door or 'nothing'}\n")
        return 2
    return import_module(f"matformer.{door}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
