"""Damage for every file that depthfuse reads: cuts, flips, replaced values; and what becomes of a reader.

Shared by the tests (a few of each) and `benchmarks.tools.torture` (thousands).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from depthfuse import load_accelerated
from depthfuse.checkpoint import JSON_FORMAT, load_foreign_tensors, load_json, load_state, load_tensors
from depthfuse.config import load_yaml
from depthfuse.costs.table import CostTable
from depthfuse.errors import CheckpointError, DepthfuseError
from depthfuse.measured_cache import MeasuredCache
from depthfuse.rivals import compare_report
from depthfuse.runs import report
from depthfuse.runs.feeding import load_feeding
from depthfuse.runs.weights import load
from depthfuse.searching.journal import Journal
from depthfuse.spec import SubnetSpec
from depthfuse.training.loop import history_csv

Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Kind:
    """One kind of file. read: everything that is made of it, as plain values and tensors. checked: it carries a
    checksum, so that a changed value never passes. lines: a cut may take whole lines off its end."""

    read: Read
    checked: bool = True
    lines: bool = False


def _table(path: Path) -> Any:
    table = CostTable.load(path)
    choices = {block: name for block, saved in table.saved.items() for name in list(saved)[:1]}
    return table.conditions, table.unit, table.whole, table.saved, table.cost(choices)


def _results(path: Path) -> Any:
    if "trials" in load_json(path, dict[str, Any]):
        results = load_json(path, compare_report.RESULTS)
        return results, compare_report.table_rows(results)
    results = load_json(path, report.RESULTS)
    return results, report.markdown(results), report.comparison_rows(results)


def _history(path: Path) -> Any:
    rows = load_json(path, report.HISTORY)
    return rows, history_csv(rows)


def _run(path: Path) -> Any:
    """The spec, and the model that is built of it."""
    return SubnetSpec.load(path).mapping(), load(path.parent).state_dict()


def _fast(path: Path) -> Any:
    return load_accelerated(path, tune="heuristic").state_dict()


# By the names of the files in a run's folder.
KINDS: dict[str, Kind] = {
    "subnet.json": Kind(_run, checked=False),
    "latency.json": Kind(_table),
    "results.json": Kind(_results),
    "merge.json": Kind(lambda path: load_json(path, report.MERGE)),
    "trial.json": Kind(lambda path: load_json(path, compare_report.TRIAL)),
    "history_*.json": Kind(_history),
    "seconds_*.json": Kind(lambda path: load_json(path, float)),
    "search*.jsonl": Kind(lambda path: list(Journal(path).rows.values()), lines=True),
    "feeding.json": Kind(lambda path: load_feeding(path.parent)),
    "config.yaml": Kind(lambda path: load_yaml(path, complete=True), checked=False),
    "fast.safetensors": Kind(_fast),
    "foreign.safetensors": Kind(load_foreign_tensors, checked=False),
    "*.state": Kind(load_state),
    "*.safetensors": Kind(load_tensors),
}


def artefacts(folder: Path) -> list[tuple[Path, Kind]]:
    """Every file under a folder that depthfuse reads again, with its kind."""
    found: dict[Path, Kind] = {}
    for pattern, kind in KINDS.items():
        for path in sorted(folder.rglob(pattern)):
            found.setdefault(path, kind)
    return list(found.items())


def cuts(data: bytes, count: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """The file cut short at `count` places, the first and last bytes among them."""
    places = {0, 1, 7, 8, 9, len(data) // 2, len(data) - 1} | {rng.randrange(len(data)) for _ in range(count)}
    for place in sorted(p for p in places if p < len(data))[: max(count, 7)]:
        yield f"cut at {place} of {len(data)}", data[:place]


def flips(data: bytes, count: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """One bit of the file flipped, `count` times."""
    for _ in range(count):
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        yield f"bit {bit} of byte {place} of {len(data)} flipped", bytes(damaged)


def _deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


REPLACEMENTS = (None, "", -1, 0, 1e308, [], {}, True, "x" * 100_000, _deep(60), 2**62, "\0", {"a": {}}, [[]])


def _places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document, the whole first."""
    yield ()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        for path in _places(inner):
            yield (key, *path)


def _replaced(document: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = document.copy()
    changed[path[0]] = _replaced(document[path[0]], path[1:], new)
    return changed


def _without(document: Any, path: tuple[Any, ...]) -> Any:
    changed = document.copy()
    if len(path) == 1:
        del changed[path[0]]
    else:
        changed[path[0]] = _without(document[path[0]], path[1:])
    return changed


def crafted(path: Path, count: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """The file with one value replaced by one of another kind, or left out, and its checksum made to match."""
    document, encode = _opened(path)
    places = list(_places(document))
    for _ in range(count):
        place = rng.choice(places)
        if place and rng.random() < 0.1:
            yield f"{place} left out", encode(_without(document, place))
        else:
            new = rng.choice(REPLACEMENTS)
            yield f"{place} replaced by {new!r:.30}", encode(_replaced(document, place, new))


def _opened(path: Path) -> tuple[Any, Callable[[Any], bytes]]:
    """What a file holds as JSON, and how such a document becomes a file again."""
    data = path.read_bytes()
    if path.suffix == ".yaml":
        import yaml

        return yaml.safe_load(data), lambda document: yaml.safe_dump(document).encode()
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in data.splitlines()]
        return rows, lambda rows: _lines(rows)
    if path.suffix == ".json":
        document = json.loads(data)
        if document.get("format") != JSON_FORMAT:
            return document, lambda document: json.dumps(document).encode()
        return document["content"], _signed_json
    return _opened_tensors(data)


def _lines(rows: Any) -> bytes:
    lines = []
    for row in rows if isinstance(rows, list) else [rows]:
        if isinstance(row, dict) and "sha256" in row:
            bare = {key: value for key, value in row.items() if key != "sha256"}
            row = bare | {"sha256": hashlib.sha256(json.dumps(bare).encode()).hexdigest()[:16]}
        lines.append(json.dumps(row) + "\n")
    return "".join(lines).encode()


def _signed_json(content: Any) -> bytes:
    digest = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({"format": JSON_FORMAT, "sha256": digest, "content": content}).encode()


def _opened_tensors(data: bytes) -> tuple[Any, Callable[[Any], bytes]]:
    import safetensors.torch

    from depthfuse.checkpoint import _digest  # so that the checksum is right and the contents alone are wrong

    length = int.from_bytes(data[:8], "little")
    entry = json.loads(json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("depthfuse", "null"))
    if entry is None:  # somebody else's: the header itself
        header = json.loads(data[8 : 8 + length])

        def with_header(new: Any) -> bytes:
            text = json.dumps(new).encode()
            return len(text).to_bytes(8, "little") + text + data[8 + length :]

        return header, with_header
    tensors = safetensors.torch.load(data)
    extra = entry["extra"]
    plan = isinstance(extra, dict) and "document" in extra
    opened = json.loads(extra["document"]) if plan else extra

    def encode(new: Any) -> bytes:
        changed = {**extra, "document": json.dumps(new)} if plan else new
        signed = {"kind": entry["kind"], "extra": changed, "sha256": _digest(entry["kind"], changed, tensors)}
        return safetensors.torch.save(tensors, {"depthfuse": json.dumps(signed)})

    return opened, encode


def same(a: Any, b: Any) -> bool:
    """Equal in value; tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


@dataclass(frozen=True)
class Verdict:
    """What became of a damaged file. outcome: "refused" by an error of ours; "equal", "shorter" (a journal that lost
    its last line) or "other" contents; or the name of an exception that is none of ours, which never may be."""

    outcome: str
    told: str = ""

    def bad(self, checked: bool) -> bool:
        return self.outcome not in ("refused", "equal", "shorter", *(() if checked else ("other",)))


def verdict(path: Path, kind: Kind, data: bytes, expected: Any) -> Verdict:
    """Put `data` in the place of a file, read it, and put the file back."""
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        got = kind.read(path)
    except DepthfuseError as error:
        named = str(path.parent) in str(error) or not isinstance(error, CheckpointError)
        return Verdict("refused" if named else "file not named", str(error))
    except Exception as error:
        return Verdict(type(error).__name__, str(error))
    finally:
        path.write_bytes(whole)
    if same(expected, got):
        return Verdict("equal")
    if kind.lines and same(expected[: len(got)], got):
        return Verdict("shorter")
    return Verdict("other")


def cache_verdict(cache: MeasuredCache, question: dict[str, Any], data: bytes) -> Verdict:
    """The same for an answer of the measured cache: it gives the answer, or none, and never raises."""
    path = cache.path(question)
    whole, expected = path.read_bytes(), cache.get(question)
    path.write_bytes(data)
    try:
        got = cache.get(question)
    except Exception as error:
        return Verdict(type(error).__name__, str(error))
    finally:
        path.write_bytes(whole)
    return Verdict("refused" if got is None else "equal" if same(expected, got) else "other")
