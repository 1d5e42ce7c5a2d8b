"""What a person sees while a model draws: one bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


@contextmanager
def drawing_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """A live line on stderr while inside, gone afterwards; it is told what is made, steps done, and of how many.

    None for how many: nobody knows. Stdout is left alone.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console, disable = Console(stderr=True), not sys.stderr.isatty()
    with Progress(*columns, console=console, disable=disable, transient=True, redirect_stdout=False) as live:
        shown: dict[str, TaskID] = {}

        def watch(what: str, done: int, total: int | None) -> None:
            if what not in shown:
                while shown:
                    live.remove_task(shown.popitem()[1])
                shown[what] = live.add_task(what, total=total)
            live.update(shown[what], completed=done, total=total)

        yield watch
