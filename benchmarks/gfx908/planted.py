"""Faults planted in compiled kernels: each wait, barrier and nop taken away, waits weakened, registers swapped.

A plant is found when the code does what is watched for, when its text has a hazard, or when its result is another one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from benchmarks.gfx908.assembly import registers
from benchmarks.gfx908.faults import Fault, Unsupported
from benchmarks.gfx908.launches import TARGET, WRITTEN_FIRST, execute, program_of
from benchmarks.gfx908.operators import DTYPES, recorded
from benchmarks.kernels.resources import compile_launch
from depthfuse.kernels.launch import Launch
from depthfuse.selftest.cases import SUMS, Case, Sample

_LINE = re.compile(r"\t(s_waitcnt|s_barrier|s_nop)\b(.*)$")
_OPERANDS = re.compile(r"\t(v_\w+|ds_\w+|buffer_\w+|global_\w+|s_\w+) ([^,\s]+), ([^,\s]+)(.*)$")
_LOADS = ("\tbuffer_load", "\tglobal_load")
SWAPPED = "registers swapped"
_LANDED = {"vmcnt": 63, "lgkmcnt": 15}


@dataclass(frozen=True)
class Plant:
    """One line of assembly, and what is put in its place."""

    kind: str
    line: int  # from 0
    before: str
    after: str

    def into(self, assembly: str) -> str:
        lines = assembly.split("\n")
        assert lines[self.line] == self.before
        lines[self.line] = self.after
        return "\n".join(lines)


def plants(assembly: str, swaps: int, seed: int = 0) -> Iterator[Plant]:
    """Every wait, barrier and nop, and `swaps` instructions drawn at random whose first two registers are swapped."""
    lines, swappable = assembly.split("\n"), []
    end = next(number for number, line in enumerate(lines) if ".amdhsa_kernel" in line)
    code = [number for number, line in enumerate(lines[:end]) if re.match(r"\t[a-z]", line)]
    for before, number, after in zip([0, *code], code, [*code[1:], 0], strict=False):
        line = lines[number]
        if match := _LINE.match(line):
            opcode, operands = match.groups()
            if opcode == "s_nop" and all(lines[n].startswith(_LOADS) for n in (before, after)):
                continue  # for systems that replay loads; see hazards.py
            kind = {"s_waitcnt": "wait removed", "s_barrier": "barrier removed", "s_nop": "nop removed"}[
                opcode
            ]
            yield Plant(kind, number, line, "")
            if opcode == "s_waitcnt":
                for name, most in _LANDED.items():
                    if count := re.search(rf"\b{name}\((\d+)\)", operands):
                        weaker = f"{name}({min(int(count.group(1)) + 1, most)})"
                        yield Plant("wait weakened", number, line, line.replace(count.group(0), weaker))
        elif match := _OPERANDS.match(line):
            first, second = (registers(match.group(n)) for n in (2, 3))
            if (
                first
                and second
                and first != second
                and (first.kind, first.count) == (second.kind, second.count)
            ):
                swappable.append((number, line, f"\t{match[1]} {match[3]}, {match[2]}{match[4]}"))
    for number, line, swapped in random.Random(seed).sample(swappable, min(swaps, len(swappable))):
        yield Plant(SWAPPED, number, line, swapped)


def outcome(launch: Launch, plant: Plant | None) -> tuple[str, bytes]:
    """("", what the launch writes), or (how the plant shows, nothing). The launch's tensors are left as they were."""
    saved = {n: t.clone() for n, t in launch.arguments.items() if isinstance(t, torch.Tensor)}
    for name in WRITTEN_FIRST & saved.keys():
        launch.arguments[name].fill_(float("nan"))
    try:
        program = program_of(launch, plant.into if plant else None)
        execute(launch, program)
        written = launch.arguments["y"]
        return "", written.contiguous().view(torch.uint8).numpy().tobytes()
    except Fault as fault:
        return fault.kind, b""
    except Unsupported:
        return "refused", b""
    finally:
        for name, tensor in saved.items():
            launch.arguments[name].copy_(tensor)


@dataclass(frozen=True)
class Row:
    """What became of one plant. how: the kind of fault, "other result", or "" where nothing showed.

    Not every plant is a fault: a single wave's accesses to LDS are in order without a wait, and registers that are
    swapped may belong to rows of a tile that are beyond the tensor.
    """

    triton: str
    op: str
    case: str
    dtype: str
    waves: int  # of a workgroup
    kind: str
    line: int
    before: str
    after: str
    how: str


def is_lost(row: dict) -> bool:
    """Whether a plant that is a fault was not found."""
    one_wave = row["waves"] == "1" and "lgkmcnt" in row["before"]
    return row["how"] == "" and row["kind"] != SWAPPED and not one_wave


def hunt(launch: Launch, swaps: int) -> Iterator[tuple[Plant, str]]:
    """Plant every fault in a launch's code, one at a time: (plant, how it showed)."""
    _, right = outcome(launch, None)
    assert right
    for plant in plants(compile_launch(launch, TARGET).asm["amdgcn"], swaps):
        how, written = outcome(launch, plant)
        yield plant, how or ("other result" if written != right else "")


def rows(cases: list[Case], dtypes: list[str], small: bool, swaps: int) -> Iterator[Row]:
    """All plants in the last launch of each case, on real values."""
    for case in cases:
        for dtype in dtypes:
            torch.manual_seed(0)
            with recorded() as launches:
                case.run(Sample(torch.device("cpu"), DTYPES[dtype], False, small), "triton", SUMS)
            waves = program_of(launches[-1]).kernel.waves
            for plant, how in hunt(launches[-1], swaps):
                texts = (plant.before.strip(), plant.after.strip())
                place = (triton.__version__, case.op, case.name, dtype, waves)
                yield Row(*place, plant.kind, plant.line + 1, *texts, how)
