"""The budget is checked on what was measured and counted of the finished net, and a miss is said everywhere."""

import pytest

from depthfuse.config import SearchConfig
from depthfuse.runs import report

ROWS = [
    {"net": "baseline", "top1": 90.0, "parameters": 1000, "macs": 500, "latency_ms": 2.0, "speedup": 0.9},
    {
        "net": "merged accelerated",
        "top1": 89.0,
        "parameters": 700,
        "macs": 400,
        "latency_ms": 1.5,
        "speedup": 1.26,
    },
]
CHOICES = {"layer1.0": "compact", "layer2.0": "dense"}


def results(budget):
    return {
        "model": "toy",
        "rows": ROWS,
        "budget": budget,
        "choices": CHOICES,
        "blocks": {block: ["compact", "dense"] for block in CHOICES},
        "conditions": {"device": "abacus"},
    }


@pytest.mark.parametrize(
    ("setting", "value", "reached", "met"),
    [
        ("speedup", 1.2, 1.26, True),
        ("speedup", 1.27, 1.26, True),  # no median repeats better than this
        ("speedup", 1.3, 1.26, False),
        ("speedup", 50.0, 1.26, False),
        ("budget_ms", 1.5, 1.5, True),
        ("budget_ms", 1.4, 1.5, False),
        ("macs", 0.8, 0.8, True),
        ("macs", 0.799, 0.8, False),
        ("parameters", 0.7, 0.7, True),
        ("parameters", 0.699, 0.7, False),
        ("blocks", 2, 2, True),
        ("blocks", 1, 2, False),
        ("blocks", 3, 2, False),
    ],
)
def test_each_budget_is_checked_on_the_finished_net(setting, value, reached, met):
    budget = report.check_budget(SearchConfig(**{setting: value}), ROWS, CHOICES, here=True)
    assert (budget["name"], budget["wanted"], budget["reached"], budget["met"]) == (
        setting,
        value,
        reached,
        met,
    )
    said = report.budget_missed(results(budget))
    text = report.markdown(results(budget))
    row = report.comparison_rows(results(budget))[-1]
    if met:
        assert said is None and "missed" not in text and row[0].startswith("budget (met)")
    else:
        assert f"search.{setting}={value:g} was asked for" in said and f"{reached:.4g}" in said
        assert said[1:] in text and row[0].startswith("budget (MISSED)")
    assert sum(map(bool, row)) == (1 if setting == "blocks" else 2)


def test_times_of_another_machine_are_not_checked_here():
    for search in (SearchConfig(speedup=50.0), SearchConfig(budget_ms=1e-9)):
        budget = report.check_budget(search, ROWS, {}, here=False)
        assert budget["reached"] is None and budget["met"] is None
        assert report.budget_missed(results(budget)) is None
        assert "cannot be checked here" in report.markdown(results(budget))
    assert (
        report.check_budget(SearchConfig(macs=0.1), ROWS, {}, here=False)["met"] is False
    )  # counts hold anywhere


def test_results_of_an_earlier_version_have_no_budget():
    old = results(None)
    del old["budget"]
    assert report.budget_missed(old) is None and len(report.comparison_rows(old)) == 1 + len(ROWS)
    assert "budget" not in report.markdown(old)
    assert report.check_budget(SearchConfig(), ROWS, {}, here=True) is None


def test_noisy_latencies_are_named():
    noisy = results(None) | {"noisy_latencies": ["layer1.0 (dense)"]}
    assert "NOISY" in report.markdown(noisy) and "layer1.0 (dense)" in report.markdown(noisy)
    assert "NOISY" not in report.markdown(results(None))
