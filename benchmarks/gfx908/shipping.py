"""What simulations say, as files of the package: configurations of launches, and shares of the roofline."""

from __future__ import annotations

import json
from pathlib import Path

import triton

from benchmarks.gfx908.fitting import fields_of
from benchmarks.gfx908.launches import TARGET
from benchmarks.gfx908.operators import DTYPES
from depthfuse.kernels.tuning.lookup import PACKAGED
from depthfuse.kernels.tuning.measure import LEAST_GAIN

_SHARES = Path(__file__).parents[2] / "depthfuse" / "costs" / f"simulated_{TARGET.arch}.json"
# Operators that a planned network is made of; others replace several of them, which a count of operations does not see.
_SINGLE = ("conv2d", "linear", "depthwise_conv2d", "attention", "pool_linear")


def ship(times: list[dict], tiles: list[dict]) -> str:
    """Write both files; what was written, in words. Args: rows of CSVs, as `times.Row` and `tiles.Row`."""
    source = {
        "device": "AMD Instinct MI100, simulated (benchmarks/gfx908): no card was timed",
        "versions": {"triton": triton.__version__},
    }
    configs = configurations(tiles)
    _write(PACKAGED / f"{TARGET.arch}.json", {**source, "configs": configs})
    shares = shares_of_roofline(times)
    _write(_SHARES, {**source, "launches": shares})
    many = {dtype: len(rows) for dtype, rows in shares.items()}
    return f"{len(configs)} configurations, and shares of {many}"


def configurations(rows: list[dict]) -> dict[str, dict]:
    """{request: entry} as `lookup.packaged` reads them, of what is clearly faster than the heuristic's choice."""
    found: dict[str, dict] = {}
    for request in dict.fromkeys(row["request"] for row in rows):
        mine = [row for row in rows if row["request"] == request]
        usual = next((row for row in mine if row["chosen"] == "True"), None)
        best = min(mine, key=lambda row: float(row["simulated_us"]))
        if usual is None or float(best["simulated_us"]) * LEAST_GAIN > float(usual["simulated_us"]):
            continue
        found[request] = {
            "config": fields_of(best["config"]),
            "latency_us": float(best["simulated_us"]),
            "heuristic_us": float(usual["simulated_us"]),
            "simulated": True,
        }
    return found


def shares_of_roofline(rows: list[dict]) -> dict[str, list[list[float]]]:
    """{dtype: [[matrix, flops, bytes_moved, share], ...]} as `depthfuse.costs.simulated` reads them."""
    shares: dict[str, list[list[float]]] = {}
    for row in rows:
        if row["op"] in _SINGLE:
            sizes = [float(row[name]) for name in ("flops", "bytes_moved", "share")]
            name = str(DTYPES[row["dtype"]]).removeprefix("torch.")
            shares.setdefault(name, []).append([int(row["kind"] == "matrix"), *sizes])
    return shares


def _write(path: Path, document: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=None, separators=(",", ":")).replace("],[", "],\n[") + "\n")
    part.replace(path)
