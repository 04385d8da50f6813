"""Every operator of kernels/ run by its gfx908 code, against float64: the cases of `depthfuse.selftest`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from benchmarks.gfx908.faults import Fault, Unsupported
from benchmarks.gfx908.launches import TARGET, execute, program_of
from depthfuse.kernels.launch import Launch, stand_in
from depthfuse.selftest.cases import CASES, SUMS, Case, Sample
from depthfuse.selftest.oracle import Value

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
RIGHT = "right"


@dataclass(frozen=True)
class Row:
    """One operator at one shape, in one dtype.

    Attributes:
        values: "integers", whose result has to be exact, or "reals", within the float64 bound.
        kernels: launched, in order; workgroups and waves: of all of them.
        outcome: RIGHT, or what is wrong.
        share: the largest error as a share of what rounding allows.
    """

    triton: str
    op: str
    case: str
    dtype: str
    values: str
    kernels: str
    workgroups: int
    waves: int
    outcome: str
    share: float
    seconds: float


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within, kernels run by their gfx908 code; the launches that have run."""
    launches: list[Launch] = []

    def run(launch: Launch) -> None:
        launches.append(launch)
        execute(launch, program_of(launch))

    with stand_in(TARGET, run), poisoned():
        yield launches


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within, torch.empty gives NaN, so that an element which nothing writes is seen."""
    empty = torch.empty

    def filled(*size: object, **options: object) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

    torch.empty = filled
    try:
        yield
    finally:
        torch.empty = empty


def check(case: Case, dtype: str, integers: bool, small: bool) -> Row:
    """Run one case and compare. The operands are the same at every call."""
    torch.manual_seed(0)
    start, outcome, share = time.perf_counter(), RIGHT, 0.0
    sample = Sample(torch.device("cpu"), DTYPES[dtype], integers, small)
    with recorded() as launches:
        try:
            outcome, share = judge(*case.run(sample, "triton", SUMS), integers)
        except (Fault, Unsupported) as error:
            outcome = f"{type(error).__name__}: {error}"
    sizes = (
        [(program_of(launch).kernel.waves, launch.grid) for launch in launches] if outcome == RIGHT else []
    )
    workgroups = [torch.Size(grid).numel() for _, grid in sizes]
    return Row(
        triton=triton.__version__,
        op=case.op,
        case=case.name,
        dtype=dtype,
        values="integers" if integers else "reals",
        kernels=" ".join(launch.kernel.fn.__name__ for launch in launches),
        workgroups=sum(workgroups),
        waves=sum(count * waves for count, (waves, _) in zip(workgroups, sizes, strict=True)),
        outcome=outcome,
        share=round(share, 4),
        seconds=round(time.perf_counter() - start, 2),
    )


def judge(computed: torch.Tensor, wanted: Value, exact: bool) -> tuple[str, float]:
    """(outcome, share of the error that is allowed); an element that is NaN is wrong."""
    if exact:
        off = (computed.double() - wanted.value.to(computed.dtype).double()).abs()
        wrong = int((~(off == 0)).sum())
        return (f"{wrong} of {off.numel()} integers are wrong" if wrong else RIGHT), 0.0
    shares = ((computed.double() - wanted.value).abs() / wanted.error).nan_to_num(nan=float("inf"))
    share = shares.max().item()
    return (f"the error is {share:.3g} times what rounding allows" if share > 1 else RIGHT), share


def cases_of(ops: list[str] | None, names: list[str] | None) -> list[Case]:
    """The self-test's cases of these operators and of these names; None: of all."""
    return [c for c in CASES if (ops is None or c.op in ops) and (names is None or c.name in names)]


def rows(cases: list[Case], dtypes: list[str], small: bool) -> Iterator[Row]:
    """Each case, on integers where those come out exact, and on reals."""
    for case in cases:
        for dtype in dtypes:
            for integers, possible in ((True, case.exact), (False, case.real)):
                if possible:
                    yield check(case, dtype, integers, small)
