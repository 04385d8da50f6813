"""The files of a proof, written anew from its journal whenever that has grown."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.journal import DONE, Journal

OURS = "depthfuse"
TABLES = {
    "self-test": "selftest.csv",
    "models": "models.csv",
    "operators": "operators.csv",
    "models, tuned": "models_tuned.csv",
}


def write_all(journal: Journal) -> None:
    """All tables there are rows for, `tuned.json`, and `proof.md`, which says them in words."""
    for step, name in TABLES.items():
        if rows := journal.of(step):
            _replace(journal.folder / name, _csv([row | journal.facts for row in rows]))
    if rows := journal.of("tuning"):
        table = {
            "device": journal.facts["device"],
            "versions": {name: journal.facts[name] for name in ("torch", "triton")},
            "configs": {row["request"]: row["entry"] for row in rows},
        }
        _replace(journal.folder / "tuned.json", json.dumps(table, indent=1) + "\n")
    _replace(journal.folder / "proof.md", _in_words(journal))


def _csv(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _in_words(journal: Journal) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in journal.facts.items() if value != "")
    parts = [f"# What runs on {journal.facts['device']}\n\n{facts}.\n"]
    if rows := journal.of("self-test"):
        counts = Counter(row["state"] for row in rows)
        parts.append(
            "## Kernels against float64\n\n"
            + ", ".join(f"{count} {state}" for state, count in counts.items())
            + ".\n\n"
            + _reasons(rows)
        )
    for step, title in (("models", "Whole models"), ("models, tuned", "Whole models, tuned")):
        if rows := journal.of(step):
            parts.append(f"## {title}\n\n{_models(rows)}")
    if rows := journal.of("operators"):
        parts.append(f"## Operators\n\n{_operators(rows)}")
    if rows := journal.of("tuning"):
        gains = [row["entry"]["heuristic_us"] / row["entry"]["latency_us"] for row in rows]
        better = [gain for gain in gains if gain > 1]
        parts.append(
            f"## Tuning\n\n{len(better)} of {len(rows)} launches run faster than by the heuristic, at most "
            f"{max(gains):.2f}x. tuned.json has the configurations.\n"
        )
    failed = {task: how for task, how in journal.ended.items() if how != DONE}
    if failed:
        parts.append(
            "## What did not run\n\n" + "".join(f"- {task}: {how}\n" for task, how in failed.items())
        )
    return "\n".join(parts)


def _reasons(rows: list[dict[str, Any]]) -> str:
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["state"] != "passed":
            found.setdefault((row["state"], row["reason"]), []).append(
                f"{row['op']} {row['case']} {row['dtype']}"
            )
    return "".join(f"- {state}: {reason}: {'; '.join(where)}\n" for (state, reason), where in found.items())


def _models(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | batch | ours, ms | launches | best other | its time over ours (quartiles) | all others |",
        "|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[str, int], dict[str, dict]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["batch"]), {})[row["contender"]] = row
    for (model, batch), by in cells.items():
        ours, others = by.get(OURS), [row for name, row in by.items() if name != OURS]
        if ours is None or not others:
            continue
        best = min(others, key=lambda row: row["ratio_to_depthfuse"])
        rest = ", ".join(f"{row['contender']} {row['ratio_to_depthfuse']:.2f}" for row in others)
        lines.append(
            f"| {model} | {batch} | {ours['latency_ms']:.3f} | {ours.get('launches', '')} | {best['contender']} | "
            f"{best['ratio_to_depthfuse']:.2f} ({best['ratio_q1']:.2f} to {best['ratio_q3']:.2f}) | {rest} |"
        )
    return "\n".join(lines) + "\n"


def _operators(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| operator | shapes | share of the roofline, least to most, % | shapes on which another is faster |",
        "|---|---|---|---|",
    ]
    cells: dict[str, dict[str, dict[str, dict]]] = {}
    for row in rows:
        cells.setdefault(row["op"], {}).setdefault(row["shape"], {})[row["contender"]] = row
    for op, shapes in cells.items():
        ours = [by["ours"]["percent_of_roofline"] for by in shapes.values() if "ours" in by]
        slower = sum(
            any(row["ratio_to_ours"] < 1 for name, row in by.items() if name != "ours")
            for by in shapes.values()
        )
        if ours:
            lines.append(f"| {op} | {len(shapes)} | {min(ours):.0f} to {max(ours):.0f} | {slower} |")
    return "\n".join(lines) + "\n"
