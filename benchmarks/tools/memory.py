"""Whether memory stays where it is when one process accelerates, saves and loads again and again.

    python -m benchmarks.tools.memory --times 500

Each repetition is `accelerate` with measurement, `save` and `load_accelerated`, of which nothing is kept; what was
measured is known from the second one on. The resident set is read every ten repetitions: as it is, and when Python has
collected what hangs in circles and the C library has given back what it holds for later. Exit status 1 where the latter
grows by more than --most megabytes from the tenth repetition to the last; the first ones fill caches that are bounded.
Writes benchmarks/results/memory.csv.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from depthfuse import ModelSource, accelerate, load_accelerated
from depthfuse.benching.bench import machine, write_csv

ROOT = Path(__file__).resolve().parents[2]
EVERY = 10


def resident_mb() -> float:
    """The resident set of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def tidy() -> None:
    """Give back all memory that is free, so that what stays is in use."""
    for _ in range(3):  # what C++ holds of a circle is let go of one round later
        gc.collect()
    trim = getattr(
        ctypes.CDLL(None), "malloc_trim", None
    )  # glibc alone has it, and keeps what it has once had
    if trim is not None:
        trim(0)


def repeat(step: Callable[[], object], times: int, every: int = EVERY) -> Iterator[tuple[int, float, float]]:
    """(repetitions so far, resident MB as it is, resident MB when tidied), after the first and every `every` ones."""
    for done in range(1, times + 1):
        step()
        if done == 1 or done % every == 0 or done == times:
            before = resident_mb()
            tidy()
            yield done, before, resident_mb()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=500, help="repetitions (default 500)")
    parser.add_argument("--model", default="resnet18", help="of timm (default resnet18)")
    parser.add_argument("--size", type=int, default=64, help="of the images (default 64)")
    parser.add_argument("--most", type=float, default=50.0, help="megabytes that it may grow (default 50)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory.csv")
    given = parser.parse_args()
    model = ModelSource.make(given.model).build().eval()
    x = torch.randn(1, 3, given.size, given.size)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DEPTHFUSE_CACHE_DIR"] = folder
        path = Path(folder) / "fast.safetensors"
        runs = ""

        def step() -> None:
            nonlocal runs
            fast = accelerate(model, x)
            fast.save(path)
            runs = load_accelerated(path).report().executor

        started = time.monotonic()
        for done, before, after in repeat(step, given.times):
            found.append({"times": done, "resident_mb": round(before, 1), "tidied_mb": round(after, 1)})
            print(f"{done:6d} {before:9.1f} {after:9.1f} MB {time.monotonic() - started:7.0f} s", flush=True)
    first = next((row for row in found if row["times"] >= EVERY), found[0])
    grown = found[-1]["tidied_mb"] - first["tidied_mb"]
    facts = machine(torch.device("cpu"))
    what = {"model": given.model, "input": f"[1, 3, {given.size}, {given.size}]", "runs": runs}
    write_csv([row | what for row in found], given.out, facts)
    print(", ".join(f"{key} {value}" for key, value in (what | facts).items() if value != ""))
    print(f"from {first['times']} to {found[-1]['times']} times: {grown:+.1f} MB; table: {given.out}")
    return 1 if grown > given.most else 0


if __name__ == "__main__":
    sys.exit(main())
