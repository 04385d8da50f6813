"""A front with intervals, and nets picked from it: nothing is trained or scored again, and a kill changes no bit."""

import csv
import dataclasses
import json
import shutil
import sys

import pytest
import torch
from fake_clock import Clock
from killed_runs import assert_same_weights, kill_when_there
from read_pages import Read
from small_run import CONFIG

from depthfuse.checkpoint import load_json
from depthfuse.costs.table import CostTable
from depthfuse.errors import BudgetError, ConfigError
from depthfuse.runs import report
from depthfuse.runs.pick import pick
from depthfuse.runs.run import Run, prune
from depthfuse.searching.journal import Journal, _digest
from depthfuse.spec import SubnetSpec
from depthfuse.training.evaluation import evaluate

HELD_OUT = 60  # of 640 training images, as many of each of the ten classes
# a baseline that has learned something, so that pruning costs something
SETTINGS = dataclasses.replace(
    CONFIG,
    baseline=dataclasses.replace(CONFIG.baseline, epochs=4),
    search=dataclasses.replace(CONFIG.search, blocks=None, strategy="milp", front=3, best=2),
)


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    """A search without a budget. Its latencies are counted, not measured: a busy machine changes nothing."""
    out = tmp_path_factory.mktemp("explored") / "run"
    with pytest.MonkeyPatch.context() as patch:
        Clock().install(patch)
        prune(dataclasses.replace(SETTINGS, out=out), "search")
    return out


def rows_of(folder):
    return list(csv.DictReader((folder / "front.csv").open()))


def scored(folder):
    book = Journal(folder / "search.jsonl")
    return [(choices, score, book.pair(choices)) for choices, score in book.rows.values()]


def test_a_search_leaves_a_page_with_its_front(explored):
    sections = {section["id"] for section in Read((explored / "report.html").read_text()).all("section")}
    assert sections == {"progress", "front", "training", "reproduce", "machine"}


def test_each_score_has_its_interval(explored):
    rows = rows_of(explored)
    assert rows
    for row in rows:
        assert row.pop("divergence_holdout") == ""  # not what was asked for
        numbers = {name: float(value) for name, value in row.items() if name != "choices"}
        assert numbers["images_holdout"] == HELD_OUT
        assert 0 <= numbers["top1_low"] < numbers["top1_holdout"] + 1e-9 and numbers["top1_high"] <= 100
        assert numbers["points_lost_low"] < numbers["points_lost_high"]
        assert numbers["top1_low"] <= numbers["top1_holdout"] <= numbers["top1_high"]
    whole = next(score for choices, score, _ in scored(explored) if not choices)
    for _, score, pair in scored(explored):
        assert pair.images == HELD_OUT
        assert 100.0 * (pair.lost - pair.gained) / HELD_OUT == pytest.approx(whole.top1 - score.top1)
    assert next(pair for choices, _, pair in scored(explored) if not choices)[1:] == (0, 0)


def test_a_search_that_goes_on_counts_the_same(explored, tmp_path, monkeypatch):
    """What the unpruned net answers right is kept in memory alone, and found again."""
    Clock().install(monkeypatch)
    out = tmp_path / "run"
    shutil.copytree(explored, out, ignore=shutil.ignore_patterns("front.csv"))
    lines = (out / "search.jsonl").read_text().splitlines(keepends=True)
    (out / "search.jsonl").write_text("".join(lines[: len(lines) // 2]))
    prune(dataclasses.replace(SETTINGS, out=out), "search")
    assert (out / "search.jsonl").read_text() == "".join(lines)
    assert (out / "front.csv").read_text() == (explored / "front.csv").read_text()


def test_journals_of_before_have_no_intervals(explored, tmp_path):
    old = []
    for line in (explored / "search.jsonl").read_text().splitlines():
        row = {name: value for name, value in json.loads(line).items() if name in ("choices", "top1", "loss")}
        old.append(json.dumps(row | {"sha256": _digest(row)}) + "\n")
    (tmp_path / "search.jsonl").write_text("".join(old))
    book = Journal(tmp_path / "search.jsonl")
    assert len(book.rows) == len(old) and not book.pairs


def fastest_within(folder, points):
    table = CostTable.load(folder / "latency.json")
    whole = next(score for choices, score, _ in scored(folder) if not choices)
    fine = [choices for choices, score, _ in scored(folder) if choices and score.top1 >= whole.top1 - points]
    return min(fine, key=table.cost)


def test_picked_by_speed_by_points_and_by_blocks(explored, monkeypatch):
    Clock().install(monkeypatch)
    journal = (explored / "search.jsonl").read_bytes()
    row = next(row for row in rows_of(explored) if row["choices"])
    speedup = float(row["speedup"]) - 0.01
    out = pick(explored, speedup=speedup).dir
    assert out == explored / f"pick-speedup-{speedup:g}" and (out / "report.md").exists()
    table = CostTable.load(explored / "latency.json")
    assert table.whole / table.cost(SubnetSpec.load(out / "subnet.json").mapping()) >= speedup
    for name in ("baseline.safetensors", "supernet.safetensors", "search.jsonl", "latency.json"):
        assert (out / name).read_bytes() == (explored / name).read_bytes()
    assert not (out / "history_supernet.json").exists()  # nothing but the fine-tuning was trained
    picked = pick(explored, points=100.0).dir
    fastest = table.cost(fastest_within(explored, 100.0))  # several may be as fast
    assert table.cost(SubnetSpec.load(picked / "subnet.json").mapping()) == fastest
    results = load_json(picked / "results.json")
    rows = {row["net"]: row["top1"] for row in results["rows"]}
    lost = rows["baseline"] - rows["merged accelerated"]
    assert results["budget"] == {
        **{"name": "points", "unit": "points", "wanted": 100.0, "reached": lost, "met": True}
    }
    assert ["budget (met)", "loses <= 100.00", "", "", "", ""] in report.comparison_rows(results)
    assert (explored / "search.jsonl").read_bytes() == journal


def test_killed_on_the_way_it_ends_with_the_same_bits(explored, tmp_path, monkeypatch):
    Clock().install(monkeypatch)
    blocks = next(len(choices) for choices, *_ in scored(explored) if len(choices) > 1)
    command = [
        sys.executable,
        "-m",
        "depthfuse.cli",
        "pick",
        explored,
        "--blocks",
        str(blocks),
        "--out",
        tmp_path / "out",
    ]
    kill_when_there(command, tmp_path / "out" / "finetune.state")
    assert not (tmp_path / "out" / "finetune.safetensors").exists()
    resumed = pick(explored, blocks=blocks, out=tmp_path / "out").dir
    whole = pick(explored, blocks=blocks, out=tmp_path / "whole").dir
    assert len(SubnetSpec.load(whole / "subnet.json").choices) == blocks
    assert (resumed / "subnet.json").read_text() == (whole / "subnet.json").read_text()
    assert_same_weights(resumed, whole, ("finetune", "merged"))


def test_what_nothing_meets_is_told_with_the_nearest_offers(explored):
    before = sorted(explored.iterdir())
    with pytest.raises(
        BudgetError, match=r"the fastest reachable takes .*Nearest: \d blocks?, \d\.\d\dx faster, "
    ):
        pick(explored, speedup=1000.0)
    with pytest.raises(
        BudgetError, match=r"asked to prune 9 blocks; possible: 1 to \d.*Nearest: \d blocks?, "
    ):
        pick(explored, blocks=9)
    with pytest.raises(
        BudgetError, match=r"none of the \d+ scored subnets meets the budget. Nearest: .*(loses|gains)"
    ):
        pick(explored, points=-100.0)
    assert sorted(explored.iterdir()) == before


def test_a_wish_is_one_and_a_run_has_been_searched(explored, tmp_path):
    with pytest.raises(
        ConfigError, match=r"exactly one of speedup, points, blocks; got none. .* offers: \d block"
    ):
        pick(explored)
    with pytest.raises(ConfigError, match="got speedup=1.2 and blocks=2"):
        pick(explored, speedup=1.2, blocks=2)
    with pytest.raises(ConfigError, match=r"holds no finished search \(front.csv\): run `depthfuse search"):
        pick(tmp_path, blocks=1)


def test_points_are_for_picking_alone(tmp_path):
    search = dataclasses.replace(CONFIG.search, blocks=None, points=1.0)
    with pytest.raises(
        BudgetError, match="picks among subnets that were scored before: .*depthfuse pick RUN"
    ):
        prune(dataclasses.replace(CONFIG, out=tmp_path / "run", search=search))


def test_the_counts_are_those_of_the_scores(explored, monkeypatch):
    """`evaluate` shows every batch to who watches, once."""
    Clock().install(monkeypatch)
    run = Run(dataclasses.replace(SETTINGS, out=explored), "search")
    seen = []
    score = evaluate(
        run.baseline(), run.data.holdout_loader(), watch=lambda o, t: seen.append(run.task.right(o, t))
    )
    assert 100.0 * float(torch.cat(seen).double().mean()) == pytest.approx(score.top1)
