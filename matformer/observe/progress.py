"""What a person sees while it runs: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from matformer.config.schema import MediaObjective

log = logging.getLogger(__name__)


class _Column(NamedTuple):
    """A number of the live line: its key, and how it is written."""

    key: str
    form: str


_COLUMNS = (
    _Column("loss", "loss {:.3f}"),
    _Column("text/bits_per_byte", "text {:.3f} bit/byte"),
    _Column("router/accuracy", "router {:.0%}"),
    _Column("grad_norm", "grad {:.2f}"),
    _Column("lr", "lr {:.1e}"),
)
_RATES = (_Column("bytes_per_second", "{} B/s"), _Column("latents_per_second", "{} lat/s"))
_MEDIA = re.compile(rf"(.+)/(?:next_latent_)?(?:{'|'.join(get_args(MediaObjective))})_loss")


class ProgressLine:
    """Rows of global rank 0 shown: live where `console` is a terminal, else a log line every so often.

    A plain line comes at the first row, then every `every_steps` steps or `every_seconds`, whichever is first,
    and at the last step. Evaluation rows (`heldout/...`) always get a line.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        console: Console | None = None,
        every_steps: int = 50,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self._every_steps, self._every_seconds, self._clock = every_steps, every_seconds, clock
        self._begun = (first_step, clock())
        self._shown: tuple[int, float] | None = None
        self._last: dict[str, float] = {}
        self._live, self._task = _live(console or Console(stderr=True), total=total_steps, first=first_step)

    def update(self, step: int, row: Mapping[str, float]) -> None:
        """Show the row of `step`, the number of steps done."""
        if any(name.startswith("heldout") for name in row):
            log.info("step %d, held out: %s", step, heldout_text(row))
            return
        self._last |= row  # a step without images keeps the last loss of images on the line
        text = row_text(self._last)
        left = self._seconds_left(step)
        if self._live is not None:
            self._live.update(self._task, completed=step, numbers=text, left=duration_text(left))
        elif self._due(step):
            self._shown = (step, self._clock())
            log.info("step %d/%d  %s  %s left", step, self.total_steps, text, duration_text(left))

    def close(self) -> None:
        """Give the terminal back; twice is harmless."""
        if self._live is not None:
            self._live.stop()

    def _due(self, step: int) -> bool:
        if self._shown is None or step >= self.total_steps:
            return True
        at, when = self._shown
        return step - at >= self._every_steps or self._clock() - when >= self._every_seconds

    def _seconds_left(self, step: int) -> float | None:
        first, when = self._begun
        done = step - first
        return None if done < 1 else (self._clock() - when) / done * (self.total_steps - step)


def row_text(row: Mapping[str, float]) -> str:
    """The numbers of a training row that matter, in one line; those that are missing are left out."""
    flows = [_Column(key, found[1] + " {:.3f}") for key in row if (found := _MEDIA.fullmatch(key))]
    columns = (*_COLUMNS[:2], *flows, *_COLUMNS[2:])
    parts = [column.form.format(value) for column in columns if (value := row.get(column.key)) is not None]
    rates = [column.form.format(amount_text(row[column.key])) for column in _RATES if column.key in row]
    return "  ".join(parts + rates)


def heldout_text(row: Mapping[str, float]) -> str:
    """The numbers of an evaluation row in one line, with their standard errors."""
    parts = []
    for name, value in row.items():
        if not name.startswith("heldout") or name.endswith("_stderr") or value is None:
            continue
        error = row.get(f"{name}_stderr")
        parts.append(f"{name} {value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    return ", ".join(parts)


def amount_text(value: float) -> str:
    """12345 as 12.3 k."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f} "


def duration_text(seconds: float | None) -> str:
    """Seconds as 1:02:03 or 2:03; a dash where unknown."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _live(console: Console, *, total: int, first: int) -> tuple[Progress | None, TaskID]:
    if not console.is_terminal:
        return None, TaskID(0)
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[numbers]}"),
        TextColumn("[dim]{task.fields[left]} left[/]"),
    )
    live = Progress(*columns, console=console, refresh_per_second=4)
    task = live.add_task("", total=total, completed=first, numbers="", left=duration_text(None))
    live.start()
    return live, task
