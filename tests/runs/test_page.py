"""report.html of a run: its numbers are those of results.json, and what a run lacks its page lacks."""

import re
from pathlib import Path

import pytest
from page_examples import CHOICES, LONG, MERGE, SHOWN, findings, results, started
from read_pages import Read

from depthfuse.config import PruneConfig
from depthfuse.reporting.figures import Figure
from depthfuse.reporting.markup import tag
from depthfuse.runs.page import html
from depthfuse.runs.report import comparison_rows, markdown

WHOLE = ["results", "front", "net", "training", "operations", "checks", "reproduce", "machine"]


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are drawn elsewhere."""
    monkeypatch.setattr(Figure, "piece", lambda figure: tag("figure", figure.words))


def sections(text):
    return [
        element["id"]
        for element in sorted(Read(text).all("section"), key=lambda e: text.index(f'id="{e["id"]}"'))
    ]


def texts(text, *tags):
    return [element["text"] for element in Read(text).all(*tags)]


def test_a_whole_run_has_all_sections():
    text = html(findings())
    assert sections(text) == WHOLE
    assert [link["href"] for link in Read(text).all("a")] == [f"#{name}" for name in WHOLE]


def test_numbers_are_those_of_the_results_and_of_report_md(undrawn):
    document = results()
    text, report = html(findings(results=document)), markdown(document)
    cells = texts(text, "td", "th")
    for row in comparison_rows(document):
        assert "| " + " | ".join(row) + " |" in report
        assert any(cells[i : i + len(row)] == row for i in range(len(cells)))
    (tiles,) = [element["text"] for element in Read(text).all("ul") if element.get("class") == "tiles"]
    assert all(
        number in tiles
        for number in ("1.87x", "1.091 ms", "2.079 ms", "6.699 ms", "90.50 %", "(-0.75 points)")
    )
    assert "194,394" in tiles and "603,754 before (-68 %)" in tiles and "2.20 M" in tiles
    assert "Budget met" in text


def test_a_missed_budget_is_said_first(undrawn):
    missed = {"name": "speedup", "unit": "x", "wanted": 2.5, "reached": 1.868, "met": False}
    text = html(findings(results=results(budget=missed)))
    assert text.index("Budget missed") < text.index("<section")
    assert "search.speedup=2.5 was asked for, 1.868 x came out" in text


def test_what_became_of_each_block(undrawn):
    text = html(findings())
    (net,) = Read(text).all("ol")
    blocks = re.findall(
        r'<span class="path">(.*?)</span>.*?<span class="is (\w+)"><span>(.*?)</span>', text, re.DOTALL
    )
    assert [(kind, words) for _, kind, words in blocks] == [
        ("kept", "kept"),
        ("merged", "dense"),
        ("reduced", "reduced"),
        ("dropped", "dropped"),
    ]
    assert blocks[1][0] == LONG and SHOWN in net["text"] and net["text"].count("-0.125 ms") == len(CHOICES)


def test_operations_and_engines(undrawn):
    text = html(findings())
    cells = texts(text, "td", "th")
    kinds = [cells[i : i + 6] for i, cell in enumerate(cells) if cell in ("FusedConv2d", "FusedLinear")]
    assert ["FusedConv2d", "onednn", "1", "0.500", "1.250", "67 %"] in kinds
    assert ["FusedLinear", "native", "1", "0.250", "0.500", "33 %"] in kinds
    assert ["openvino", "1.31x"] in [cells[i : i + 2] for i in range(len(cells))]


def test_every_check_has_its_error(undrawn):
    cells = texts(html(findings()), "td")
    assert cells.count("9.7e-16") == cells.count("1.4e-15") == len(CHOICES)
    assert "8.7e-16" in cells and cells.count("3.2e-07") == 2
    unverified = results()
    unverified["accelerated"] = {
        name: document | {"max_relative_error": None} for name, document in unverified["accelerated"].items()
    }
    assert texts(html(findings(results=unverified)), "td").count("not verified") == 2


@pytest.mark.parametrize(
    ("lacking", "left_out"),
    [
        ({"search": None}, ["front"]),
        ({"history": [], "seconds": {}}, ["training"]),
        ({"merge": None}, []),  # the accelerated nets were checked, too
        ({"table": None}, ["front"]),
        ({"feeding": None}, []),
        ({"results": {k: v for k, v in results().items() if k != "accelerated"}}, ["operations"]),
        ({"choices": None}, ["net"]),
    ],
)
def test_a_run_that_lacks_something(lacking, left_out, undrawn):
    assert sections(html(findings(**lacking))) == [name for name in WHOLE if name not in left_out]


def test_results_of_an_earlier_version():
    new = ("metric", "versions", "budget", "merge", "accelerated", "chosen_by")
    old = {name: value for name, value in results().items() if name not in new}
    text = html(findings(results=old, merge={k: v for k, v in MERGE.items() if k != "blocks"}))
    assert sections(text) == [name for name in WHOLE if name != "operations"]
    assert "Budget" not in text


def test_runs_that_are_not_finished():
    whole = findings()
    assert sections(html(started())) == ["progress", "reproduce"]
    trained = started("baseline", history=whole.history[:3], seconds={"baseline": 4000.0})
    assert sections(html(trained)) == ["progress", "training", "reproduce"]
    assert "1 h 6 min" in html(trained) and "Next: supernet." in html(trained)
    searched = started("baseline", "supernet", "search", table=whole.table, search=whole.search)
    assert sections(html(searched)) == ["progress", "front", "reproduce", "machine"]
    chosen = started(
        "baseline", "supernet", "search", table=whole.table, choices=CHOICES, search=whole.search
    )
    assert sections(html(chosen)) == ["progress", "front", "net", "reproduce", "machine"]


def test_images_with_and_without_classes(undrawn):
    feeding = {"classes": [], "input_size": [3, 64, 64], "mean": [0.5], "std": [0.25]}
    assert "classes" not in texts(html(findings(feeding=feeding)), "dt")
    assert texts(html(findings()), "dd")[-1] == f"2: cat, {SHOWN}"


def test_how_to_repeat_it(undrawn):
    (text,) = [t for t in texts(html(findings()), "code") if "depthfuse prune" in t]
    assert (
        "--config=runs/prune/config.yaml --out runs/prune-again" in text
        and "depthfuse bench runs/prune" in text
    )
    spaced = PruneConfig(out=Path("my runs/$1"))
    (text,) = [t for t in texts(html(findings(config=spaced)), "code") if "depthfuse prune" in t]
    assert "--config='my runs/$1/config.yaml' --out 'my runs/$1-again'" in text
    changed = html(findings())
    assert "search.speedup" in texts(changed, "dt") and "search.population" not in texts(changed, "dt")
    own = html(findings(given=("task", "data")))
    assert not [t for t in texts(own, "code") if "depthfuse prune" in t] and "its own task and data" in own


def test_a_loss_that_is_no_number_and_a_baseline_that_computes_nothing():
    history = [{"stage": "baseline", "iteration": i, "loss": None if i else 1.0} for i in range(3)]
    rows = [row | {"macs": 0.0} for row in results()["rows"]]
    assert sections(html(findings(history=history, results=results(rows=rows)))) == WHOLE


def test_finalists(undrawn):
    """In the order of the scores; the chosen one stands out, and one that is still to be trained says so."""
    cells = texts(html(findings()), "td", "th")
    first = cells.index("0.0625")
    assert cells[first + 1].endswith("x") and cells[first + 2].endswith("dense")
    assert "0.0312" in cells and "not trained yet" in cells
    assert "0.0625" not in texts(html(findings(finalists=None)), "td", "th")
