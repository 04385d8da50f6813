"""The operators of real networks, each with the same at so few images that a few of its workgroups can run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton

from benchmarks.gfx908.launches import TARGET
from benchmarks.gfx908.operators import DTYPES
from benchmarks.kernels.cases import Case
from benchmarks.kernels.registry import unique_cases
from depthfuse.kernels.launch import Launch
from depthfuse.measuring.roofline import roofline_us

_FEW_IMAGES = (1, 8, 32, 128)


@dataclass(frozen=True)
class LaunchRow:
    """What each row of a table says of its launch.

    Attributes:
        plain, merged: how many layers of the network are this operator, as it comes and with every block merged, where
            no block runs in one launch.
    """

    triton: str
    network: str
    batch: int
    op: str
    dtype: str
    shape: str
    plain: int
    merged: int


@dataclass(frozen=True)
class NetworkCase:
    """An operator of a network, in a dtype. small: images -> the same for so many, fewest first; layers: that it is,
    see `unique_cases`.
    """

    network: str
    case: Case
    small: dict[int, Case]
    batch: int
    dtype: str
    layers: list[str]

    def facts(self) -> dict[str, Any]:
        """What each row says of it."""
        return {
            "triton": triton.__version__,
            "network": self.network,
            "batch": self.batch,
            "op": self.case.op,
            "dtype": self.dtype,
            "shape": self.case.shape(),
            **layers_of(self.layers),
        }

    def launch(self) -> Launch:
        """Its last one."""
        return self.case.launches(DTYPES[self.dtype], TARGET)[-1]

    def bytes_moved(self) -> int:
        return self.case.elements_moved() * DTYPES[self.dtype].itemsize

    def roofline_us(self) -> float:
        return roofline_us(
            "gfx908", self.case.flops(), self.bytes_moved(), DTYPES[self.dtype], self.case.matrix
        )


def cases_of(
    networks: list[str], batches: list[int], ops: list[str] | None, dtypes: list[str]
) -> Iterator[NetworkCase]:
    """Each distinct operator of the networks, merged and not."""
    for network in networks:
        by_name = {
            n: {names[0]: case for case, names in unique_cases(network, n).items()} for n in _FEW_IMAGES
        }
        for batch in batches:
            for case, names in unique_cases(network, batch).items():
                small = {images: by_name[images][names[0]] for images in _FEW_IMAGES if images <= batch}
                for dtype in dtypes:
                    if (ops is None or case.op in ops) and case.supports(DTYPES[dtype]):
                        yield NetworkCase(network, case, small, batch, dtype, names)


def layers_of(names: list[str]) -> dict[str, int]:
    """How many of these layers (see `unique_cases`) are of the plain and of the merged network, run one by one."""
    single = [name for name in names if "(" not in name]
    merged = sum(name.endswith(", merged") for name in single)
    return {"plain": len(single) - merged, "merged": merged}
