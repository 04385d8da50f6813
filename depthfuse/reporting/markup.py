"""The pieces of a page, as elements: whatever text goes in is escaped when they are written.

A piece that has nothing to show is None, and whoever takes pieces leaves those out.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from depthfuse._version import __version__
from depthfuse.reporting.style import style_sheet

Piece = Element | str | None
# What XML, and so the writer of elements, has no way to hold; HTML has none either.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_NUMBER = re.compile(r"[<>=+\-−±~ ]*\d[\d.,e+\-]*( ?[%x×M]| ± [\d.]+| to [\d.]+)?$")


def tag(name: str, *children: Piece, **attributes: str | None) -> Element:
    """<name attributes>children</name>; `class_` is class, and other underscores are hyphens."""
    given = {
        key.rstrip("_").replace("_", "-"): clean(value)
        for key, value in attributes.items()
        if value is not None
    }
    element = Element(name, given)
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child is not None and len(element):
            element[-1].tail = (element[-1].tail or "") + clean(child)
        elif child is not None:
            element.text = (element.text or "") + clean(child)
    return element


def clean(text: str) -> str:
    """Text without what no document can hold, such as control characters."""
    return _FORBIDDEN.sub("\ufffd", text)


def paragraph(*children: Piece, kind: str | None = None) -> Element:
    return tag("p", *children, class_=kind)


def section(key: str, title: str, *pieces: Piece) -> Element | None:
    """A part of the page under a heading; None where all of its pieces are."""
    if all(piece is None for piece in pieces):
        return None
    return tag(
        "section", tag("h2", title, id=f"{key}-title"), *pieces, id=key, aria_labelledby=f"{key}-title"
    )


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[Piece]],
    caption: str,
    strong: Sequence[int] = (),
) -> Element | None:
    """A table that scrolls in a box of its own; the first cell of a row is its head. None without rows.

    strong: the rows that stand out. Columns mostly of numbers are set to the right.
    """
    if not rows:
        return None
    numeric = [_is_numeric([row[column] for row in rows]) for column in range(len(head))]
    kinds = ["n" if is_number else None for is_number in numeric]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=kinds[0]),
            *(_cell(cell, kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)),
            class_="strong" if index in strong else None,
        )
        for index, row in enumerate(rows)
    ]
    titles = [tag("th", title, scope="col", class_=kind) for title, kind in zip(head, kinds, strict=True)]
    whole = tag("table", tag("caption", caption), tag("thead", tag("tr", *titles)), tag("tbody", *body))
    return tag("div", whole, class_="scroll", role="region", tabindex="0", aria_label=caption)


def _cell(cell: Piece, kind: str | None) -> Element:
    is_bar = isinstance(cell, Element) and cell.get("class") == "bar"
    return tag("td", cell, class_="bars" if is_bar else kind)


def _is_numeric(cells: Sequence[Piece]) -> bool:
    texts = [cell for cell in cells if isinstance(cell, str) and cell]
    return 2 * sum(bool(_NUMBER.match(text)) for text in texts) > len(texts)


def bar(share: float) -> Element:
    """A bar of a share of its cell's width; it repeats a number that stands beside it, and is not read out."""
    width = f"width:{100 * min(max(share, 0.0), 1.0):.1f}%"
    return tag("span", class_="bar", style=width, aria_hidden="true")


def tiles(cells: Sequence[tuple[str, str, str]]) -> Element:
    """(name, value, what it is beside) of the figures that matter most, the first one first of all."""
    items = [
        tag(
            "li",
            tag("span", name, class_="name"),
            " ",
            tag("span", value, class_="value"),
            " ",
            tag("span", about, class_="about"),
            class_=None if index else "main",
        )
        for index, (name, value, about) in enumerate(cells)
    ]
    return tag("ul", *items, class_="tiles")


def facts(known: Mapping[str, Any]) -> Element | None:
    """Names and values, those left out that are None or empty."""
    told = {name: _in_words(value) for name, value in known.items() if value not in (None, "", {}, [], ())}
    pairs = [tag(kind, text) for name, value in told.items() for kind, text in (("dt", name), ("dd", value))]
    return tag("dl", *pairs, class_="facts") if pairs else None


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def code(text: str) -> Element:
    """Lines of code, which scroll in a box of their own."""
    return tag("pre", tag("code", text), tabindex="0")


def folded(title: str, *pieces: Piece) -> Element | None:
    """What only some want to see, behind a line to open it; None where all of its pieces are."""
    if all(piece is None for piece in pieces):
        return None
    return tag("details", tag("summary", title), *pieces)


def grid(*figures: Piece) -> Element | None:
    """Figures side by side where there is room; None where all of them are."""
    if all(figure is None for figure in figures):
        return None
    return tag("div", *figures, class_="figures")


def page(kind: str, title: str, intro: Sequence[Piece], sections: Sequence[Element | None]) -> str:
    """A whole document.

    Args:
        kind: of report, above the title. title: of the page and of its window. intro: below it.
        sections: see `section`; each gets a link above them all.
    """
    shown = [found for found in sections if found is not None]
    links = [tag("li", tag("a", "".join(found[0].itertext()), href=f"#{found.get('id')}")) for found in shown]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", f"{title} · {kind}"),
        tag("link", rel="icon", href="data:,"),
        tag("style", style_sheet()),
    )
    navigation = tag("nav", tag("ul", *links), aria_label="On this page") if len(links) > 1 else None
    body = tag(
        "body",
        tag("header", tag("p", kind, class_="eyebrow"), tag("h1", title), *intro, navigation, class_="top"),
        tag("main", *shown),
        tag(
            "footer",
            f"Written by depthfuse {__version__}. This file is complete in itself: it can be sent and kept.",
        ),
    )
    text = ET.tostring(tag("html", head, body, lang="en"), encoding="unicode", method="html")
    return f"<!DOCTYPE html>\n{text}\n"
