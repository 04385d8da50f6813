"""report.html of a run: what came out, how, and how sure that is, on one page that needs nothing but itself.

A run that is not finished, or of an earlier version, gives a page without what it has not.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import Element

from depthfuse._version import __version__
from depthfuse.config import PruneConfig, to_dict, to_yaml
from depthfuse.reporting.markup import (
    Piece,
    code,
    facts,
    folded,
    grid,
    page,
    paragraph,
    section,
    table,
    tag,
    tiles,
)
from depthfuse.reporting.operations import by_kind, of_engines, one_by_one
from depthfuse.runs import figures
from depthfuse.runs.found import Findings
from depthfuse.runs.report import FOOTNOTE, budget_missed, comparison_rows, metric_of, remarks
from depthfuse.spec import KEEP

FILE = "report.html"

# What becomes of a block, by its candidate; every other candidate merges it.
_KINDS = {KEEP: "kept", "drop": "dropped", "attention": "reduced"}
_KEY = {
    "kept": "kept as it was",
    "merged": "merged into one layer, in the way that is named",
    "reduced": "its attention removed",
    "dropped": "dropped: nothing is left of it",
}


def html(found: Findings) -> str:
    """The page as text."""
    sections = [
        _progress(found),
        _results(found),
        _front(found),
        _net(found),
        _training(found),
        _operations(found),
        _checks(found),
        _reproduce(found),
        _machine(found),
    ]
    return page("depthfuse run", _name(found), _intro(found), sections)


def _name(found: Findings) -> str:
    return found.config.model if found.results is None else found.results["model"]


def _intro(found: Findings) -> list[Piece]:
    if found.results is None:
        return [paragraph("This run is not finished: the page shows what is there so far.", kind="lead")]
    results, conditions = found.results, found.results["conditions"]
    head, *rows = comparison_rows(results)
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    before, now = cells["baseline accelerated"], cells["merged accelerated"]
    raw = {row["net"]: row for row in results["rows"]}
    gained = raw["merged accelerated"]["top1"] - raw["baseline"]["top1"]
    metric = metric_of(results)
    where = [conditions["device"], conditions.get("dtype"), f"input {_size(conditions['input_size'])}"]
    if conditions.get("batch_size"):
        where.append(f"batch {conditions['batch_size']}")
    return [
        paragraph(" · ".join(filter(None, where)), kind="lead"),
        tiles(
            [
                ("Speed-up", now["speed-up*"], "over the accelerated baseline"),
                (
                    "Latency",
                    f"{now['latency ms']} ms",
                    f"{before['latency ms']} ms before, accelerated; {cells['baseline']['latency ms']} ms as it was",
                ),
                (
                    metric[0].upper() + metric[1:],
                    f"{now[f'{metric} %']} %",
                    f"{cells['baseline'][f'{metric} %']} % before ({gained:+.2f} points)",
                ),
                ("Parameters", now["parameters"], _beside(raw, "parameters", before["parameters"])),
                ("MACs", now["MACs"], _beside(raw, "macs", before["MACs"])),
            ]
        ),
        _verdict(results),
    ]


def _beside(raw: Mapping[str, Mapping[str, Any]], key: str, before: str) -> str:
    was, now = raw["baseline"][key], raw["merged accelerated"][key]
    return f"{before} before ({100 * (now / was - 1):+.0f} %)" if was else f"{before} before"


def _verdict(results: Mapping[str, Any]) -> Element | None:
    budget = results.get("budget")
    if budget is None or budget["met"] is None:
        return None
    if missed := budget_missed(results):
        return paragraph(tag("span", "Budget missed", class_="badge bad"), f" {missed}.")
    wanted = f" search.{budget['name']}={budget['wanted']:g} was asked for."
    return paragraph(tag("span", "Budget met", class_="badge good"), wanted)


def _size(size: list[int]) -> str:
    return "×".join(map(str, size))


def _progress(found: Findings) -> Element | None:
    if found.results is not None:
        return None
    stages = [
        tag("li", f"{stage}: done" if done else stage, class_="done" if done else None)
        for stage, done in found.done.items()
    ]
    following = next(stage for stage, done in found.done.items() if not done)
    return section(
        "progress",
        "Progress",
        tag("ul", *stages, class_="stages"),
        paragraph(f"Next: {following}. The command that started the run goes on with it."),
    )


def _results(found: Findings) -> Element | None:
    results = found.results
    if results is None:
        return None
    head, *rows = comparison_rows(results)
    best = [index for index, row in enumerate(rows) if row[0] == "merged accelerated"]
    return section(
        "results",
        "Results",
        table(head, rows, "All forms of the net, measured side by side", strong=best),
        grid(
            figures.comparison(results).piece(),
            tag("div", *(paragraph(text, kind="note") for text in (FOOTNOTE, *remarks(results)))),
        ),
    )


def _front(found: Findings) -> Element | None:
    if found.search is None or found.table is None or not found.search.front:
        return None
    metric, unit = found.task.metric, found.table.unit
    drawn = figures.front(found.search, found.table, _name(found), metric, found.choices)
    whole = found.table.whole
    cells = [
        [
            f"{point.cost:.4g}",
            f"{whole / point.cost:.2f}x" if point.cost else "",
            f"{point.top1:.2f}",
            str(len(point.choices)),
        ]
        for point in found.search.front
    ]
    chosen = [
        i for i, p in enumerate(found.search.front) if found.choices and dict(p.choices) == found.choices
    ]
    head = [f"cost {unit}", "speed-up", f"{metric} %, held out", "pruned"]
    pruned = [[row[0], _pruned(point.choices)] for row, point in zip(cells, found.search.front, strict=True)]
    return section(
        "front",
        "What the search found",
        grid(
            drawn.piece(),
            table(head, cells, f"The {len(cells)} subnets on the front, cheapest first", strong=chosen),
        ),
        folded("What each of them prunes", table([head[0], "choices"], pruned, "Choices", strong=chosen)),
        _finalists(found),
    )


def _finalists(found: Findings) -> Element | None:
    if not found.finalists:
        return None
    assert found.table is not None
    cells = [
        [
            f"{float(row['divergence']):.4f}" if "divergence" in row else "not trained yet",
            f"{found.table.whole / found.table.cost(row['choices']):.2f}x",
            _pruned(row["choices"]),
        ]
        for row in found.finalists
    ]
    chosen = [i for i, row in enumerate(found.finalists) if row["choices"] == found.choices]
    return table(
        ["divergence", "speed-up by the table", "what it prunes"],
        cells,
        "The finalists, best before training first, and how far their outputs are from the original net's after a "
        "short training",
        strong=chosen,
    )


def _pruned(choices: Mapping[str, str]) -> str:
    return ", ".join(f"{path} {name}" for path, name in choices.items()) or "nothing pruned"


def _net(found: Findings) -> Element | None:
    choices = found.choices
    blocks = found.results["blocks"] if found.results else found.table.saved if found.table else {}
    if choices is None or not blocks:
        return None
    kinds = {path: _KINDS.get(choices.get(path, KEEP), "merged") for path in blocks}
    counts = {kind: list(kinds.values()).count(kind) for kind in _KEY}
    key = [
        tag("li", tag("span", class_=f"swatch is {kind}"), f"{count} {_KEY[kind]}")
        for kind, count in counts.items()
        if count
    ]
    cells = [_block(found, path, choices.get(path, KEEP), kinds[path]) for path in blocks]
    left = len(blocks) - counts["dropped"]
    return section(
        "net",
        "The net before and after",
        paragraph(
            f"The {len(blocks)} blocks that can be pruned, in order; {counts['kept']} stay as they were and {left} are "
            "left in all. Above what a block was, below what became of it."
        ),
        tag("ul", *key, class_="key"),
        tag("ol", *cells, class_="net"),
    )


def _block(found: Findings, path: str, candidate: str, kind: str) -> Element:
    saved = "\u00a0"  # so that all blocks of a row stand on one line
    if candidate != KEEP and found.table is not None and candidate in found.table.saved.get(path, {}):
        saved_ms, unit = found.table.saved[path][candidate], found.table.unit
        saved = f"{-saved_ms:+.3f} {unit}"
    words = candidate if kind == "merged" else kind
    return tag(
        "li",
        tag("span", path, class_="path"),
        tag("span", class_="was", aria_hidden="true"),
        tag("span", class_="then", aria_hidden="true"),
        tag("span", tag("span", words), class_=f"is {kind}"),
        tag("span", saved, class_="saved"),
    )


def _training(found: Findings) -> Element | None:
    stages = figures.stages_of(found.history)
    drawn = [figures.stage(name, rows, found.task).piece() for name, rows in stages.items()]
    times = facts({f"{name}, wall time": _duration(seconds) for name, seconds in found.seconds.items()})
    return section("training", "Training", grid(*drawn), times)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"


def _operations(found: Findings) -> Element | None:
    documents = (found.results or {}).get("accelerated", {})
    now = documents.get("merged accelerated")
    if now is None:
        return None
    whole = ""
    if now["whole"]:
        whole = f" As a whole it runs on: {now['whole']}; the sum of its operations is not its time."
    others = [
        one_by_one(document["operations"], f"All operations, {name}") for name, document in documents.items()
    ]
    return section(
        "operations",
        "Where the time goes",
        paragraph(
            f"The merged net as {now['executor']}: {now['fused']} fused operations that absorbed {now['absorbed']} "
            f"layers, {now['unfused']} as they were. They are timed one after another.{whole}"
        ),
        by_kind(now["operations"]),
        of_engines(now["engines"]),
        *others,
    )


def _checks(found: Findings) -> Element | None:
    rows: list[list[Piece]] = []
    if found.merge is not None:
        rows.append(["merged net against the unmerged, float64", "output", f"{found.merge['output']:.1e}"])
        for block in found.merge.get("blocks", []):
            for part in ("border", "interior"):
                rows.append([f"{block['block']} ({block['candidate']})", part, f"{block[part]:.1e}"])
    for name, document in (found.results or {}).get("accelerated", {}).items():
        error = document["max_relative_error"]
        checked = "not verified" if error is None else f"{error:.1e}"
        rows.append([f"{name} against the same net as it was", "output", checked])
    head = ["check", "where", "largest relative error"]
    summary = None if found.merge is None else paragraph(f"Check of the merge: {found.merge['summary']}.")
    whole = [row for row in rows if row[1] == "output"]
    blocks = [row for row in rows if row[1] != "output"]
    return section(
        "checks",
        "Checks",
        summary,
        table(head, whole, "Whole nets"),
        folded(f"Block by block ({len(blocks) // 2})", table(head, blocks, "Merged blocks in float64"))
        if blocks
        else None,
    )


def _reproduce(found: Findings) -> Element | None:
    if found.given:
        command = (
            "This run was started from Python with its own "
            f"{' and '.join(found.given)}, which no file holds: call depthfuse.prune with them and this configuration."
        )
        how: Piece = paragraph(command)
    else:
        how = code(_commands(found))
    changed = _changed(to_dict(found.config), to_dict(PruneConfig()))
    return section(
        "reproduce",
        "How to repeat it",
        paragraph("Where it was started, as paths in the configuration may begin there:")
        if not found.given
        else None,
        how,
        *_titled("Settings that differ from the defaults", facts(changed)),
        folded("The whole configuration (config.yaml)", code(to_yaml(found.config))),
    )


def _commands(found: Findings) -> str:
    out = str(found.config.out)
    told = {
        f"depthfuse prune --config={shlex.quote(f'{out}/config.yaml')} --out {shlex.quote(f'{out}-again')}": (
            "the same run once more"
        )
    }
    if found.done["merge"]:
        folder = shlex.quote(out)
        told |= {
            f"depthfuse bench {folder}": "its merged net beside other engines",
            f"depthfuse accelerate {folder} --out fast.safetensors": "its merged net, fast, as a file",
        }
    return "\n".join(f"# {about}\n{command}" for command, about in told.items())


def _changed(here: Mapping[str, Any], there: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings of `here` with other values than in `there`, by their names on the command line."""
    changed: dict[str, str] = {}
    for name, value in here.items():
        if isinstance(value, Mapping):
            changed |= _changed(value, there[name], f"{prefix}{name}.")
        elif value != there[name]:
            changed[prefix + name] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return changed


def _machine(found: Findings) -> Element | None:
    results = found.results or {}
    conditions = results.get("conditions") or (found.table.conditions if found.table else {})
    told = {name.replace("_", " "): value for name, value in conditions.items() if name != "predicted"}
    fed: dict[str, Any] = {}
    if found.feeding is not None:
        names = found.feeding["classes"]
        fed = {
            "data": found.config.data.data,
            "input size": _size(found.feeding["input_size"]),
            "mean of channels": [f"{value:.4g}" for value in found.feeding["mean"]],
            "spread of channels": [f"{value:.4g}" for value in found.feeding["std"]],
            "classes": f"{len(names)}: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}"
            if names
            else None,
        }
    versions = {"depthfuse": __version__, **results["versions"]} if "versions" in results else {}
    given = facts(fed)
    measured = facts({name: _size(v) if name == "input size" else v for name, v in told.items()})
    made = facts(versions)
    return section(
        "machine",
        "Machine, versions, data",
        *(
            _titled("Measured with", measured)
            + _titled("Versions", made)
            + _titled("What the net is fed", given)
        ),
    )


def _titled(title: str, piece: Element | None) -> list[Piece]:
    return [] if piece is None else [tag("h3", title), piece]
