"""Figures drawn once, by matplotlib: as PNG files, and as drawings inside a page that take its colours and its font."""

from __future__ import annotations

import hashlib
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from depthfuse.checkpoint import save_bytes
from depthfuse.reporting.markup import clean, tag
from depthfuse.reporting.style import COLOURS, SERIES, light

# In inches: letters are as large as a page's own on a phone, and two stand side by side elsewhere.
WIDTH, HEIGHT = 5.2, 3.4
_LOOKS: dict[str, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.edgecolor": light("before"),
    "axes.labelcolor": light("muted"),
    "axes.titlecolor": light("ink"),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": light("line"),
    "grid.linewidth": 0.8,
    "xtick.color": light("before"),
    "ytick.color": light("before"),
    "xtick.labelcolor": light("muted"),
    "ytick.labelcolor": light("muted"),
    "text.color": light("ink"),
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 6.0,
    "text.parse_math": False,  # names of users may hold dollars
}
_METADATA = ("Date", "Creator", "Format", "Type")  # with addresses, and of no use in a page
_XLINK = "{http://www.w3.org/1999/xlink}href"
_BY_COLOUR = {colours[0]: f"var(--{name})" for name, colours in COLOURS.items()}
_COLOUR = re.compile("|".join(_BY_COLOUR))
_FONT = re.compile(r"(font: [^;]*?px|font-family:) [^;]*")
_REFERENCE = re.compile(r"#(\w+)")


def short(name: str, most: int = 48) -> str:
    """A name of a user's, as far as there is room in a figure: its head and its end."""
    name = clean(name)
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most - most // 2 - 1) :]}"


def legend_below(axes: Any, handles: Sequence[Any] | None = None, columns: int = 3, lines: int = 2) -> None:
    """A legend where it hides nothing: below so many lines of numbers and the name of the x axis."""
    from matplotlib.transforms import ScaledTranslation

    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    points = 12 + 12 * lines  # however large the axes become
    below = ScaledTranslation(0.0, -points / 72, axes.figure.dpi_scale_trans)
    looks = {"ncols": columns, "borderaxespad": 0.0, "handlelength": 1.6, "columnspacing": 1.4}
    place = {"loc": "upper left", "bbox_to_anchor": (0.0, 0.0), "bbox_transform": axes.transAxes + below}
    axes.legend(handles=handles, **place, **looks)


class Figure:
    """One drawing: its title and what it shows, in words, for whoever cannot see it, and how it is drawn.

    draw: gets a figure of matplotlib's and fills it. width, height: in inches.
    """

    def __init__(
        self,
        title: str,
        words: str,
        draw: Callable[[Any], None],
        width: float = WIDTH,
        height: float = HEIGHT,
    ):
        self.title, self.words, self.draw, self.size = title, words, draw, (width, height)

    def save_png(self, path: Path) -> None:
        """Write it atomically, on white ground."""
        save_bytes(path, self._written("png", facecolor="white", dpi=150))

    def piece(self) -> Element:
        """It as an element of a page, with its words below it."""
        key = "f" + hashlib.sha256(f"{self.title}\0{self.words}".encode()).hexdigest()[:8]
        drawn = self._written("svg", facecolor="none", metadata=dict.fromkeys(_METADATA)).decode()
        svg = ET.fromstring(clean(drawn))
        _simplify(svg, key)
        for name in ("width", "height", "version"):
            svg.attrib.pop(name, None)
        svg.attrib |= {"role": "img", "aria-labelledby": f"{key}-title {key}-desc"}
        svg.insert(0, tag("title", self.title, id=f"{key}-title"))
        svg.insert(1, tag("desc", self.words, id=f"{key}-desc"))
        return tag("figure", svg, tag("figcaption", self.words))

    def _written(self, kind: str, **options: Any) -> bytes:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas

        looks = _LOOKS | {
            "axes.prop_cycle": matplotlib.cycler(color=[light(name) for name in SERIES]),
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "depthfuse",  # ids depend on nothing but what is drawn
        }
        with matplotlib.rc_context(looks):
            figure = Canvas(figsize=self.size, layout="constrained")
            FigureCanvasAgg(figure)
            self.draw(figure)
            out = io.BytesIO()
            figure.savefig(out, format=kind, **options)
        return out.getvalue()


def _simplify(element: Element, key: str) -> None:
    """Of matplotlib's SVG what a page needs, in place: no namespaces, no ids but those that are used, and these unique
    in the page; its colours as custom properties, its font the page's."""
    kept = {"clipPath", "path"}
    for child in element.iter():
        child.tag = child.tag.rpartition("}")[2]
        if _XLINK in child.attrib:
            child.set("href", child.attrib.pop(_XLINK))
        if "id" in child.attrib:
            if child.tag in kept:
                child.set("id", f"{key}-{child.get('id')}")
            else:
                del child.attrib["id"]
        for name in ("href", "clip-path"):
            if name in child.attrib:
                child.set(name, _REFERENCE.sub(rf"#{key}-\1", child.attrib[name]))
        style = child.attrib.get("style")
        if style is not None:
            style = _COLOUR.sub(lambda found: _BY_COLOUR[found[0]], style)
            child.set("style", _FONT.sub(r"\1 var(--sans)", style))
        if child.tag == "defs":  # matplotlib's own style sheet, which would hold for the whole page
            for sheet in child.findall("{http://www.w3.org/2000/svg}style"):
                child.remove(sheet)
