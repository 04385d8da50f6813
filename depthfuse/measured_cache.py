"""What was measured on this machine before, kept per user: one small JSON file for each question.

The files of one environment (device, threads, versions, the sources that were measured) lie in one folder, named after
all that; those of another are never looked at. Each is written beside its place and renamed into it, so that readers
find all or nothing and several processes may write at once: the last wins, and all of them measured the same thing.
The cache is a convenience. What cannot be read is measured again, what cannot be written is measured again next time,
and both are logged.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from depthfuse.checkpoint import load_json, save_json
from depthfuse.devices import capability_of, device_name
from depthfuse.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = "depthfuse.measured/2"
# Folders of the package, whole, so that no file can be forgotten: all that decides how fast a plan runs.
PLAN_SOURCES = ("acceleration", "csrc", "fused", "kernels", "measuring", "native", "ops")
_SUFFIXES = (".py", ".h", ".inc", ".cc")
PACKAGE = Path(__file__).resolve().parent


def cache_folder() -> Path | None:
    """DEPTHFUSE_CACHE_DIR where it is set, else depthfuse/ in the user's cache folder; None for a user without one."""
    given = os.environ.get("DEPTHFUSE_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "depthfuse"
    except RuntimeError:  # neither HOME nor an entry in the list of users, as in some containers
        return None


def environment(device: torch.device, sources: tuple[str, ...] = PLAN_SOURCES) -> dict[str, Any]:
    """All that a measurement on `device` depends on, the measured thing apart; fit for JSON.

    Args:
        sources: folders of the package whose code was measured.
    """
    return {
        "device": device_name(device),
        "capability": capability_of(device),
        "threads": None if device.type == "cuda" else torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "source": source_digest(sources),
    }


@functools.cache
def triton_version() -> str | None:
    """Of the module that would be imported, whatever its distribution is called; None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    distributions = importlib.metadata.packages_distributions().get("triton", [])
    return (
        " ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(distributions))) or "?"
    )


@functools.cache
def source_digest(sources: tuple[str, ...]) -> str:
    """Of every file below these folders of the package: what was measured for one version says nothing of the next."""
    digest = hashlib.sha256()
    for folder in sources:
        root = (PACKAGE / folder).resolve()  # kernels and csrc are links in a checkout
        for path in sorted(p for p in root.rglob("*") if p.suffix in _SUFFIXES):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:24]


class MeasuredCache:
    """Answers to questions in one environment; question and answer are JSON objects.

    Args:
        environment: what all answers depend on, see `environment`.
    """

    def __init__(self, environment: dict[str, Any]) -> None:
        self.environment = environment
        root = cache_folder()
        self.folder = None if root is None else root / _digest(environment)
        if self.folder is None:
            logger.warning(
                "measurements are not kept: this user has no home; set DEPTHFUSE_CACHE_DIR to a folder"
            )
        self._writable = self.folder is not None

    @classmethod
    def of(cls, device: torch.device, sources: tuple[str, ...] = PLAN_SOURCES) -> MeasuredCache:
        """The cache for what runs on `device` here."""
        return cls(environment(device, sources))

    def path(self, question: dict[str, Any]) -> Path:
        """The file that holds the answer to `question`, if there is one. Needs a `folder`."""
        assert self.folder is not None
        return self.folder / f"{_digest(question)}.json"

    def get(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """The answer measured before, or None. A damaged file is logged and counts as none."""
        if self.folder is None or not (path := self.path(question)).exists():
            return None
        try:
            document = load_json(path)
            known = document["format"], document["environment"], document["question"]
            answer = document["answer"]
        except (CheckpointError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): measuring anew", path, error)
            return None
        # Compared as JSON: a tuple in the question comes back as a list.
        if json.dumps(known) != json.dumps((FORMAT, self.environment, question)):
            logger.warning("%s answers another question or is of another format: measuring anew", path)
            return None
        if not isinstance(answer, dict):
            logger.warning("%s holds no answer: measuring anew", path)
            return None
        return answer

    def put(self, question: dict[str, Any], answer: dict[str, Any]) -> None:
        """Keep an answer. A folder that cannot be written to is logged once, and nothing is kept."""
        if not self._writable:
            return
        document = {"format": FORMAT, "environment": self.environment, "question": question, "answer": answer}
        try:
            save_json(self.path(question), document)
        except CheckpointError as error:
            self._writable = False
            logger.warning(
                "measurements are not kept (set DEPTHFUSE_CACHE_DIR to a writable folder): %s", error
            )
