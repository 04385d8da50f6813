"""Do to depthfuse what disks, users and schedulers do: kill it at any write, damage its files, call it from threads.

    python -m benchmarks.tools.torture                       # everything, about an hour on one core
    python -m benchmarks.tools.torture kills --kills 40      # one part of it

kills        `prune` is killed at its n-th write and started again; all it leaves must be the same, bit for bit
comparisons  the same for `compare`
ranks        the same for `prune` on two processes
damage       every file that depthfuse reads, cut anywhere, bits flipped, values replaced: one of our errors, or equal
threads      one accelerated model called by many threads while others save and load it

Results go line by line into a journal in --work, so that a run which was stopped goes on; the table at the end is
benchmarks/results/torture.md. Exit status 1 where anything differed. Tests run a small slice of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

import depthfuse
from benchmarks.tools import damage
from benchmarks.tools.kills import Job, contents, differences, moments, run_forked
from depthfuse import ModelSource, PruneConfig, accelerate, load_accelerated, prune
from depthfuse.config import (
    CompareConfig,
    FinetuneConfig,
    LatencyConfig,
    SearchConfig,
    SupernetConfig,
    TrainConfig,
)
from depthfuse.data import DataConfig
from depthfuse.devices import cpu_name
from depthfuse.log import progress
from depthfuse.rivals.compare import compare

ROOT = Path(__file__).resolve().parents[2]

TINY = PruneConfig(
    model="resnet18",
    model_kwargs=("channels=(4,6,8,12)", "layers=(1,1,1,1)", "in_chans=1"),
    data=DataConfig(max_train_images=160, batch_size=32, holdout=0.1),
    baseline=TrainConfig(epochs=1, lr=2e-3, warmup_epochs=0.0),
    supernet=SupernetConfig(epochs=1, warmup_epochs=0.0),
    search=SearchConfig(
        blocks=2, population=4, parents=2, generations=1, calibration_images=32, losing_merges=True
    ),
    finetune=FinetuneConfig(epochs=1, warmup_epochs=0.0),
    latency=LatencyConfig(rounds=1),
    cpu=True,
    checkpoint_seconds=0.0,
)


def baseline_job(work: Path) -> Job:
    """The first stage alone."""
    return lambda folder: _ignore(prune(replace(TINY, out=folder), "baseline"))


def prune_job(work: Path) -> Job:
    """The whole job on a net of a few hundred weights, with a latency table that is there already."""
    latency = replace(TINY.latency, table=_table(work))
    return lambda folder: _ignore(prune(replace(TINY, out=folder, latency=latency)))


def compare_job(work: Path) -> Job:
    """Two methods and the controls, one seed."""
    shared = {name: value for name, value in vars(TINY).items() if name not in ("out", "latency", "search")}
    config = CompareConfig(
        **shared,
        search=replace(TINY.search, blocks=None),
        latency=replace(TINY.latency, table=_table(work)),
        methods=("updp", "direct"),
        budgets=("blocks=2",),
        seeds=(0,),
    )
    return lambda folder: _ignore(compare(replace(config, out=folder)))


def _ignore(_result: object) -> None:
    pass


def _table(work: Path) -> Path:
    """One latency table for all jobs, measured once: two measurements never agree to the last digit."""
    table, first = work / "latency.json", work / "first"
    if not table.exists():
        shutil.rmtree(first, ignore_errors=True)
        ending = run_forked(lambda folder: _ignore(prune(replace(TINY, out=folder), "search")), first)
        if ending.status:
            raise SystemExit("the undisturbed job failed; see above")
        shutil.copy(first / "latency.json", table)
    return table


def undisturbed(work: Path, job: Job, name: str, ranks: int = 1) -> tuple[Path, int]:
    """(the folder of a job that ran to its end, how many writes that took)."""
    folder = work / f"{name}_undisturbed"
    for _ in range(2):  # the first one also writes down what it measures, which the next ones know
        shutil.rmtree(folder, ignore_errors=True)
        ending = run_forked(job, folder, ranks=ranks)
        if ending.status:
            raise SystemExit(f"the undisturbed {name} failed; see above")
    return folder, ending.writes


def kills(
    work: Path, count: int, make: Callable[[Path], Job] = prune_job, name: str = "kills", ranks: int = 1
) -> Iterator[dict]:
    """Kill, start again, compare: a row a kill, with what differed."""
    job = make(work)
    whole, writes = undisturbed(work, job, name, ranks)
    expected = contents(whole)
    for number, after in moments(writes, count):
        folder = work / f"{name}_killed"
        shutil.rmtree(folder, ignore_errors=True)
        killed = run_forked(job, folder, number, after, ranks)
        ended = run_forked(job, folder, ranks=ranks)
        wrong = [] if ended.status == 0 else ["the second start failed"]
        wrong += differences(contents(folder), expected) if folder.exists() else ["nothing is there"]
        wrong += [f"left over: {path.name}" for path in folder.rglob("*") if path.name.startswith(".")]
        wrong += [f"left over: {path.name}" for path in folder.rglob("*.state")]
        if killed.status != -signal.SIGKILL:
            wrong.append(f"ended by itself ({killed.status}) before write {number}")
        yield {"case": f"write {number}, {'after' if after else 'before'}", "wrong": wrong}


def ranks(work: Path, count: int) -> Iterator[dict]:
    """The same for `prune` on two processes, of which the one that writes is killed."""
    return kills(work, count, prune_job, "ranks", ranks=2)


def comparisons(work: Path, count: int) -> Iterator[dict]:
    """The same for a comparison of methods."""
    return kills(work, count, compare_job, "comparisons")


def threads(work: Path, count: int) -> Iterator[dict]:
    """`count` calls of one model from four threads, beside two that save it to one path and load it from there."""
    model = ModelSource.make("resnet18", channels=(4, 6, 8, 12), num_classes=5).build().eval()
    images = [torch.randn(1 + index % 3, 3, 40, 40) for index in range(12)]
    fast = accelerate(model, images[0], tune="heuristic")
    expected = [fast(x) for x in images]
    path = work / "shared.safetensors"
    fast.save(path)
    share = max(1, count // 8)

    def call(first: int) -> list[str]:
        wrong = 0
        for index in range(first, first + share):
            wrong += not torch.equal(fast(images[index % 12]), expected[index % 12])
        return [f"{wrong} of {share} calls differ"] if wrong else []

    def save_and_load(first: int) -> list[str]:
        for index in range(max(1, share // 40)):
            try:
                fast.save(path)
                loaded = load_accelerated(path, tune="off")
            except Exception as error:
                return [f"{type(error).__name__}: {error}"]
            if not torch.equal(loaded(images[index % 12]), expected[index % 12]):
                return ["a loaded model differs"]
        return []

    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(call, share * part) for part in range(8)]
        jobs += [pool.submit(save_and_load, part) for part in range(2)]
        for index, job in enumerate(jobs):
            kind = f"{share} calls" if index < 8 else "saving and loading"
            yield {"case": kind, "count": share if index < 8 else 1, "wrong": job.result()}


def damaged(work: Path, count: int) -> Iterator[dict]:
    """Cuts, flips and crafted values, about `count` of each, over the files of a run, a comparison and a plan."""
    folder = work / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    whole, _ = undisturbed(work, prune_job(work), "damage")
    compared, _ = undisturbed(work, compare_job(work), "damage_comparisons")
    shutil.copytree(whole, folder / "run")
    shutil.copytree(compared, folder / "comparison", ignore=shutil.ignore_patterns("config.yaml"))
    fast = accelerate(depthfuse.load(whole), torch.randn(1, 1, 28, 28), tune="heuristic")
    fast.save(folder / "fast.safetensors")
    # half-way through a stage, where a training state lies
    run_forked(prune_job(work), folder / "stopped", kill_at=12, after=True)
    files = damage.artefacts(folder)
    share = -(-count // len(files))
    for path, kind in files:
        expected = kind.read(path)
        data, rng = path.read_bytes(), random.Random(path.name)
        for name, cases in (
            ("cut", damage.cuts(data, share, rng)),
            ("flipped bit", damage.flips(data, share, rng)),
            ("crafted value", damage.crafted(path, share, rng)),
        ):
            outcomes: Counter[str] = Counter()
            wrong = []
            for told, changed in cases:
                verdict = damage.verdict(path, kind, changed, expected)
                outcomes[verdict.outcome] += 1
                # a crafted value carries a right checksum: it may be as good as the old one
                if verdict.bad(kind.checked and name != "crafted value"):
                    wrong.append(f"{told}: {verdict.outcome} {verdict.told:.200}")
            file = str(path.relative_to(folder))
            yield {
                "case": f"{file}, {name}",
                "file": path.name,
                "damage": name,
                "count": outcomes.total(),
                "refused": outcomes["refused"],
                "equal": outcomes["equal"],
                "wrong": wrong,
            }


PARTS: dict[str, tuple[Callable[[Path, int], Iterator[dict]], int]] = {
    "kills": (kills, 130),
    "comparisons": (comparisons, 60),
    "ranks": (ranks, 10),
    "damage": (damaged, 2500),
    "threads": (threads, 18000),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default all: {', '.join(PARTS)}")
    parser.add_argument("--work", type=Path, default=Path("runs/torture"), help="folder to work in")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "torture.md")
    for name, (_, count) in PARTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"how many (default {count})")
    given = parser.parse_args()
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    torch.set_num_threads(1)  # before any pool of threads is there: forks have no use for one
    os.environ["DEPTHFUSE_CACHE_DIR"] = str((given.work / "cache").resolve())
    given.work.mkdir(parents=True, exist_ok=True)
    logging.getLogger("depthfuse").setLevel(logging.ERROR)
    wrong = 0
    for part in given.parts or PARTS:
        wrong += run_part(part, getattr(given, part), given.work)
    write_table(given.work, given.out)
    print(f"table: {given.out}")
    return 1 if wrong else 0


def run_part(part: str, count: int, work: Path) -> int:
    """Run one part into its journal, where it is not there already; returns how many cases went wrong."""
    journal = work / f"{part}.jsonl"
    known = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    if known and known[-1].get("finished") == count:
        print(f"{part}: done before ({journal})")
    else:
        started = time.monotonic()
        known = []
        with journal.open("w") as file, progress(part, total=count) as bar:
            for row in PARTS[part][0](work, count):
                known.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                bar.advance(row.get("count", 1), wrong=sum(bool(r["wrong"]) for r in known))
            known.append({"finished": count, "seconds": round(time.monotonic() - started), "wrong": []})
            file.write(json.dumps(known[-1]) + "\n")
    bad = [row for row in known if row["wrong"]]
    for row in bad[:20]:
        print(f"{part}, {row['case']}: {'; '.join(row['wrong'])}", file=sys.stderr)
    return len(bad)


def write_table(work: Path, out: Path) -> None:
    """The journals' sums, for people."""
    lines = [
        "# Torture",
        "",
        f"`python -m benchmarks.tools.torture` on {cpu_name()}, {platform.system()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, depthfuse {depthfuse.__version__}. "
        "What each part does is in the head of `benchmarks/tools/torture.py`.",
        "",
        "| part | cases | wrong | seconds |",
        "|---|---|---|---|",
    ]
    for part in PARTS:
        journal = work / f"{part}.jsonl"
        if not journal.exists():
            continue
        rows = [json.loads(line) for line in journal.read_text().splitlines()]
        cases = [row for row in rows if "case" in row]
        seconds = next((row["seconds"] for row in rows if "seconds" in row), "stopped")
        number = sum(row.get("count", 1) for row in cases)
        lines.append(f"| {part} | {number:,} | {sum(bool(r['wrong']) for r in cases)} | {seconds} |")
    details = work / "damage.jsonl"
    if details.exists():
        kinds: dict[tuple[str, str], list[int]] = {}
        for line in details.read_text().splitlines():
            row = json.loads(line)
            if "file" in row:
                sums = kinds.setdefault((row["file"], row["damage"]), [0, 0, 0])
                for index, name in enumerate(("refused", "equal", "count")):
                    sums[index] += row[name]
        lines += [
            "",
            "| file | damage | cases | refused by one of our errors | read as before |",
            "|---|---|---|---|---|",
        ]
        lines += [f"| {f} | {d} | {n[2]} | {n[0]} | {n[1]} |" for (f, d), n in sorted(kinds.items())]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
