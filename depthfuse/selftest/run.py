"""Run the self-test: each op in a process of its own, so that one that crashes or hangs takes nothing with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch

from depthfuse.errors import BackendError
from depthfuse.ops.backend import resolve_backend
from depthfuse.ops.trust import keep_verdict
from depthfuse.selftest.cases import CASES, OPS, SUMS, Case, Sample

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STATES = ("passed", "failed", "refused")


@dataclass(frozen=True)
class Check:
    """One case in one dtype.

    state: one of STATES. reason: why it failed or was refused. share: the largest error as a share of what rounding
    allows, where it was computed.
    """

    op: str
    case: str
    dtype: str
    state: str
    reason: str = ""
    share: float | None = None


def check(case: Case, dtype: torch.dtype, device: torch.device, backend: str) -> Check:
    """Run one case on exact integers and on real values, in this process."""
    name = str(dtype).removeprefix("torch.")
    interpreted = device.type == "cpu" and backend == "triton"

    def ended(state: str, reason: str = "", share: float | None = None) -> Check:
        return Check(case.op, case.name, name, state, reason, share)

    if interpreted and dtype is torch.bfloat16:
        return ended("refused", "Triton's interpreter rounds bfloat16 towards zero")
    sums, share = SUMS if backend == "triton" else None, None
    torch.manual_seed(0)
    try:
        if case.exact:
            computed, wanted = case.run(Sample(device, dtype, True, interpreted), backend, sums)
            off = (computed.double() - wanted.value.to(dtype).double()).abs().max().item()
            if off != 0:  # NaN is not 0 either
                return ended("failed", f"integers, whose sums are exact, are off by {off:.3g}")
        if case.real:
            computed, wanted = case.run(Sample(device, dtype, False, interpreted), backend, sums)
            shares = (computed.double() - wanted.value).abs() / wanted.error
            share = shares.nan_to_num(nan=float("inf")).max().item()
            if share > 1:
                return ended("failed", f"the error is {share:.3g} times what rounding allows", share)
    except BackendError as error:
        return ended("refused", _line(error))
    except Exception as error:  # compilers and drivers raise what they like
        return ended("failed", f"{type(error).__name__}: {_line(error)}")
    return ended("passed", share=share)


def check_op(op: str, device: torch.device, backend: str) -> Iterator[Check]:
    """All cases of an op in all dtypes, in this process."""
    for case in CASES:
        if case.op == op:
            yield from (check(case, dtype, device, backend) for dtype in DTYPES)


def self_test(
    device: torch.device | str,
    ops: Iterable[str] = OPS,
    limit_s: float = 300.0,
    report: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Test every op on a device, and keep what was found: `accelerate` leaves to PyTorch what failed.

    On a GPU, and in Triton's interpreter (TRITON_INTERPRET=1), it is the Triton kernels that are tested; elsewhere what
    PyTorch computes in their place.

    Args:
        device: "cuda:0", "cpu", ... ops: names of `OPS`. limit_s: seconds that all checks of one op may take.
        report: called with each check as soon as it is known.

    Raises:
        ValueError: an op that is none.
    """
    ops = tuple(ops)
    if unknown := set(ops) - set(OPS):
        raise ValueError(f"unknown ops {', '.join(sorted(unknown))}; expected some of {', '.join(OPS)}")
    device = torch.device(device)
    device = torch.device("cuda", device.index or 0) if device.type == "cuda" else device
    tested = tested_backend(device)
    found: list[Check] = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for checks in pool.map(lambda op: _in_a_child(op, device, tested, limit_s), ops):
            for each in checks:
                found.append(each)
                report(each)
    if tested == "triton":
        for op in ops:
            failed = [each for each in found if each.op == op and each.state == "failed"]
            keep_verdict(op, device, {getattr(torch, e.dtype): f"{e.case}: {e.reason}" for e in failed})
    return found


def tested_backend(device: torch.device) -> str:
    """ "triton" where the kernels run, else "reference"."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "triton"
    return resolve_backend("auto", device)[0]


def _in_a_child(op: str, device: torch.device, backend: str, limit_s: float) -> list[Check]:
    command = [sys.executable, "-m", "depthfuse.selftest.run", op, str(device), backend]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        lines, end = done.stdout, f"the process ended with {done.returncode}"
        if done.returncode and done.stderr.strip():
            end += f": {done.stderr.strip().splitlines()[-1][:200]}"
    except subprocess.TimeoutExpired as error:
        lines = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        end = f"more than {limit_s:.0f} s"
    found = [Check(**json.loads(line)) for line in lines.splitlines() if line.startswith("{")]
    known = {(each.case, each.dtype) for each in found}
    for case in CASES:
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            if case.op == op and (case.name, name) not in known:
                found.append(Check(op, case.name, name, "failed", end))
    return found


def _line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0][:200]


def main() -> None:
    """The child: one check a line, as JSON."""
    op, device, backend = sys.argv[1:]
    for each in check_op(op, torch.device(device), backend):
        sys.stdout.write(json.dumps(asdict(each)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
