"""Kill, cut, flip, craft, and crowd: what depthfuse keeps on the disk, in thousands of cases.

python -m benchmarks.tools.torture --kills 200 --cuts 2000 --flips 2000

Kills: a small job is killed at a write and started again until it is done; all that it leaves is compared, bit for bit,
with what an undisturbed one leaves. Cuts, flips and crafted values: every file of a finished job, damaged and read.
Threads: saving, loading and accelerating at once. Ranks: two processes train, one is killed. Each case is kept in
OUT/cases.jsonl as it is done, so that the campaign can be stopped and goes on; the table is made of that file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.tools import damage
from depthfuse import ModelSource, accelerate, load, load_accelerated
from depthfuse.checkpoint import load_json, load_tensors, save_text
from depthfuse.config import (
    CompareConfig,
    FinetuneConfig,
    LatencyConfig,
    PruneConfig,
    SearchConfig,
    SupernetConfig,
    TrainConfig,
    to_yaml,
)
from depthfuse.data import DataConfig

ROOT = Path(__file__).resolve().parents[2]
# Trains in seconds, and writes in every stage.
SMALL: dict[str, Any] = {
    "model": "resnet18",
    "model_kwargs": ("channels=(4,4,8,8)", "layers=(2,1,1,1)", "in_chans=1"),
    "data": DataConfig(max_train_images=192, batch_size=64, holdout=0.2),
    "baseline": TrainConfig(epochs=1, warmup_epochs=0.0),
    "supernet": SupernetConfig(epochs=1, warmup_epochs=0.0),
    "search": SearchConfig(
        blocks=1, population=3, parents=2, generations=1, calibration_images=64, losing_merges=True
    ),
    "finetune": FinetuneConfig(epochs=1, warmup_epochs=0.0),
    "latency": LatencyConfig(rounds=1),
    "cpu": True,
    "checkpoint_seconds": 0.0,
}
# Files with clock times in them; of these, the rest is compared.
_TIMED = ("seconds", "latency_ms", "latency_quartiles_ms", "speedup", "settings")


def small_config(folder: Path, command: str) -> Path:
    """The job's YAML in `folder`. One latency table serves all: two measurements never agree to the last digit."""
    given = dict(SMALL)
    table = folder / "latency.json"
    if command == "compare":
        config: PruneConfig = CompareConfig(**given, methods=("updp",), budgets=("blocks=1",), seeds=(0,))
    else:
        latency = dataclasses.replace(given["latency"], table=table if table.exists() else None)
        config = PruneConfig(**{**given, "latency": latency})
    path = folder / f"{command}.yaml"
    save_text(path, to_yaml(config))
    return path


def run(command: str, config: Path, out: Path, at: int = 0, count: Path | None = None, ranks: int = 1) -> int:
    """One call of the job, killed at its moment `at`. Returns the exit code."""
    launcher = ["-m", "benchmarks.tools.killed"]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *launcher]
    counting = ["--count", str(count)] if count else []
    arguments = ["--at", str(at), *counting, command, "--config", str(config), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    (out.parent / f"{out.name}.log").write_text(done.stdout + done.stderr)
    return done.returncode


def undisturbed(folder: Path, command: str, ranks: int = 1) -> tuple[Path, int]:
    """A job that nobody kills, and its number of moments; made once."""
    out, count = folder / f"{command}{ranks}_whole", folder / f"{command}{ranks}_moments"
    if not count.exists():
        if command != "baseline":
            make_table(folder)
        fresh(folder, out, command)
        code = run(command, small_config(folder, command), out, count=count, ranks=ranks)
        if code:
            raise SystemExit(f"the undisturbed job failed ({code}): see {out}.log")
    return out, int(count.read_text())


def make_table(folder: Path) -> None:
    """The latency table that all jobs plan with; made once."""
    if not (folder / "latency.json").exists():
        out = folder / "table"
        if run("supernet", small_config(folder, "supernet"), out):
            raise SystemExit(f"no latency table: see {out}.log")
        shutil.copy(out / "latency.json", folder / "latency.json")


def fresh(folder: Path, out: Path, command: str) -> None:
    """An empty folder for a job; a comparison finds its table there."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if command == "compare":
        shutil.copy(folder / "latency.json", out / "latency.json")


def contents(path: Path) -> Any:
    """What must be equal in two runs of one job."""
    if path.suffix != ".json" or path.name == "subnet.json":
        return path.read_bytes()
    return _untimed(load_json(path))


def _untimed(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _untimed(value) for key, value in document.items() if key not in _TIMED}
    return [_untimed(value) for value in document] if isinstance(document, list) else document


def differing(got: Path, wanted: Path) -> list[str]:
    """Names of the artefacts that are not the same in two folders."""
    patterns = ("*.safetensors", "subnet*.json", "search*.jsonl", "merge.json", "trial.json", "results.json")
    names = {path.relative_to(f) for f in (got, wanted) for p in patterns for path in f.rglob(p)}
    return sorted(
        str(name)
        for name in names
        if not ((got / name).exists() and (wanted / name).exists())
        or contents(got / name) != contents(wanted / name)
    )


def killed(folder: Path, command: str, number: int, ranks: int = 1) -> dict[str, Any]:
    """One case: the job killed at a moment of its own choosing by number, and once more after that, then let run."""
    whole, moments = undisturbed(folder, command, ranks)
    rng = random.Random(f"{command} {ranks} {number}")
    out = folder / f"{command}{ranks}_{number}"
    fresh(folder, out, command)
    config = folder / f"{command}.yaml"
    at = [rng.randrange(1, moments + 1), rng.choice([0, rng.randrange(1, moments + 1)])]
    codes = [run(command, config, out, moment, ranks=ranks) for moment in at]
    codes.append(run(command, config, out, ranks=ranks))
    other = differing(out, whole) if codes[-1] == 0 else ["it did not end"]
    left = [path.name for path in out.rglob(".*.tmp")]
    hit = codes[0] == -signal.SIGKILL or (ranks > 1 and codes[0] != 0)
    if not other:
        shutil.rmtree(out)
    return {
        "moments": at,
        "killed": hit,
        "differing": other,
        "leftovers": left,
        "bad": bool(other) or not hit,
    }


def damaged(folder: Path, way: str, count: int, done: set[int]) -> Iterator[dict[str, Any]]:
    """Cases of cut, flipped and crafted files: `count` for each file of a finished job."""
    whole, _ = undisturbed(folder, "prune")
    place = folder / f"damaged_{way}"
    if not place.exists():
        shutil.copytree(whole, place)
        fast = accelerate(load(place), torch.randn(1, 1, 28, 28), tune="heuristic", verify=False)
        fast.save(place / "fast.safetensors")
    for file, (path, kind) in enumerate(damage.artefacts(place)):
        if file in done:
            continue
        rng, expected = random.Random(f"{way} {path.name}"), kind.read(path)
        generator = damage.crafted(path, count, rng)
        if way != "crafted":
            generator = getattr(damage, way)(path.read_bytes(), count, rng)
        outcomes, bad = Counter[str](), []
        for told, data in generator:
            verdict = damage.verdict(path, kind, data, expected)
            outcomes[verdict.outcome] += 1
            if verdict.bad(kind.checked and way != "crafted"):
                bad.append(f"{told}: {verdict.outcome} {verdict.told:.300}")
        name = str(path.relative_to(place))
        yield {
            "number": file,
            "file": name,
            "outcomes": dict(outcomes),
            "bad": bad,
            "cases": outcomes.total(),
        }


def crowded(folder: Path, number: int, threads: int = 8, rounds: int = 40) -> dict[str, Any]:
    """One case: threads that save, load and accelerate the same model at one path at once."""
    torch.manual_seed(number)
    model = ModelSource.make("test_resnet", in_chans=1, num_classes=3).build().eval()
    x = torch.randn(1, 1, 64, 64)
    fast = accelerate(model, x, tune="heuristic")
    expected, place = fast(x), folder / f"crowd_{number}"
    fast.save(place / "fast.safetensors")

    def work(turn: int) -> str | None:
        try:
            if turn % 4 == 0:
                fast.save(place / "fast.safetensors")
            elif turn % 4 == 1:
                load_tensors(place / "fast.safetensors")
            elif turn % 4 == 2:
                accelerate(model, x, tune="heuristic")
            elif not torch.equal(load_accelerated(place / "fast.safetensors", tune="heuristic")(x), expected):
                return "other outputs"
        except Exception as error:
            return f"{type(error).__name__} {error:.200}"
        return None

    with ThreadPoolExecutor(threads) as pool:
        failed = [told for told in pool.map(work, range(rounds)) if told]
    failed += [f"left over: {path.name}" for path in place.glob(".*.tmp")]
    shutil.rmtree(place)
    return {"bad": failed, "cases": rounds}


def campaign(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases, those of earlier calls first."""
    args.out.mkdir(parents=True, exist_ok=True)
    book = args.out / "cases.jsonl"
    lines = book.read_text().splitlines() if book.exists() else []
    cases = [json.loads(line) for line in lines]

    def done(way: str) -> set[int]:
        return {case["number"] for case in cases if case["way"] == way}

    def add(way: str, case: dict[str, Any]) -> None:
        cases.append({"way": way, **case})
        with book.open("a") as file:
            file.write(json.dumps(cases[-1]) + "\n")

    jobs = [("prune", 1, args.kills), ("compare", 1, args.kills_compare), ("prune", 2, args.ranks)]
    with Progress() as bars:
        for command, ranks, count in jobs:
            way = f"killed {command}" + (f", {ranks} ranks" if ranks > 1 else "")
            for number in bars.track([n for n in range(count) if n not in done(way)], description=way):
                add(way, {"number": number, "cases": 1, **killed(args.out, command, number, ranks)})
        for way, count in (("cuts", args.cuts), ("flips", args.flips), ("crafted", args.crafted)):
            if count:
                for case in bars.track(damaged(args.out, way, count, done(way)), description=way):
                    add(way, case)
        numbers = [n for n in range(args.threads) if n not in done("threads")]
        for number in bars.track(numbers, description="threads"):
            add("threads", {"number": number, **crowded(args.out, number)})
    return cases


def markdown(cases: list[dict[str, Any]]) -> str:
    """The table: how many cases of each kind, and what went wrong."""
    lines = ["# Killed, cut, flipped, crafted, crowded", ""]
    lines += ["`python -m benchmarks.tools.torture`; what each means is said there.", ""]
    lines += ["| case | cases | what became of them | wrong |", "| --- | --- | --- | --- |"]
    for way in dict.fromkeys(case["way"] for case in cases):
        mine = [case for case in cases if case["way"] == way]
        outcomes = sum((Counter(case.get("outcomes", {})) for case in mine), Counter[str]())
        told = ", ".join(f"{name} {count}" for name, count in outcomes.most_common()) or "the same bits"
        wrong = sum(len(c["bad"]) if isinstance(c["bad"], list) else int(c["bad"]) for c in mine)
        lines.append(f"| {way} | {sum(case['cases'] for case in mine):,} | {told} | {wrong} |")
    bad = [case for case in cases if case["bad"]]
    lines += ["", *(f"- {json.dumps(case)[:500]}" for case in bad[:50])]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=50, help="of depthfuse prune")
    parser.add_argument("--kills-compare", type=int, default=10, help="of depthfuse compare")
    parser.add_argument("--ranks", type=int, default=5, help="kills of a job with two ranks")
    parser.add_argument("--cuts", type=int, default=500, help="for each file")
    parser.add_argument("--flips", type=int, default=500, help="for each file")
    parser.add_argument("--crafted", type=int, default=500, help="values replaced in each file")
    parser.add_argument("--threads", type=int, default=10, help="crowds of eight threads")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "torture", help="where it goes on from")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "results" / "torture.md")
    args = parser.parse_args()
    cases = campaign(args)
    save_text(args.table, markdown(cases))
    print(markdown(cases))
    return int(any(case["bad"] for case in cases))


if __name__ == "__main__":
    sys.exit(main())
