"""Results of an ablation -> a document, and a picture beside it."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Results = Mapping[str, Any]

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563")
MUTED, GRID = "#6b7280", "#e5e7eb"
SHORT_STEPS = 1000


@dataclass(frozen=True)
class Paper:
    """render: (results, picture=its file's name) -> the document. about: what the command says of itself."""

    render: Callable[..., str]
    draw: Callable[[Results], Figure]
    out: Path
    about: str | None

    def write(self, results: Results, path: Path) -> None:
        """The document at `path`, the picture beside it under the same stem."""
        picture = path.with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.render(results, picture=picture.name), encoding="utf-8")
        self.draw(results).savefig(picture)

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """The door: write the document and the picture of a file of results."""
        parser = argparse.ArgumentParser(description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("results", type=Path)
        parser.add_argument("--out", type=Path, default=self.out)
        asked = parser.parse_args(arguments)
        self.write(json.loads(asked.results.read_text(encoding="utf-8")), asked.out)
        sys.stdout.write(f"{asked.out}\n")
        return 0


def short_runs(words: str, *, short: bool) -> str:
    """The paragraph that warns of short runs, where they are; `words` say what they can tell."""
    return f"\n\n**These are short runs**: {words}" if short else ""


def line_with_range(
    axes: Axes, places: Sequence[float], values: Sequence[Sequence[float]], *, colour: str, label: str
) -> None:
    """Means over seeds, and the range between them; `values` holds the seeds at each place."""
    axes.plot(places, [statistics.fmean(own) for own in values], "o-", color=colour, markersize=3, label=label)
    axes.fill_between(places, [min(own) for own in values], [max(own) for own in values], color=colour, alpha=0.12)


def dress(axes: Axes) -> None:
    """The house's plain axes."""
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.grid(axis="y", color=GRID)
    axes.spines[["top", "right", "left"]].set_visible(False)
