"""HTML that is safe because of how it is made: what is not markup already becomes text."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

_EMPTY = frozenset({"img", "input", "br", "rect", "line", "path"})
"""Elements without content; those of SVG must be closed all the same."""


class Markup(str):
    """HTML; any other string is text, whatever it looks like."""

    __slots__ = ()


def element(name: str, *children: Any, **attributes: Any) -> Markup:
    """Return an element.

    Parameters
    ----------
    name
        Tag.
    children
        `Markup` is taken as it is, anything else as text; None is left out.
    attributes
        ``class_`` is written ``class``, ``data_x`` is written ``data-x``; True alone, None and False not at all.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        plain = key.rstrip("_").replace("_", "-")
        written.append(f" {plain}" if value is True else f' {plain}="{escape(str(value))}"')
    start = f"<{name}{''.join(written)}"
    return Markup(f"{start}/>" if name in _EMPTY else f"{start}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Markup:
    """Return children one after the other."""
    return Markup("".join(c if isinstance(c, Markup) else escape(str(c)) for c in children if c is not None))


def section(title: str, *parts: Markup | None) -> Markup:
    """Return a section of the page."""
    return element("section", element("h2", title), *parts)


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], **attributes: Any) -> Markup:
    """Return a table that scrolls by itself where the window is narrow; only long cells break into lines."""
    body = [
        element("tr", *(element("td", cell, class_="long" if _is_long(cell) else None) for cell in row))
        for row in rows
    ]
    titles = element("thead", element("tr", *(element("th", title) for title in head)))
    return element("div", element("table", titles, element("tbody", *body), **attributes), class_="scroll")


def facts(pairs: Iterable[tuple[Any, Any]]) -> Markup:
    """Return names with what they stand for; those without a value are left out."""
    shown = [(name, value) for name, value in pairs if value not in (None, "")]
    terms = (join([element("dt", name), element("dd", value)]) for name, value in shown)
    return element("dl", *terms) if shown else Markup()


def shortened(value: Any, length: int = 300) -> str:
    """Return a value as text of at most `length` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _is_long(cell: Any) -> bool:
    return not isinstance(cell, Markup) and len(str(cell)) > 40
