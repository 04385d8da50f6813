"""Accelerate and verify many nets of timm, torchvision and transformers: which run, and how much of each is fused.

    python -m benchmarks.zoo                        # all of them, into benchmarks/results/zoo.csv and zoo.md
    python -m benchmarks.zoo --list                 # their names, and nothing else
    python -m benchmarks.zoo --only swin levit      # those whose names have that in them
    python -m benchmarks.zoo --again failed         # those that failed last time, or: all

Each net runs in a process of its own; its row is written as soon as it exists, and a second call goes on where the
first one was stopped. Random weights, one image of the net's own size, float32 on the CPU, tune="heuristic": no
speed is measured here. Verified means: compared with the model on the image and on another batch of other values,
within 1e-4 of the largest output (more only where the model's own float32 is as far from its float64). The share is of
all multiply-accumulates, in fused modules. Exit status 1 where a net fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.zoo.nets import ZOO, Net
from benchmarks.zoo.rows import RESULTS, read, write
from depthfuse.benching.bench import machine

COLUMNS = (
    *(
        "library",
        "kind",
        "net",
        "verified",
        "error",
        "gmacs",
        "share",
        "fused",
        "absorbed",
        "others",
        "whole",
    ),
    *("open_batch", "seconds", "engine_error", "engine_lacks", "reason"),
)
GOALS = {"CNN": 95.0, "ViT": 90.0}


def measure(net: Net, tune: str, limit_s: float) -> dict[str, object]:
    """The row of one net, from a process of its own."""
    row: dict[str, object] = {"library": net.library, "kind": net.kind, "net": net.name, "verified": False}
    command = [sys.executable, "-m", "benchmarks.zoo.one", net.key, tune]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {**row, "reason": f"more than {limit_s:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return {**row, "reason": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: dict[str, dict]) -> str:
    """The rows as Markdown, with a summary."""
    facts = machine(torch.device("cpu"))
    ran = [row for row in rows.values() if row["verified"] == "True"]
    errors = [float(row["engine_error"]) for row in ran if row["engine_error"]] or [0.0]
    lines = [
        "# Nets under `depthfuse.accelerate`",
        "",
        f"Written by `python -m benchmarks.zoo`: {facts['device']}, torch {facts['torch']}, timm {facts['timm']}, "
        'float32 on the CPU, random weights, `tune="heuristic"`. Verified: equal to the model on an image and on '
        "another batch. Share: of all multiply-accumulates, those in fused modules. Seconds: of `accelerate`, its "
        "verification included, on one core that other work may have shared.",
        "",
        f"**{len(ran)} of {len(rows)} verified.** "
        f"{sum(row['whole'] == 'True' for row in ran)} are captured as a whole, "
        f"{sum(row['open_batch'] == 'True' for row in ran)} take any batch with one plan. The native engine of the CPU "
        f"runs {sum(bool(row['engine_error']) for row in ran)} as a whole, with an error of at most "
        f"{max(errors):.0e} of the largest value; "
        "what it lacks for the others is in the last column but one.",
        "",
        "| kind | nets | median share | least share | reach the goal |",
        "|---|---|---|---|---|",
    ]
    for kind in ("CNN", "ViT", "hybrid"):
        shares = sorted(float(row["share"]) for row in ran if row["kind"] == kind)
        if not shares:
            continue
        goal = GOALS.get(kind)
        reached = "" if goal is None else f"{sum(s >= goal for s in shares)} reach {goal:.0f} %"
        lines.append(
            f"| {kind} | {len(shares)} | {shares[len(shares) // 2]:.1f} % | {shares[0]:.1f} % | {reached} |"
        )
    lines += [
        "",
        "| net | kind | error | GMACs | share | fused | absorbed | others | seconds | native engine "
        "| not fused, or why it failed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        name = row["net"] if row["library"] == "timm" else f"{row['library']}: {row['net']}"
        reason = str(row["reason"]).replace("|", "/")
        if row["verified"] != "True":
            lines.append(f"| {name} | {row['kind']} | failed | | | | | | | | {reason} |")
            continue
        engine = "runs it" if row["engine_error"] else str(row["engine_lacks"]).replace("|", "/")
        lines.append(
            f"| {name} | {row['kind']} | {float(row['error']):.1e} | {row['gmacs']} | {float(row['share']):.1f} % | "
            f"{row['fused']} | {row['absorbed']} | {row['others']} | {row['seconds']} | {engine} | {reason} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="nets whose names hold one of these"
    )
    parser.add_argument("--list", action="store_true", help="list the nets and stop")
    parser.add_argument("--again", choices=("failed", "all"), help="run these again")
    parser.add_argument("--tune", default="heuristic", help='as for accelerate (default: "heuristic")')
    parser.add_argument("--limit-s", type=float, default=300.0, help="for each net (default: 300)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of zoo.csv and zoo.md")
    options = parser.parse_args()
    nets = [net for net in ZOO if any(text in net.key for text in options.only)]
    if options.list:
        print("\n".join(f"{net.kind:7} {net.key}" for net in nets))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "zoo.csv"
    rows: dict[str, dict] = dict(read(path))
    for number, net in enumerate(nets, 1):
        known = rows.get(net.key)
        done = known is not None and (known["verified"] == "True" or options.again != "failed")
        if done and options.again != "all":
            continue
        row = {name: "" for name in COLUMNS} | measure(net, options.tune, options.limit_s)
        rows[net.key] = {name: str(value) for name, value in row.items()}
        write(path, COLUMNS, rows)
        found = f"{row['share']} % fused" if row["verified"] else f"FAILED {row['reason']}"
        print(f"[{number}/{len(nets)}] {net.key}: {found} {row['seconds']} s {row['reason']}", flush=True)
    rows = {net.key: rows[net.key] for net in ZOO if net.key in rows}
    (options.out / "zoo.md").write_text(table(rows))
    failed = [key for key, row in rows.items() if row["verified"] != "True"]
    print(f"{len(rows) - len(failed)} of {len(rows)} verified; written: {path} and zoo.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
