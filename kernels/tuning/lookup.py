"""Launch configurations that were measured, which go before the heuristics.

`tuned` looks a launch up in the user's cache, then in `configs/<architecture>.json` (measured on a known card and
shipped with the package), and else says None: the caller's `config_for` decides. Nothing is measured here; that is
`tuner.py`, which sees through a `Session` what a call looks up and tries other configurations in its place. In
Triton's interpreter there is always the one configuration of the heuristic.

DEPTHFUSE_TUNE=0 ignores all measurements.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import triton

from depthfuse.kernels.launch import Target

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
        config_type: the dataclass of its configuration.
    """

    op: str
    dtype: torch.dtype
    shape: tuple[tuple[str, int], ...]
    target: Target
    config_type: type
    device: torch.device

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
    """

    config: dict[str, int] | None
    latency_us: float
    heuristic_us: float


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


def tuned(op: str, config_type: type, x: torch.Tensor, target: Target, **shape: int) -> Any:
    """The configuration that was measured to be fastest for this launch, of `config_type`, or None.

    Args:
        x: the launch's input, of whose dtype and on whose device it runs.
        shape: everything else that its speed may depend on; names and values are its entry's name in the caches.
    """
    if target.backend == "interpreter":
        return None
    sizes = tuple(shape.items())
    current = getattr(_local, "session", None)
    if current is not None:
        request = Request(op, x.dtype, sizes, target, config_type, x.device)
        if request in current.forced:
            return current.forced[request]
        current.seen[request] = None
    key = (op, x.dtype, sizes, target, x.device)
    if key not in _found:
        entry = known(Request(op, x.dtype, sizes, target, config_type, x.device))
        _found[key] = None if entry is None else parse(config_type, entry.config)
    return _found[key]


def known(request: Request) -> Entry | None:
    """What was measured for the request: by this user on this device, or on a card that the package knows."""
    if request not in _known:
        entry = None
        if enabled():
            cache = user_cache(request.device)
            entry = cache.get(request) if cache else None
            entry = entry or packaged(request.target.arch).get(request.key())
        _known[request] = entry
    return _known[request]


def remember(request: Request, entry: Entry) -> None:
    """Keep a measurement, for this process and for those to come."""
    _known[request] = entry
    _found.clear()
    cache = user_cache(request.device)
    if cache:
        cache.put(request, entry)


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
        return Entry(values["config"], float(values["latency_us"]), float(values["heuristic_us"]))
    except (KeyError, TypeError, ValueError):
        return None


@functools.cache
def packaged(arch: str) -> dict[str, Entry]:
    """Request key -> entry, of the measurements that the package brings for `arch`; none for most."""
    path = PACKAGED / f"{arch}.json"
    if not path.exists():
        return {}
    entries = {key: entry_of(values) for key, values in json.loads(path.read_text())["configs"].items()}
    return {key: entry for key, entry in entries.items() if entry is not None}


class Cache:
    """A folder with a file for each request: writers of different ones never meet, and of one the last wins whole."""

    def __init__(self, folder: Path, facts: dict[str, str]) -> None:
        self.folder = folder
        self.facts = facts  # written beside each entry, for people

    def path(self, request: Request) -> Path:
        """Of the request's file, there or not."""
        return self.folder / f"{hashlib.sha256(request.key().encode()).hexdigest()[:24]}.json"

    def get(self, request: Request) -> Entry | None:
        """The request's entry; None where there is none, or its file is damaged or of another request."""
        path = self.path(request)
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged (%s): measured anew when tuning", path, error)
            return None
        entry = entry_of(values) if isinstance(values, dict) and values.get("key") == request.key() else None
        if entry is None or (entry.config is not None and parse(request.config_type, entry.config) is None):
            logger.warning("%s holds no configuration for %s: measured anew when tuning", path, request.key())
            return None
        return entry

    def put(self, request: Request, entry: Entry) -> None:
        """Write the entry, in place of any that there was; where that fails, log why and go on without."""
        path = self.path(request)
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"key": request.key()} | asdict(entry) | self.facts, indent=1))
            partial.replace(path)
        except OSError as error:
            logger.warning("the tuning cache cannot be written (%s): this measurement is lost at exit", error)


def source_digest() -> str:
    """Of the kernels' source: what was measured for one version says nothing of the next."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_for(device_name: str, versions: dict[str, str], source: str) -> Cache:
    """The user's cache for a device, versions of torch and triton, and the kernels' source: of each its own folder."""
    facts = {"device": device_name, **versions, "source": source}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("DEPTHFUSE_CACHE_DIR") or cache / "depthfuse")
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    slug = re.sub(r"\W+", "-", device_name)
    return Cache(root / "tuning" / f"{slug}-{digest}", facts)


@functools.cache
def user_cache(device: torch.device) -> Cache | None:
    """The user's cache for what is installed here and the GPU `device`; None for a device that is no GPU."""
    if device.type != "cuda":
        return None
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return cache_for(torch.cuda.get_device_name(device), versions, source_digest())
