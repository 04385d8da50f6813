"""Summaries of what ran on the MI100's code, in Markdown."""

from __future__ import annotations

from collections import Counter

from benchmarks.gfx908 import blocks
from benchmarks.gfx908.operators import RIGHT


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def _right(rows: list[dict], title: str, names: list[str]) -> str:
    """A table of how many of the rows are right, by their names and by dtype and version of Triton."""
    columns = sorted({(row["triton"], row["dtype"]) for row in rows})
    counts = Counter((n, (r["triton"], r["dtype"])) for n, r in zip(names, rows, strict=True))
    right = Counter(
        (n, (r["triton"], r["dtype"])) for n, r in zip(names, rows, strict=True) if r["outcome"] == RIGHT
    )
    body = [
        (n, *(f"{right[n, c]} of {counts[n, c]}" if counts[n, c] else "-" for c in columns))
        for n in dict.fromkeys(names)
    ]
    return _table((title, *(f"{dtype}, Triton {version}" for version, dtype in columns)), body)


def operators(rows: list[dict]) -> str:
    """Right cases of all, for each operator, dtype and version of Triton."""
    return (
        "Runs of each operator on gfx908 code that came out right: integers bit for bit, reals within the float64\n"
        "bound.\n\n" + _right(rows, "operator", [f"`{row['op']}`" for row in rows]) + _faults(rows)
    )


def networks(rows: list[dict]) -> str:
    """Right launches of all, for each network and dtype."""
    return (
        "Operators of networks at batch 1 and 224 x 224, merged and not, of which a few workgroups ran on gfx908 code\n"
        "and came out right.\n\n" + _right(rows, "network", [row["network"] for row in rows]) + _faults(rows)
    )


def models(rows: list[dict]) -> str:
    """A line for each network."""
    names = ("network", "blocks", "dtype", "image", "launches", "workgroups", "error", "outcome")
    body = [tuple(row[name] for name in names) for row in rows]
    return (
        "Whole networks, planned by `accelerate` for the MI100 and run on gfx908 code. Error: the largest difference\n"
        "from float64, as a share of the largest output.\n\n" + _table(names, body)
    )


def units(rows: list[dict]) -> str:
    """For each operator and batch which unit limits how many launches; and the farthest from the roofline."""
    groups = dict.fromkeys((row["op"], row["batch"], row["dtype"]) for row in rows)
    body = []
    for op, batch, dtype in groups:
        mine = [r for r in rows if (r["op"], r["batch"], r["dtype"]) == (op, batch, dtype)]
        busiest = Counter(row["busiest"] for row in mine)
        shares = sorted(float(row["share"]) for row in mine)
        conflicts = max(float(row["lds_conflicts"]) for row in mine)
        limits = ", ".join(f"{unit} {count}" for unit, count in busiest.most_common())
        body.append((f"`{op}`", batch, dtype, len(mine), limits, f"{shares[0]} to {shares[-1]}", conflicts))
    head = (
        "operator",
        "batch",
        "dtype",
        "launches",
        "busiest unit",
        "share of the roofline",
        "worst LDS conflicts",
    )
    least = sorted(rows, key=lambda row: float(row["share"]))[:20]
    names = (
        "op",
        "batch",
        "dtype",
        "shape",
        "vector",
        "matrix",
        "lds",
        "cache",
        "lds_conflicts",
        "busiest",
        "share",
    )
    return (
        "Simulated, from counts of executed instructions and without latencies: at best this share of the roofline is\n"
        "possible with the code as compiled for gfx908.\n\n"
        + _table(head, body)
        + "\nSums over the layers of whole networks, an operator a launch:\n\n"
        + _totals(rows, "bound_us")
        + "\nThe launches that are farthest from the roofline, with the clocks of each unit a workgroup:\n\n"
        + _table(names, [tuple(row[name] for name in names) for row in least])
    )


def _totals(rows: list[dict], time: str) -> str:
    """Sums over the layers of whole networks."""
    totals = []
    for key in dict.fromkeys((row["network"], row["batch"], row["dtype"]) for row in rows):
        mine = [r for r in rows if (r["network"], r["batch"], r["dtype"]) == key]
        sums = [
            sum(float(row[name]) * int(row[layers]) for row in mine)
            for layers in ("plain", "merged")
            for name in (time, "roofline_us")
        ]
        totals.append((*key, *(round(total) for total in sums)))
    head = ("network", "batch", "dtype", "plain, us", "its roofline, us", "merged, us", "its roofline, us")
    return _table(head, totals)


def times(rows: list[dict]) -> str:
    """Whole networks, operators, and the launches that are farthest from the roofline."""
    body = []
    for op, batch, dtype in dict.fromkeys((row["op"], row["batch"], row["dtype"]) for row in rows):
        mine = [r for r in rows if (r["op"], r["batch"], r["dtype"]) == (op, batch, dtype)]
        shares = sorted(float(row["share"]) for row in mine)
        body.append((f"`{op}`", batch, dtype, len(mine), shares[0], shares[len(shares) // 2], shares[-1]))
    head = ("operator", "batch", "dtype", "launches", "least share of the roofline", "median", "most")
    least = sorted(rows, key=lambda row: float(row["share"]))[:20]
    names = ("op", "batch", "dtype", "shape", "simulated_us", "share", "vector", "matrix", "lds", "cache")
    return (
        "*Simulated* (benchmarks/gfx908/cycles.py): no MI100 has been timed. Sums over the layers of whole networks,\n"
        "an operator a launch, launches costing nothing:\n\n"
        + _totals(rows, "simulated_us")
        + "\nHow many blocks must be merged, those first that save most:\n\n"
        + blocks.table(rows)
        + "\n"
        + _table(head, body)
        + "\nThe launches that are farthest from the roofline, with the share of the time in which units are busy:\n\n"
        + _table(names, [tuple(row[name] for name in names) for row in least])
    )


def tiles(rows: list[dict]) -> str:
    """For each launch the heuristic's tile and the fastest, the worst choices first."""
    body = []
    for key in dict.fromkeys((r["network"], r["batch"], r["op"], r["dtype"], r["shape"]) for r in rows):
        mine = [r for r in rows if (r["network"], r["batch"], r["op"], r["dtype"], r["shape"]) == key]
        best = min(mine, key=lambda row: float(row["simulated_us"]))
        for chosen in (row for row in mine if row["chosen"] == "True"):
            slower = float(chosen["simulated_us"]) / float(best["simulated_us"])
            named = [_config(row["config"]) for row in (chosen, best)]
            figures = chosen["simulated_us"], best["simulated_us"], best["share"], round(slower, 2)
            body.append((*key[:4], key[4], *named, *figures))
    body.sort(key=lambda row: -row[-1])
    head = ("network", "batch", "op", "dtype", "shape", "the heuristic's", "fastest")
    return (
        "*Simulated* (benchmarks/gfx908/cycles.py): no MI100 has been timed. The heuristic's configuration and the\n"
        "fastest of those that were tried:\n\n"
        + _table((*head, "us", "fastest, us", "its share of the roofline", "ratio"), body)
    )


def _config(text: str) -> str:
    """The sizes of a configuration, and what is not usual in it."""
    fields = dict(part.split("=") for part in text.split())
    sizes = "x".join(
        value for name, value in fields.items() if name.startswith(("block", "patch", "interleave"))
    )
    parts = f", {fields['splits']} parts" if fields.get("splits", "1") != "1" else ""
    return f"{sizes}, {fields['num_warps']} waves{parts}"


def compared(before: list[dict], after: list[dict]) -> str:
    """Networks and launches of two tables of `times`, of those that both have."""
    key = ("network", "batch", "op", "dtype", "shape")
    old = {tuple(row[name] for name in key): row for row in before}
    pairs = [(old[k], row) for row in after if (k := tuple(row[name] for name in key)) in old]
    networks = []
    for group in dict.fromkeys((row["network"], row["batch"], row["dtype"]) for _, row in pairs):
        mine = [p for p in pairs if (p[1]["network"], p[1]["batch"], p[1]["dtype"]) == group]
        cells = [*group]
        for layers in ("plain", "merged"):
            sums = [sum(float(p[n]["simulated_us"]) * int(p[1][layers]) for p in mine) for n in (0, 1)]
            cells += [round(sums[0]), round(sums[1]), round(sums[0] / sums[1], 2)]
        networks.append(tuple(cells))
    for batch, dtype in dict.fromkeys((row[1], row[2]) for row in networks):
        mine = [row for row in networks if (row[1], row[2]) == (batch, dtype)]
        cells = ["all", batch, dtype]
        for first in (3, 6):
            sums = [sum(row[first + n] for row in mine) for n in (0, 1)]
            cells += [*sums, round(sums[0] / sums[1], 2)]
        networks.append(tuple(cells))
    gains = sorted(pairs, key=lambda p: float(p[1]["simulated_us"]) - float(p[0]["simulated_us"]))
    launches = [
        (
            *(row[name] for name in ("op", "batch", "shape")),
            _blocks(first["tile"]),
            _blocks(row["tile"]),
            first["simulated_us"],
            row["simulated_us"],
            row["share"],
        )
        for first, row in gains
        if abs(float(first["simulated_us"]) / float(row["simulated_us"]) - 1) > 0.02
    ]
    head = ("network", "batch", "dtype", "plain, us", "now", "ratio", "merged, us", "now", "ratio")
    columns = (
        "op",
        "batch",
        "shape",
        "tile before",
        "tile now",
        "us before",
        "us now",
        "share of the roofline",
    )
    return (
        "*Simulated* (benchmarks/gfx908/cycles.py), before and after: no MI100 has been timed. Sums over the layers\n"
        "of whole networks, an operator a launch, launches costing nothing:\n\n"
        + _table(head, networks)
        + "\nLaunches whose time changes by more than 2 %, by what they gain:\n\n"
        + _table(columns, launches)
    )


def _blocks(tile: str) -> str:
    """The sizes alone."""
    values = dict(part.split("=", 1) for part in tile.split())
    sizes = [value for name, value in values.items() if name.startswith(("BLOCK", "PATCH"))]
    splits = f", {values['SPLITS']} parts" if values.get("SPLITS", "1") != "1" else ""
    return f"{'x'.join(sizes)}, {values.get('num_warps', '?')} waves{splits}"


def validation(rows: list[dict]) -> str:
    """A line for each published figure."""
    body = []
    for row in rows:
        percent = f"{100 * float(row['deviation']):+.0f} %"
        body.append(
            (
                row["what"],
                row["unit"],
                row["published"],
                row["simulated"],
                percent,
                row["source"],
                row["remark"],
            )
        )
    head = ("what", "unit", "published", "the model", "deviation", "source", "remark")
    return (
        "The model of `times` beside what is published of the MI100 (benchmarks/gfx908/validation.py).\n\n"
        + _table(head, body)
    )


def _faults(rows: list[dict]) -> str:
    wrong = [
        f"- {r['op']} {r.get('case') or r.get('shape')} {r['dtype']}: {r['outcome']}"
        for r in rows
        if r["outcome"] != RIGHT
    ]
    return "\n" + "\n".join(wrong) + "\n" if wrong else ""


def planted(rows: list[dict]) -> str:
    """Planted faults of each kind, how many were found, and by what."""
    body = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row["how"] for row in rows if row["kind"] == kind]
        ways = Counter(how for how in mine if how)
        body.append(
            (kind, len(mine), sum(ways.values()), ", ".join(f"{how} {n}" for how, n in ways.most_common()))
        )
    lost = [
        f"- {row['op']}, {row['case']}, {row['dtype']}, line {row['line']}: {row['kind']}: `{row['before']}`"
        for row in rows
        if not row["how"]
    ]
    text = "Faults planted in compiled kernels, one at a time.\n\n" + _table(
        ("planted", "times", "found", "as"), body
    )
    return text + ("\nNot found:\n\n" + "\n".join(lost) + "\n" if lost else "")
