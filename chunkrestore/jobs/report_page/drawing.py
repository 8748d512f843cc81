"""Figures of the page as inline SVG, in colours that the page's style sheet decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkrestore.jobs.progress import format_seconds
from chunkrestore.jobs.report_page.markup import Markup, element

_WIDTH = 960
_LEFT = 130
_RIGHT = 130
_ROW = 54
_GAP = 14
_AXIS = 26
_PLOT = _WIDTH - _LEFT - _RIGHT


@dataclass(frozen=True)
class Row:
    """One small figure of several that share an axis."""

    name: str
    """Written on its left."""
    values: Sequence[float]
    """Heights of bars of equal width."""
    note: str
    """Written on its right."""
    style: str
    """Class of its bars in the style sheet."""


@dataclass(frozen=True)
class Tick:
    """A mark on the shared axis."""

    position: float
    """From 0 to 1."""
    text: str
    """Written below."""


def figure(title: str, rows: Sequence[Row], ticks: Sequence[Tick], marks: Sequence[float] = ()) -> Markup:
    """Return bars for several rows, one below the other, each scaled to its own maximum.

    Parameters
    ----------
    title
        What the figure shows, for those who do not see it.
    rows
        At least one.
    ticks
        Of the shared axis.
    marks
        Positions from 0 to 1 at which a vertical line is drawn through all rows.
    """
    bottom = len(rows) * (_ROW + _GAP)
    parts: list[Markup] = []
    for number, row in enumerate(rows):
        parts += _row(row, number * (_ROW + _GAP))
    for tick in ticks:
        x = _LEFT + tick.position * _PLOT
        parts.append(element("line", x1=x, x2=x, y1=bottom - _GAP, y2=bottom - _GAP + 5, class_="axis"))
        parts.append(element("text", tick.text, x=x, y=bottom + 8, class_="tick"))
    for mark in marks:
        x = _LEFT + mark * _PLOT
        parts.append(element("line", x1=x, x2=x, y1=0, y2=bottom - _GAP, class_="mark"))
    size = f"0 0 {_WIDTH} {bottom + _AXIS - 8}"
    drawing = element("svg", element("title", title), *parts, viewBox=size, role="img")
    return element("div", drawing, class_="scroll")


def _row(row: Row, top: float) -> list[Markup]:
    """Return the bars of a row as one path, its base line and its words."""
    highest, width = max(row.values, default=0.0), _PLOT / max(1, len(row.values))
    base = top + _ROW
    steps = []
    for i, value in enumerate(row.values):
        if value > 0:
            # Half a unit at least: few among many must not vanish.
            height = max(0.5, (_ROW - 4) * value / highest)
            steps.append(f"M{_LEFT + i * width:.1f} {base}v{-height:.1f}h{width:.1f}v{height:.1f}z")
    return [
        element("text", row.name, x=_LEFT - 12, y=top + _ROW / 2 + 5, class_="name"),
        element("path", d="".join(steps), class_=row.style),
        element("line", x1=_LEFT, x2=_LEFT + _PLOT, y1=base, y2=base, class_="axis"),
        element("text", row.note, x=_LEFT + _PLOT + 12, y=top + _ROW / 2 + 5, class_="note"),
    ]


def time_ticks(seconds: float) -> list[Tick]:
    """Return four to eight ticks at round times from 0 to `seconds`."""
    if seconds <= 0:
        return [Tick(0.0, "0:00")]
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400)
    step = next((s for s in steps if seconds / s <= 8), 86_400 * max(1, round(seconds / 86_400 / 7)))
    return [Tick(k * step / seconds, format_seconds(k * step)) for k in range(int(seconds / step) + 1)]


def share_bar(shares: Sequence[tuple[str, float]]) -> Markup:
    """Return a bar made of shares, each with the class of its colour; they may add up to less than 1."""
    parts = [
        element("span", class_=f"part {name}", style=f"width:{100 * share:.1f}%") for name, share in shares
    ]
    return element("div", *parts, class_="shares")
