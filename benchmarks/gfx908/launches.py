"""Runs a planned launch by its gfx908 code, on tensors on the CPU."""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch

from benchmarks.gfx908 import hazards, waits
from benchmarks.gfx908.assembly import parse
from benchmarks.gfx908.machine import Program
from benchmarks.gfx908.memory import Memory
from benchmarks.gfx908.running import ARGUMENTS, argument_segment, hidden_values, run
from benchmarks.kernels.resources import compile_launch, key_of, source_of
from depthfuse.kernels.launch import TARGETS, Launch

TARGET = TARGETS["gfx908"]
WRITTEN_FIRST = frozenset({"y", "parts"})  # arguments that hold nothing before a launch

_FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f"}
_programs: dict[str, Program] = {}


def program_of(launch: Launch, change: Callable[[str], str] | None = None) -> Program:
    """Compile a launch for gfx908 and decode it, once.

    Args:
        change: what is done to the assembly first, such as taking a barrier away.

    Raises:
        Fault: too few wait states between two instructions, or a wait that is missing on any way. Unsupported.
    """
    key = key_of(launch, TARGET)
    if key in _programs and change is None:
        return _programs[key]
    compiled = compile_launch(launch, TARGET)
    text = compiled.asm["amdgcn"]
    text = change(text) if change else text
    program = Program(parse(text, compiled.metadata.shared, compiled.metadata.num_warps))
    hazards.check(program)
    waits.check(program)
    if change is None:
        _programs[key] = program
    return program


def octets_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor on the CPU, as uint8, sharing its memory: from its first element to the end of its storage,
    for packed weights have zeros after their last element, which kernels read.
    """
    length = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((length,), (1,)).view(torch.uint8)


def execute(
    launch: Launch,
    program: Program,
    workgroups: list[tuple[int, int, int]] | None = None,
    watcher: object = None,
) -> None:
    """Run a launch whose tensors are on the CPU; what it writes is in them afterwards.

    Args:
        workgroups: which programs of the grid; None for all. watcher: see `Machine`.

    Raises:
        Fault: the code does what hardware does not promise to get right. Unsupported.
    """
    tensors = {n: t for n, t in launch.arguments.items() if isinstance(t, torch.Tensor)}
    names = {name: _same_place(name, tensor, tensors) for name, tensor in tensors.items()}
    own = {name: octets_of(tensors[name]).numpy() for name in dict.fromkeys(names.values())}
    # Addresses are known once the sizes are, and the segment that holds them is one of the blocks.
    grid = (*launch.grid, 1, 1)[:3]
    kernel, arguments = program.kernel, program.kernel.arguments
    hidden = hidden_values(grid, kernel.waves, kernel.lds_bytes)
    memory = Memory(own | {ARGUMENTS: argument_segment(arguments, [], hidden)}, WRITTEN_FIRST & own.keys())
    values = []
    for name, kind in source_of(launch, TARGET).signature.items():
        if kind.startswith("*"):
            values.append(struct.pack("<Q", memory.address(names[name])))
        elif kind != "constexpr":
            values.append(struct.pack(_FORMATS[kind], launch.arguments[name]))
    memory.contents(ARGUMENTS)[:] = argument_segment(arguments, values, hidden)
    run(program, memory, grid, workgroups, watcher)
    for name, octets in own.items():
        if memory.is_written(name):
            octets[:] = memory.contents(name)


def _same_place(name: str, tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> str:
    """The first of the tensors that lies where this one lies: a skip is the input once more."""
    return next((other for other, t in tensors.items() if t.data_ptr() == tensor.data_ptr()), name)
