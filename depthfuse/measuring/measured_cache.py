"""What was measured on this machine before, kept per user: one small JSON file for each question.

The files of one environment (device, threads, versions, the source of the candidates) lie in one folder, named after
all that; those of another are never looked at. Each is written beside its place and renamed into it, so that readers
find all or nothing and several processes may write at once: the last wins, and all of them measured the same thing.
The cache is a convenience. What cannot be read is measured again, what cannot be written is measured again next time,
and both are logged.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from depthfuse.checkpoint import load_json, save_json
from depthfuse.devices import device_name
from depthfuse.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = "depthfuse.measured/1"
# All that decides how fast a candidate runs: whole folders of the package, so that no file can be forgotten.
_SOURCES = ("acceleration", "fused", "kernels", "measuring", "ops")


def cache_folder() -> Path:
    """DEPTHFUSE_CACHE_DIR where it is set, else depthfuse/ in the user's cache folder."""
    given = os.environ.get("DEPTHFUSE_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthfuse"


def environment(device: torch.device) -> dict[str, Any]:
    """All that a measurement on `device` depends on, the measured thing apart; fit for JSON."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}"
        threads = None
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        threads = torch.get_num_threads()
    return {
        "device": device_name(device),
        "capability": capability,
        "threads": threads,
        "torch": torch.__version__,
        "source": _source_digest(),
    }


@functools.lru_cache
def _source_digest() -> str:
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((package / folder).resolve().rglob("*.py")):  # kernels is a link in a checkout
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:24]


class MeasuredCache:
    """Answers to questions about the speed of things on one device; question and answer are JSON objects."""

    def __init__(self, device: torch.device) -> None:
        self.environment = environment(device)
        self.folder = cache_folder() / _digest(self.environment)
        self._writable = True

    def path(self, question: dict[str, Any]) -> Path:
        """The file that holds the answer to `question`, if there is one."""
        return self.folder / f"{_digest(question)}.json"

    def get(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """The answer measured before, or None. A damaged file is logged and counts as none."""
        path = self.path(question)
        if not path.exists():
            return None
        try:
            document = load_json(path)
            known = document["format"], document["environment"], document["question"]
            answer = document["answer"]
        except (CheckpointError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): measuring anew", path, error)
            return None
        # Compared as JSON: a tuple in the question comes back as a list.
        if json.dumps(known) != json.dumps((FORMAT, self.environment, question)) or not isinstance(
            answer, dict
        ):
            logger.warning("%s answers another question or is of another format: measuring anew", path)
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
