"""A bench as a user starts it: a process of its own, in which hosts may join worlds and nothing checks shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_bench(name: str, *arguments: str, project: Path) -> tuple[str, dict[str, Any]]:
    """What `tools/bench/NAME.py ... --json` prints, and its last line read; it must end with 0."""
    end = subprocess.run(
        [sys.executable, f"tools/bench/{name}.py", *arguments, "--json"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
    )
    assert end.returncode == 0, end.stderr
    return end.stdout, json.loads(end.stdout.splitlines()[-1])
