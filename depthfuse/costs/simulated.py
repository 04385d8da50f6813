"""What share of its roofline an operation reaches on a card that is not there, from a simulation of its machine code.

The launches of four networks, in batches of 1 and of 128, were simulated for the MI100 (`python -m benchmarks.gfx908
times`, whose page says how far that can be trusted); an operation is taken to reach what those like it reach. Of a
network that is left out, these sums come within a fifth of its simulated time, where the roofline is a half of it in
large batches and a tenth at batch 1.
"""

from __future__ import annotations

import functools
import heapq
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

_NEIGHBOURS = 3
_NEAR = 0.1  # doublings: how much nearer than this a neighbour is counts for nothing


class Launch(NamedTuple):
    """A simulated launch: whether matrix units do its arithmetic, its size, and what share of the roofline it is."""

    matrix: bool
    flops: float
    bytes_moved: float
    share: float


@functools.cache
def launches(arch: str, dtype: torch.dtype) -> tuple[Launch, ...]:
    """Those of an architecture in a dtype; none of most."""
    path = Path(__file__).parent / f"simulated_{arch}.json"
    if not path.exists():
        return ()
    rows = json.loads(path.read_text())["launches"].get(str(dtype).removeprefix("torch."), [])
    return tuple(Launch(bool(row[0]), *row[1:]) for row in rows)


def share_of_roofline(
    known: tuple[Launch, ...], flops: float, bytes_moved: float, matrix: bool
) -> float | None:
    """Of the nearest launches, near in doublings of both sizes; None where none is known."""
    alike = [launch for launch in known if launch.matrix == matrix]
    if not alike:
        return None

    def distance(launch: Launch) -> float:
        return math.hypot(
            math.log2(max(flops, 1.0) / launch.flops), math.log2(max(bytes_moved, 1.0) / launch.bytes_moved)
        )

    nearest = heapq.nsmallest(_NEIGHBOURS, ((distance(launch), launch.share) for launch in alike))
    weights = [1 / (far + _NEAR) for far, _ in nearest]
    logs = sum(w * math.log(share) for w, (_, share) in zip(weights, nearest, strict=True))
    return math.exp(logs / sum(weights))
