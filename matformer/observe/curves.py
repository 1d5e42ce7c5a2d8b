"""Curves of a run as SVG inside a page: colours are the page's own variables, so that they turn dark with it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

MAX_POINTS = 400

# Colours that nothing else draws with: each is replaced by the page's variable after drawing.
_INKS = {
    "text": "#010101",
    "image": "#010102",
    "audio": "#010103",
    "router": "#010104",
    "other": "#010105",
    "faint": "#010106",
    "muted": "#010107",
    "grid": "#010108",
    "card": "#010109",
}


@dataclass(frozen=True)
class Series:
    """Points of one curve. dots: a few measured points and their errors; otherwise a line, averaged to fit."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    ink: str
    dots: bool = False
    errors: Sequence[float] | None = None
    faint: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    label: str
    value: float


def panel(
    name: str, series: Sequence[Series], *, levels: Sequence[Level] = (), unit: str = "", log: bool = False
) -> str:
    """One set of axes as an <svg> element; `name` must be unique on its page."""
    rc: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(rc):
        figure = Figure(figsize=(4.7, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for one in series:
            _draw(axes, one)
        if log:
            axes.set_yscale("log")
        else:
            _fit_height(axes, series, levels)
        _draw_levels(axes, levels)
        _dress(axes, unit=unit, legend=len(series) > 1)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _as_element(file.getvalue(), name=name)


def averaged(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points: the means of equal runs of points."""
    run = max(1, math.ceil(len(steps) / MAX_POINTS))
    parts = [slice(first, first + run) for first in range(0, len(steps), run)]
    return [_mean(steps[part]) for part in parts], [_mean(values[part]) for part in parts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _draw(axes: Axes, series: Series) -> None:
    ink = _INKS[series.ink]
    if not series.dots:
        steps, values = averaged(series.steps, series.values)
        width, alpha = (0.9, 0.55) if series.faint else (1.5, 1.0)
        axes.plot(steps, values, color=ink, linewidth=width, alpha=alpha, label=series.label)
        return
    style = {"color": ink, "markersize": 3.5, "linewidth": 1.4, "label": series.label}
    fill = "none" if series.faint else ink
    axes.errorbar(
        series.steps,
        series.values,
        yerr=series.errors,
        fmt="o--" if series.faint else "o-",
        mfc=fill,
        elinewidth=0.8,
        **style,
    )


def _fit_height(axes: Axes, series: Sequence[Series], levels: Sequence[Level]) -> None:
    """Let the first steps, far above all the rest, leave the picture."""
    tails = [value for one in series for value in list(one.values)[len(one.values) // 20 :]]
    shown = sorted(tails + [level.value for level in levels])
    if len(shown) < 2:
        return
    low, high = shown[0], shown[min(len(shown) - 1, int(0.995 * len(shown)))]
    high = max(high, *(level.value for level in levels), low) if levels else high
    room = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    axes.set_ylim(low - room, high + room)


def _draw_levels(axes: Axes, levels: Sequence[Level]) -> None:
    for level in levels:
        axes.axhline(level.value, color=_INKS["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            level.label,
            (1.0, level.value),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=_INKS["muted"],
            fontsize=8.5,
        )


def _dress(axes: Axes, *, unit: str, legend: bool) -> None:
    muted, grid = _INKS["muted"], _INKS["grid"]
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(grid)
    axes.tick_params(which="both", colors=muted, length=0, labelsize=9)
    axes.grid(axis="y", color=grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5))
    else:
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("step", color=muted, fontsize=9)
    if unit:
        axes.set_ylabel(unit, color=muted, fontsize=9)
    if legend:
        axes.legend(
            framealpha=0.85,
            facecolor=_INKS["card"],
            edgecolor="none",
            fontsize=8.5,
            labelcolor=muted,
            loc="best",
            handlelength=1.6,
        )


def _tick(value: float, _: int | None = None) -> str:
    return f"{value / 1000:g} k" if value >= 1000 else f"{value:g}"


def _as_element(svg: str, *, name: str) -> str:
    """The <svg> alone, filling its place, its ids its own, its colours the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" class="curve" role="img">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    own = re.sub(r"[^a-z0-9]", "-", name.lower())
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}-", svg)
    svg = re.sub(r"font: [^;\"]*?([0-9.]+px)[^;\"]*", r"font: \1 var(--sans)", svg)
    for ink, colour in _INKS.items():
        svg = svg.replace(colour, f"var(--{ink})")
    return svg
