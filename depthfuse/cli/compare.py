"""`depthfuse compare`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from depthfuse import log
from depthfuse.cli.command import Invocation
from depthfuse.config import CompareConfig


@dataclass(frozen=True)
class CompareArguments(CompareConfig):
    until: Literal["prepare", "train", "measure"] = "measure"
    """The last step to do. Latencies are measured in the first and the last: nothing else may run then. Training may be
    split: several processes with the same --out and different --seeds, then one with all seeds."""


def compare(invocation: Invocation) -> None:
    given = invocation.settings(CompareArguments)
    from depthfuse.cli.tables import print_comparison
    from depthfuse.rivals import compare

    settings = {f.name: getattr(given, f.name) for f in dataclasses.fields(CompareConfig)}
    out = compare.compare(CompareConfig(**settings), given.until)
    if given.until == "measure" and log.is_main_process():
        print_comparison(out)
