"""The bar of sampling: on a terminal and on stderr alone."""

from __future__ import annotations

import io
import sys

import pytest

from matformer.observe.drawing import drawing_bar


class Terminal(io.StringIO):
    """What a person looks at."""

    def isatty(self) -> bool:
        return True


def draw() -> None:
    with drawing_bar() as watch:
        watch("loading", 0, None)
        for batch in (1, 2):
            for step in range(1, 4):
                watch(f"image, batch {batch} of 2", step, 3)


def test_nothing_is_printed_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    draw()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_is_shown_what_is_drawn_and_stdout_stays_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    draw()
    assert "image, batch 2 of 2" in terminal.getvalue() and "3/3" in terminal.getvalue()
    assert "batch 1 of 2" not in terminal.getvalue().rsplit("batch 2 of 2", 1)[1], "one bar at a time"
    assert capsys.readouterr().out == ""
