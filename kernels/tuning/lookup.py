"""Launch configurations that were measured, which go before the heuristics.

`tuned` looks a launch up in the user's cache, then in `configs/<architecture>.json` (shipped with the package: measured
on a known card, or, of the MI100, simulated), and else takes what the heuristic, the caller's `config_for`, has picked.
Nothing is measured here; that is `measure.py`, which sees through a `Session` what a call looks up and tries other
configurations in its place. In Triton's interpreter there is always the one configuration of the heuristic.

DEPTHFUSE_TUNE=0 ignores all measurements.
"""

import contextlib
import functools
import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from depthfuse.kernels.launch import Target
from depthfuse.measured_cache import MeasuredCache

logger = logging.getLogger(__name__)

PACKAGED = Path(__file__).parents[1] / "configs"
_local = threading.local()
# What was looked up in this process, None included: configurations by a key that is quick to make, and their entries.
_found: dict[tuple, Any] = {}
_known: dict["Request", "Entry | None"] = {}


@dataclass(frozen=True)
class Request:
    """One launch that asks for its configuration.

    Attributes:
        op: the kernel's name.
        shape: name -> value of everything that its speed may depend on, as sorted by the caller.
        heuristic: the configuration that runs where nothing was measured; it follows from all the others.
    """

    op: str
    dtype: torch.dtype
    shape: tuple[tuple[str, int], ...]
    target: Target
    heuristic: Any = field(compare=False)
    device: torch.device

    @property
    def config_type(self) -> type:
        """The dataclass of its configuration."""
        return type(self.heuristic)

    def key(self) -> str:
        """ "linear float16 rows=197 channels=192 ...": the name of its entry in a cache."""
        sizes = " ".join(f"{name}={value}" for name, value in self.shape)
        return f"{self.op} {str(self.dtype).removeprefix('torch.')} {sizes}"


@dataclass(frozen=True)
class Entry:
    """What was measured for one request.

    Attributes:
        config: fields of the configuration that won; None where it was the heuristic's.
        latency_us, heuristic_us: time of the winner and of the heuristic's choice.
        simulated: whether these times are of a simulation. They choose where nothing was measured, no more.
    """

    config: dict[str, int] | None
    latency_us: float
    heuristic_us: float
    simulated: bool = False


@dataclass
class Session:
    """What the calls of one thread look up while it is open, and what they are told in place of the truth."""

    seen: dict[Request, None] = field(default_factory=dict)
    forced: dict[Request, Any] = field(default_factory=dict)


@contextlib.contextmanager
def session() -> Iterator[Session]:
    """Watch this thread's lookups."""
    before = getattr(_local, "session", None)
    _local.session = Session()
    try:
        yield _local.session
    finally:
        _local.session = before


@functools.cache
def enabled() -> bool:
    """Whether measurements count: unless DEPTHFUSE_TUNE is "0". Raises ValueError for any other value than "1"."""
    value = os.environ.get("DEPTHFUSE_TUNE") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"DEPTHFUSE_TUNE is {value!r}, expected 0 or 1")
    return value == "1"


def tuned(op: str, heuristic: Any, x: torch.Tensor, target: Target, **shape: int) -> Any:
    """The configuration that was measured to be fastest for this launch, or `heuristic`.

    Args:
        x: the launch's input, of whose dtype and on whose device it runs.
        shape: everything else that its speed may depend on; names and values are its entry's name in the caches.
    """
    if target.backend == "interpreter":
        return heuristic
    sizes = tuple(shape.items())
    current = getattr(_local, "session", None)
    if current is not None:
        request = Request(op, x.dtype, sizes, target, heuristic, x.device)
        if request in current.forced:
            return current.forced[request] or heuristic
        current.seen[request] = None
    key = (op, x.dtype, sizes, target, x.device)
    if key not in _found:
        entry = known(Request(op, x.dtype, sizes, target, heuristic, x.device))
        _found[key] = None if entry is None else parse(type(heuristic), entry.config)
    return _found[key] or heuristic


def known(request: Request) -> Entry | None:
    """What was measured for the request: by this user on this device, or on a card that the package knows; or what was
    simulated for such a card.
    """
    if request not in _known:
        entry = None
        if enabled():
            cache = user_cache(request.device)
            entry = entry_in(cache, request) if cache else None
            entry = entry or packaged(request.target.arch).get(request.key())
        _known[request] = entry
    return _known[request]


def remember(request: Request, entry: Entry) -> None:
    """Keep a measurement, for this process and for those to come."""
    _known[request] = entry
    _found.clear()
    cache = user_cache(request.device)
    if cache:
        cache.put({"launch": request.key()}, asdict(entry))


def parse(config_type: type, values: Any) -> Any:
    """A configuration from its fields; None for None, and for fields that it does not have."""
    if values is None:
        return None
    if not isinstance(values, dict) or set(values) != {f.name for f in fields(config_type)}:
        return None
    return config_type(**values) if all(type(value) is int for value in values.values()) else None


def entry_of(values: Any) -> Entry | None:
    """An entry from JSON; None where it is not one."""
    try:
        times_us = float(values["latency_us"]), float(values["heuristic_us"])
        return Entry(values["config"], *times_us, bool(values.get("simulated", False)))
    except (KeyError, TypeError, ValueError):
        return None


@functools.cache
def packaged(arch: str) -> dict[str, Entry]:
    """Request key -> entry, of the measurements (or simulations) that the package brings for `arch`; none for most."""
    path = PACKAGED / f"{arch}.json"
    if not path.exists():
        return {}
    entries = {key: entry_of(values) for key, values in json.loads(path.read_text())["configs"].items()}
    return {key: entry for key, entry in entries.items() if entry is not None}


def entry_in(cache: MeasuredCache, request: Request) -> Entry | None:
    """The request's entry in the user's cache; None where there is none, or it is of another configuration."""
    answer = cache.get({"launch": request.key()})
    if answer is None:
        return None
    entry = entry_of(answer)
    if entry is None or (entry.config is not None and parse(request.config_type, entry.config) is None):
        logger.warning("the cache holds no configuration for %s: measured anew when tuning", request.key())
        return None
    return entry


@functools.cache
def user_cache(device: torch.device) -> MeasuredCache | None:
    """The user's cache for the kernels that are installed here and the GPU `device`; None for any other device."""
    return MeasuredCache.of(device, sources=("kernels",)) if device.type == "cuda" else None
