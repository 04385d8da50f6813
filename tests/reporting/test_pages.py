"""Each kind of page: whole and well-formed, nothing fetched, every name escaped, and usable without seeing it."""

import itertools
import re

import page_examples
import pytest
from read_pages import Read

from depthfuse.reporting.figures import Figure
from depthfuse.reporting.markup import bar, page, section, table, tag
from depthfuse.reporting.style import COLOURS


@pytest.fixture(scope="module", params=page_examples.KINDS)
def text(request):
    return page_examples.KINDS[request.param]()


def test_it_is_well_formed_and_every_name_is_escaped(text):
    read = Read(text)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert not read.all("script", "iframe", "object", "img", "form")
    (heading,) = read.all("h1")
    assert heading["text"] == page_examples.SHOWN
    assert (
        page_examples.SHOWN in read.all("title")[-1]["text"]
        or page_examples.SHOWN in read.all("title")[0]["text"]
    )
    assert "<script" not in text and "\x00" not in text and "\x1b" not in text
    assert not [name for element in read.elements for name in element if name.startswith("on")]


def test_nothing_is_fetched(text):
    read = Read(text)
    for element in read.elements:
        for name in ("href", "src", "srcset", "action", "data", "poster"):
            assert element.get(name, "#").startswith("#") or element[name] == "data:,"
    assert not re.search(r"//|@import|url\((?!#)", text)


def test_links_and_references_lead_somewhere(text):
    read = Read(text)
    ids = [element["id"] for element in read.elements if "id" in element]
    assert len(ids) == len(set(ids))
    wanted = [element["href"][1:] for element in read.elements if element.get("href", "").startswith("#")]
    wanted += [name for element in read.elements for name in element.get("aria-labelledby", "").split()]
    wanted += re.findall(r"url\(#(\w[\w-]*)\)", text)
    assert wanted and set(wanted) <= set(ids)


def test_it_can_be_used_without_seeing_it(text):
    read = Read(text)
    levels = [int(e["tag"][1]) for e in read.all("h1", "h2", "h3")]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    for element in read.all("table"):
        assert "div" in element["inside"]  # which scrolls
    assert len(read.all("caption")) == len(read.all("table")) > 0
    assert all(element.get("scope") in ("row", "col") for element in read.all("th"))
    for element in read.all("svg"):
        assert element["role"] == "img" and element["aria-labelledby"]
    assert len([e for e in read.all("title", "desc") if "svg" in e["inside"]]) == 2 * len(read.all("svg")) > 0
    assert all("g" in e["inside"] for e in read.all("text"))  # text of figures stays text


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("ground", ["ground", "surface", "raised"])
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(ground, scheme):
    """WCAG 2.2, 1.4.3: 4.5 for text; 1.4.11: 3 for lines of figures."""
    for name, colours in COLOURS.items():
        if name in ("ground", "surface", "raised", "line"):
            continue
        lightness = sorted(luminance(c) + 0.05 for c in (colours[scheme], COLOURS[ground][scheme]))
        assert lightness[1] / lightness[0] >= (3.0 if name == "before" else 4.5), name


def test_figures_take_the_colours_and_the_font_of_their_page(text):
    light = [colours[0] for colours in COLOURS.values()]
    assert len(set(light)) == len(light)
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert (
        drawn and not re.search(r"#[0-9a-f]{6}\b", drawn) and "DejaVu" not in drawn and "var(--sans)" in drawn
    )


def test_a_figure_is_drawn_equal_twice():
    assert page_examples.bench() == page_examples.bench()


def test_a_figure_as_a_file_is_whole_or_not_there(tmp_path):
    def fails(figure):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Figure("title", "words", fails).save_png(tmp_path / "new" / "figure.png")
    assert not (tmp_path / "new").exists()
    Figure("title", "words", lambda figure: figure.add_subplot()).save_png(tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figure.png"]


def test_pieces_that_have_nothing_to_show_are_left_out():
    assert table(["a"], [], "nothing") is None
    assert section("key", "title", None, None) is None
    text = page("kind", "title", [None], [None])
    assert not Read(text).all("section", "nav")


def test_columns_of_numbers_are_set_to_the_right():
    rows = [
        ["a", "1.5 ± 0.2", "1,024", "-3.25x", "", bar(0.5)],
        ["b", "2.5 ± 0.2", "", "1e-07", "3 of", bar(1.5)],
    ]
    read = Read(page("kind", "title", [], [section("key", "title", table(list("uvwxyz"), rows, "caption"))]))
    cells = [element.get("class") for element in read.all("td")]
    assert cells == ["n", "n", "n", None, "bars"] * 2
    assert [e["style"] for e in read.all("span")] == ["width:50.0%", "width:100.0%"]


def test_what_no_document_can_hold_is_replaced():
    assert tag("p", "a\x00b\x0b\ud800", title="\x1f").text == "a\ufffdb\ufffd\ufffd"
