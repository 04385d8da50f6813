"""Compile a planned launch for a card that need not be there, and read off what its code will use.

Triton compiles for AMD and NVIDIA without either. From AMD's assembly and NVIDIA's cubin come registers, spills, memory
and instructions; occupancy follows from them.
"""

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from depthfuse.devices import DEVICES
from depthfuse.kernels.launch import Launch, Target, extent

_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
_REGISTERS_PER_MULTIPROCESSOR = 65536
_WARPS_PER_MULTIPROCESSOR = 64


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Attributes:
        registers: per thread; on AMD the vector registers.
        accumulators: AMD: accumulation registers (AGPR) where they are a file of their own (gfx908), else part of
            `registers`.
        spills: registers spilled to memory (AMD), loads and stores of such memory in the code (NVIDIA).
        private_bytes: scratch memory a thread.
        shared_bytes: LDS or shared memory of one program.
        occupancy: waves (warps) that one SIMD (a quarter of a multiprocessor) holds at once.
        matrix: matrix instructions and how often each stands in the code.
        shared_reads: instructions that read LDS or shared memory, likewise.
        narrow_reads_in_loop: 16-bit LDS reads inside a loop (AMD).
    """

    registers: int
    accumulators: int
    spills: int
    private_bytes: int
    shared_bytes: int
    occupancy: float
    matrix: str
    shared_reads: str
    narrow_reads_in_loop: int


def source_of(launch: Launch, target: Target) -> ASTSource:
    """The launch as the compiler sees it: as Triton's own launcher specialises it for tensors aligned to 16 bytes."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
            if target.backend == "hip" and extent(value) * value.element_size() < 2**31:
                attributes[(index,)].append(["tt.pointer_range", 32])
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def key_of(launch: Launch, target: Target) -> str:
    """Equal for launches that run the same compiled kernel: Triton's version, source, specialisation, options."""
    parts = (
        triton.__version__,
        source_of(launch, target).hash(),
        target.arch,
        sorted(launch.options.items()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def compile_launch(launch: Launch, target: Target) -> CompiledKernel:
    """Compile; Triton keeps the result in its own cache."""
    if target.backend == "hip":
        gpu = GPUTarget("hip", target.arch, 64)
    else:
        major, minor = target.capability
        gpu = GPUTarget("cuda", 10 * major + minor, 32)
    return triton.compile(source_of(launch, target), target=gpu, options=launch.options)


def resources_of(launch: Launch, target: Target) -> Resources:
    """Compile the launch for `target` and measure the result."""
    kernel = compile_launch(launch, target)
    read = _amd_resources if target.backend == "hip" else _nvidia_resources
    return read(kernel, target)


def _amd_resources(kernel: CompiledKernel, target: Target) -> Resources:
    assembly = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    waves = int(re.search(r"; Occupancy: (\d+)", assembly).group(1))
    shared = kernel.metadata.shared
    if shared:
        waves = min(waves, target.shared_bytes // shared * kernel.metadata.num_warps / 4)
    opcodes = [match.group(1) if match else "" for match in map(_AMD_OPCODE.match, assembly.splitlines())]
    inside_loop = _lines_in_loops(assembly.splitlines())
    return Resources(
        registers=field("vgpr_count"),
        accumulators=field("agpr_count"),
        spills=field("vgpr_spill_count"),
        private_bytes=field("private_segment_fixed_size"),
        shared_bytes=shared,
        occupancy=waves,
        matrix=_count(opcodes, "v_mfma"),
        shared_reads=_count(opcodes, "ds_read"),
        narrow_reads_in_loop=sum(
            inside and opcode.startswith("ds_read_u16")
            for opcode, inside in zip(opcodes, inside_loop, strict=True)
        ),
    )


_AMD_OPCODE = re.compile(r"\s+([a-z]\w+)")


def _lines_in_loops(lines: list[str]) -> list[bool]:
    """For each line, whether control can come back to it: to lie between a label and a jump to it is not enough,
    because compilers put code that leaves a loop between the loop's blocks.
    """
    blocks: list[list[int]] = [[]]  # line numbers
    block_of: dict[str, int] = {}
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            blocks.append([])
            block_of[label.group(1)] = len(blocks) - 1
        blocks[-1].append(number)
        if _BRANCH.match(line) or _AMD_END.match(line):
            blocks.append([])
    successors: list[list[int]] = []
    for index, block in enumerate(blocks):
        last = lines[block[-1]] if block else ""
        branch = _BRANCH.match(last)
        falls_through = not _AMD_END.match(last) and not (branch and branch.group(1) == "s_branch")
        after = [index + 1] if falls_through and index + 1 < len(blocks) else []
        successors.append(after + ([block_of[branch.group(2)]] if branch else []))
    inside = [False] * len(lines)
    for index, block in enumerate(blocks):
        seen, waiting = set(), list(successors[index])
        while waiting:
            reached = waiting.pop()
            if reached not in seen:
                seen.add(reached)
                waiting += successors[reached]
        for number in block:
            inside[number] = index in seen
    return inside


_LABEL = re.compile(r"(\.LBB\w+):")
_BRANCH = re.compile(r"\s+(s_c?branch\w*)\s+(\.LBB\w+)")
_AMD_END = re.compile(r"\s+s_endpgm\b")


def _nvidia_resources(kernel: CompiledKernel, target: Target) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        code = _run("nvdisasm", "--print-code", str(cubin))

    def field(name: str) -> int:
        return int(re.search(rf"\b{name}:(\d+)", usage).group(1))

    registers, warps, shared = field("REG"), kernel.metadata.num_warps, kernel.metadata.shared
    # Registers are given out to a warp 256 at a time; each program also takes 1 KiB of shared memory.
    programs = _REGISTERS_PER_MULTIPROCESSOR // (-(-registers * 32 // 256) * 256 * warps)
    programs = min(
        programs,
        DEVICES[target.arch].shared_bytes_per_unit // (shared + 1024),
        _WARPS_PER_MULTIPROCESSOR // warps,
    )
    opcodes = _NVIDIA_OPCODE.findall(code)
    return Resources(
        registers=registers,
        accumulators=0,
        spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        private_bytes=field("STACK") + field("LOCAL"),
        shared_bytes=shared,
        occupancy=programs * warps / 4,
        matrix=_count(opcodes, "HMMA", "HGMMA"),
        shared_reads=_count(opcodes, "LDS"),
        narrow_reads_in_loop=0,
    )


_NVIDIA_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")


def _run(tool: str, *arguments: str) -> str:
    """Output of one of the CUDA tools that Triton brings along."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([str(folder / tool), *arguments], check=True, capture_output=True, text=True).stdout


def _count(opcodes: list[str], *prefixes: str) -> str:
    """ "v_mfma_f32_32x32x8f16 x16 ds_read_b128 x8", most frequent first, of the opcodes that start so."""
    found = Counter(opcode for opcode in opcodes if opcode.startswith(prefixes))
    return " ".join(f"{opcode} x{count}" for opcode, count in found.most_common())
