"""The launches of real networks at batch 1, as a card would get them: a few workgroups of each run by gfx908 code.

What the workgroups have written is compared with float64: bit for bit on integers where those stay exact, within the
bound on reals elsewhere. Launches that run the same code are run once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from benchmarks.gfx908.faults import Fault, Unsupported
from benchmarks.gfx908.launches import TARGET, execute, program_of
from benchmarks.gfx908.operators import DTYPES, RIGHT, judge, poisoned
from benchmarks.kernels.block_cases import (
    AttentionCase,
    DepthwisePointwiseCase,
    InvertedResidualCase,
    MlpCase,
    PoolLinearCase,
)
from benchmarks.kernels.cases import NORM_EPS, Case, Conv2dCase, DepthwiseCase, LinearCase, WinogradCase
from benchmarks.kernels.prove import tile_of
from benchmarks.kernels.registry import unique_cases
from benchmarks.kernels.resources import key_of
from depthfuse.kernels.arguments import Tail, ThreeLayers, TwoLayers, Window
from depthfuse.kernels.launch import Launch, stand_in
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import Value

_SUMS = torch.float32


@dataclass(frozen=True)
class Row:
    """A launch of a network's operator, and how what some of its workgroups wrote compares."""

    triton: str
    network: str
    op: str
    dtype: str
    values: str
    shape: str
    tile: str
    workgroups: str  # that ran, of all
    compared: int  # elements of the output
    outcome: str
    share: float
    seconds: float


def wanted(case: Case, operands: dict[str, torch.Tensor | None]) -> Value:
    """The operator in float64, with the error that is allowed."""
    x, *rest = operands.values()
    eps = NORM_EPS if getattr(case, "norm", False) else None
    if isinstance(case, Conv2dCase):
        weight, bias, residual, scale, shift = rest[:5]
        groups = case.channels if isinstance(case, DepthwiseCase) else 1
        window = Window((case.stride,) * 2, (case.padding,) * 2, groups=groups)
        return oracle.conv2d(x, weight, Tail(bias, residual, scale, shift, case.act), window, eps, sums=_SUMS)
    if isinstance(case, LinearCase):
        weight, *tail = rest
        return oracle.linear(x, weight, Tail(*tail, case.act), eps, sums=_SUMS)
    if isinstance(case, InvertedResidualCase):
        *weights, bias, residual = rest
        tail = Tail(bias, residual)
        return oracle.inverted_residual(x, ThreeLayers(*weights), tail, case.stride, case.act, sums=_SUMS)
    if isinstance(case, DepthwisePointwiseCase):
        w1, b1, w2, *tail = rest
        window = Window(padding=(case.kernel // 2,) * 2)
        layers, tail = TwoLayers(w1, b1, w2), Tail(*tail, case.act)
        return oracle.depthwise_pointwise(x, layers, tail, window, case.act_inner, sums=_SUMS)
    if isinstance(case, MlpCase):
        w1, b1, w2, b2, residual = rest
        return oracle.mlp(x, TwoLayers(w1, b1, w2), Tail(b2, residual), "gelu", eps, sums=_SUMS)
    if isinstance(case, PoolLinearCase):
        return oracle.pool_linear(x, *rest, eps, sums=_SUMS)
    if isinstance(case, AttentionCase):
        return oracle.attention(x, case.heads, sums=_SUMS)
    raise TypeError(f"no float64 reference for {type(case).__name__}; add it to networks.py")


def is_exact(case: Case) -> bool:
    """Whether small integers stay exact: no division, no root, and activations that keep integers."""
    if isinstance(case, MlpCase | PoolLinearCase | AttentionCase) or getattr(case, "norm", False):
        return False
    names = (getattr(case, "act", "none"), getattr(case, "act_inner", "none"))
    return all(name in oracle.EXACT_ACTS for name in names)


def parts_of(grid: tuple[int, ...], splits: int) -> list[tuple[int, int]]:
    """Along the second and third axis: the middle one, or all where sums are split, for those need all their parts."""
    y, z = (*grid, 1, 1)[1:3]
    return [(j, k) for k in range(z) for j in range(y)] if splits > 1 else [(y // 2, z // 2)]


def few(grid: tuple[int, ...], splits: int) -> list[tuple[int, int, int]]:
    """First, middle and last programs of the first axis, each with its parts; also the last of all."""
    x, y, z = (*grid, 1, 1)[:3]
    chosen = {(i, j, k) for i in (0, x // 2, x - 1) for j, k in parts_of(grid, splits)}
    return sorted(chosen | {(x - 1, y - 1, z - 1)})


def some_of(launch: Launch) -> list[tuple[int, int, int]]:
    return few(launch.grid, launch.arguments.get("SPLITS", 1))


def operands_of(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    """Small integers where they stay exact, else standard normal values; the same at every call."""
    torch.manual_seed(0)
    operands = case.operands(dtype, "cpu")
    if not is_exact(case):
        return operands
    for tensor in {id(t): t for t in operands.values() if t is not None}.values():
        tensor.copy_(torch.randint(-1, 2, tensor.shape) * (torch.rand(tensor.shape) < 0.3))
    if isinstance(case, WinogradCase):
        from depthfuse.kernels.winograd import pack_weight

        operands["weight"].mul_(4)  # the transform divides by four
        operands["packed"] = pack_weight(operands["weight"])
    return operands


def check(network: str, case: Case, dtype: str) -> Row:
    """Run some workgroups of one operator, and compare."""
    start, outcome, share, compared = time.perf_counter(), RIGHT, 0.0, 0
    operands, launches = operands_of(case, DTYPES[dtype]), []

    def run(launch: Launch) -> None:
        launches.append(launch)
        last = len(launches) == count
        execute(launch, program_of(launch), some_of(launch) if last else None)

    count = len(case.launches(DTYPES[dtype], TARGET))
    with stand_in(TARGET, run), poisoned():
        try:
            y = case.ours(**operands)
            value, error = wanted(case, operands)
            written = ~y.isnan()
            compared = int(written.sum())
            pair = Value(value.reshape(y.shape)[written], error.reshape(y.shape)[written])
            outcome, share = (
                judge(y[written], pair, is_exact(case)) if compared else ("nothing was written", 0.0)
            )
        except (Fault, Unsupported) as fault:
            outcome = f"{type(fault).__name__}: {fault}"
    ran, grid = some_of(launches[-1]), launches[-1].grid
    return Row(
        triton=triton.__version__,
        network=network,
        op=case.op,
        dtype=dtype,
        values="integers" if is_exact(case) else "reals",
        shape=case.shape(),
        tile=tile_of(launches[-1]),
        workgroups=f"{len(ran)} of {torch.Size(grid).numel()}",
        compared=compared,
        outcome=outcome,
        share=round(share, 4),
        seconds=round(time.perf_counter() - start, 2),
    )


def rows(networks: list[str], ops: list[str] | None, dtypes: list[str]) -> Iterator[Row]:
    """Each operator of the networks, merged and not, whose code has not run before."""
    done: set[str] = set()
    for network in networks:
        for case in unique_cases(network, 1):
            for dtype in dtypes:
                if (ops is not None and case.op not in ops) or not case.supports(DTYPES[dtype]):
                    continue
                if isinstance(case, WinogradCase) and not is_exact(case):
                    continue  # the bound on reals is that of a direct product
                keys = {key_of(launch, TARGET) for launch in case.launches(DTYPES[dtype], TARGET)}
                if not keys <= done:
                    done |= keys
                    yield check(network, case, dtype)
