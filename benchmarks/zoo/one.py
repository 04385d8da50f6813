"""One net of the zoo in a process of its own: accelerate it, verify it, count what is fused. Prints a line of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter

import torch

import depthfuse
from benchmarks.zoo.nets import ZOO
from depthfuse.acceleration.checking.profile import count_operations
from depthfuse.acceleration.planning.part import as_tuple
from depthfuse.acceleration.planning.plan import Plan
from depthfuse.acceleration.planning.program import Call
from depthfuse.acceleration.running.native_engine import compiled
from depthfuse.measuring.accuracy import relative_error


def row_of(key: str, tune: str) -> dict[str, object]:
    """What is found for the net `key`; failures with their reason."""
    net = next(net for net in ZOO if net.key == key)
    row: dict[str, object] = {"library": net.library, "kind": net.kind, "net": net.name, "verified": False}
    model, image = net.build()
    start = time.perf_counter()
    try:
        fast = depthfuse.accelerate(model, image, tune=tune)
    except Exception as problem:  # the table is there to show whatever goes wrong
        reason = (str(problem) or repr(problem)).splitlines()[0]
        return {**row, "reason": f"{type(problem).__name__}: {reason}"[:300]}
    row["seconds"] = round(time.perf_counter() - start, 1)
    report = fast.report()
    plan = fast.made
    costs = count_operations(plan, Call.of(*plan.signature.bind((image,), {})))
    macs = sum(count.macs for _, count in costs)
    left = Counter[str]()
    for entry, count in costs:
        if not entry.fused:
            left[entry.kind] += count.macs
    heavy = [f"{kind} {100 * n / macs:.1f} %" for kind, n in left.most_common(3) if macs and n > 0.001 * macs]
    engine_error, engine_lacks = in_the_engine(plan, Call.of(*plan.signature.bind((image,), {})))
    seven = Call.of(*plan.signature.bind((image.repeat(7, 1, 1, 1),), {}))
    return {
        **row,
        "verified": True,
        "error": report.max_relative_error,
        "gmacs": round(macs / 1e9, 3),
        "share": round(100 * (1 - left.total() / macs), 2) if macs else 100.0,
        "fused": report.fused_count,
        "absorbed": report.absorbed_count,
        "others": report.unfused_count,
        "whole": plan.form is not None,
        "open_batch": plan.form is None or plan.form.takes(seven),
        "engine_error": engine_error,
        "engine_lacks": engine_lacks,
        "reason": ", ".join(heavy),
    }


def in_the_engine(plan: Plan, call: Call) -> tuple[float | str, str]:
    """(The native engine's error against the plan, what it lacks to run it); one of them is empty."""
    try:
        run = compiled(plan.module, call.tensors)
    except Exception as problem:  # the table is there to show whatever goes wrong
        return "", (str(problem) or repr(problem)).splitlines()[0][:150]
    with torch.no_grad():
        pairs = zip(as_tuple(run(*call.tensors)), as_tuple(plan.module(*call.tensors)), strict=True)
        return max(relative_error(given, wanted) for given, wanted in pairs), ""


if __name__ == "__main__":
    print(json.dumps(row_of(*sys.argv[1:])))
