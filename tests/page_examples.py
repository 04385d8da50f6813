"""Pages as runs, comparisons and benches leave them, from figures made up, with names that a page has to survive."""

from depthfuse.acceleration import Report
from depthfuse.acceleration.planning.plan import Cost, Entry
from depthfuse.benching import page as bench_page
from depthfuse.config import CompareConfig, PruneConfig, SearchConfig
from depthfuse.costs.table import CostTable
from depthfuse.rivals import compare_page
from depthfuse.runs import page as run_page
from depthfuse.runs.found import Findings
from depthfuse.runs.report import acceleration_document
from depthfuse.searching.intervals import Paired
from depthfuse.searching.scoring import SubnetScore
from depthfuse.searching.search import Point, SearchResult
from depthfuse.tasks import CLASSIFICATION

HOSTILE = "<script>alert(1)</script>&amp;\"'$x^2$\x00\x1b"
SHOWN = "<script>alert(1)</script>&amp;\"'$x^2$\ufffd\ufffd"  # as a reader sees it
LONG = "encoder." + "deeper" * 12 + ".0"
BLOCKS = {
    "stem.0": ["compact", "drop"],
    LONG: ["dense", "drop"],
    "blocks.1": ["attention", "ffn"],
    HOSTILE: ["drop"],
}
CHOICES = {LONG: "dense", "blocks.1": "attention", HOSTILE: "drop"}
CONDITIONS = {
    "device": f"abacus {HOSTILE}",
    "threads": 2,
    "dtype": "float32",
    "batch_size": 1,
    "input_size": [3, 64, 64],
    "torch": "2.13.0",
    "predicted": False,
}
VALUES = {
    "baseline": (91.25, 603754, 4326016, 6.699, 0.309),
    "baseline accelerated": (91.25, 603754, 4326016, 2.079, 1.0),
    "pruned": (90.5, 604474, 2278336, 5.027, 0.409),
    "merged": (90.5, 194394, 2196160, 3.826, 0.534),
    "merged accelerated": (90.5, 194394, 2196160, 1.091, 1.868),
}
MERGE = {
    "summary": "merged 3 blocks, folded 7 batch norms",
    "output": 8.7e-16,
    "blocks": [
        {"block": block, "candidate": name, "border": 9.7e-16, "interior": 1.4e-15}
        for block, name in CHOICES.items()
    ],
}


def report() -> Report:
    """Of an accelerated net of three operations."""
    costs = Cost(0.5, 1.25, 1000000, 4096, 0.25), Cost(0.25, 0.5, 500000, 2048, 0.125), None
    entries = tuple(
        Entry(path, kind, implementation, "relu", (f"{path}.act",), True, cost=cost)
        for (path, kind, implementation), cost in zip(
            [
                (LONG, "FusedConv2d", "onednn"),
                (HOSTILE, "FusedLinear", "native"),
                ("head", "flatten", "eager"),
            ],
            costs,
            strict=True,
        )
    )
    return Report(
        "Net", "float32", "cpu", entries, "native engine", 3.2e-7, None, {"native": 1.0, "openvino": 1.31}
    )


def results(**changes) -> dict:
    """As in results.json."""
    rows = [
        {
            "net": name,
            "top1": top1,
            "parameters": parameters,
            "macs": macs,
            "latency_ms": latency_ms,
            "latency_quartiles_ms": [0.9 * latency_ms, 1.1 * latency_ms],
            "speedup": speedup,
        }
        for name, (top1, parameters, macs, latency_ms, speedup) in VALUES.items()
    ]
    budget = {"name": "speedup", "unit": "x", "wanted": 1.8, "reached": 1.868, "met": True}
    document = {
        "model": HOSTILE,
        "metric": "top-1",
        "conditions": CONDITIONS,
        "chosen_by": CONDITIONS,
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "rows": rows,
        "budget": budget,
        "choices": CHOICES,
        "blocks": BLOCKS,
        "merge": MERGE["summary"],
        "accelerated": dict.fromkeys(
            ("baseline accelerated", "merged accelerated"), acceleration_document(report())
        ),
    }
    return document | changes


def findings(**changes) -> Findings:
    """Of a run that is whole, with classes."""
    scored = [
        Point(CHOICES, 1.2, SubnetScore(80.0, 0.6), Paired(100, 12, 2)),
        Point({LONG: "dense"}, 1.7, SubnetScore(88.0, 0.4), Paired(100, 3, 1)),
        Point({}, 2.1, SubnetScore(90.0, 0.3), Paired(100, 0, 0)),
    ]
    history = [
        {"stage": stage, "iteration": i, "loss": 2.0 / (i + 1), "top1": 30.0 * i, **extra}
        for stage, extra in (("baseline", {}), ("supernet", {}), ("finetune", {"lambda": 0.5}))
        for i in range(3)
    ]
    saved = {path: dict.fromkeys(names, 0.125) for path, names in BLOCKS.items()}
    known = {
        "config": PruneConfig(model=HOSTILE, search=SearchConfig(speedup=1.8)),
        "task": CLASSIFICATION,
        "given": (),
        "done": dict.fromkeys(("baseline", "supernet", "search", "finetune", "merge", "compare"), True),
        "results": results(),
        "table": CostTable(CONDITIONS, "ms", 2.1, saved),
        "search": SearchResult(None, tuple(scored), 12, 90.0),
        "choices": CHOICES,
        "finalists": [
            {"choices": {LONG: "dense"}, "divergence": 0.0625, "seconds": 4.5},
            {"choices": CHOICES, "divergence": 0.03125, "seconds": 4.0},
            {"choices": {HOSTILE: "drop"}},
        ],
        "merge": MERGE,
        "history": history,
        "seconds": {"baseline": 4000.0, "supernet": 75.0, "finetune": 9.25},
        "feeding": {"classes": ["cat", HOSTILE], "input_size": [3, 64, 64], "mean": [0.5], "std": [0.25]},
    }
    return Findings(**known | changes)


def started(*stages: str, **changes) -> Findings:
    """Of a run that has done these stages, and has left nothing else."""
    done = {name: name in stages for name in findings().done}
    nothing = dict.fromkeys(("results", "table", "search", "choices", "finalists", "merge", "feeding"))
    return findings(**nothing | {"done": done, "history": [], "seconds": {}} | changes)


def bench() -> str:
    """The page of a bench."""
    rows = [
        {
            "model": HOSTILE,
            "batch": batch,
            "dtype": "float32",
            "contender": name,
            "latency_ms": ratio * batch,
            "latency_q1_ms": 0.9 * ratio * batch,
            "latency_q3_ms": 1.1 * ratio * batch,
            "ratio_to_depthfuse": ratio,
            "ratio_q1": 0.95 * ratio,
            "ratio_q3": 1.05 * ratio,
            "max_relative_error": "1.2e-06",
        }
        for batch in (1, 8)
        for name, ratio in (("depthfuse", 1.0), ("eager channels_last", 3.125), (HOSTILE, 1.375))
    ]
    return bench_page.html(
        rows, report(), HOSTILE, {"device": HOSTILE, "threads": 2, "torch": "2.13.0", "timm": ""}
    )


def comparison() -> str:
    """The page of a comparison."""
    trials = [
        {
            "method": name,
            "budget": "speedup=1.3",
            "seed": seed,
            "top1": top1 + seed,
            "loss": 0.5,
            "baseline_top1": 91.0,
            "choices": CHOICES,
            "channel_ratio": None,
            "image_size": None,
            "macs": 2e6,
            "parameters": 1000.0,
            "seconds": 36.0,
            "latency_ms": 1.5,
            "speedup": 1.375,
        }
        for name, top1 in (("updp", 90.0), (HOSTILE, 88.5), ("longer", 91.5))
        for seed in (0, 1)
    ]
    document = {
        "model": HOSTILE,
        "conditions": CONDITIONS,
        "chosen_by": CONDITIONS,
        "baseline": {"macs": 4e6, "parameters": 2000, "seconds": 72.0, "latency_ms": 2.0},
        "trials": trials,
        "unreachable": [
            {"method": "drop", "budget": "speedup=1.3", "seed": 0, "unreachable": f"no {HOSTILE}"}
        ],
    }
    return compare_page.html(document, CompareConfig())


def run() -> str:
    """The page of a run."""
    return run_page.html(findings())


KINDS = {"run": run, "bench": bench, "compare": comparison}
