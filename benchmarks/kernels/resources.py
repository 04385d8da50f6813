"""Compile a planned launch for a card that need not be there, and read off what its code will use.

Triton compiles for AMD and NVIDIA without either. From AMD's assembly (`amd_code.py`) and NVIDIA's cubin
(`nvidia_code.py`) come registers, spills, memory, instructions and what loops do; occupancy follows from them.
"""

import hashlib
import re
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.kernels.amd_code import AmdCode
from benchmarks.kernels.nvidia_code import disassemble
from benchmarks.kernels.occupancy import SIMDS, amd_workgroups, nvidia_workgroups
from benchmarks.kernels.opcodes import counted
from depthfuse.devices import DEVICES
from depthfuse.kernels.launch import Launch, Target, extent

_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


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
        workgroups: programs that a compute unit (multiprocessor) holds at once.
        occupancy: waves (warps) that one SIMD (a quarter of a multiprocessor) holds at once, of whole programs.
        matrix: matrix instructions and how often each stands in the code.
        shared_reads: instructions that read LDS or shared memory, likewise.
        narrow_reads_in_loop: 16-bit LDS reads inside a loop (AMD).
        global_loads: instructions that read global memory inside a loop, by width, and how often each stands there.
        barriers: barriers inside loops (AMD; 0 for NVIDIA, as all that follows: there hardware counts each copy).
        drained_barriers: those of them before which a wave waits for all its global loads, so that to load ahead
            is void.
        accumulator_copies: moves from and to accumulators in the innermost loops with matrix instructions.
        vector_clocks: clocks a wave of the vector unit, once around the heaviest of those loops.
        matrix_clocks: likewise of the matrix unit. The smaller of both can at best hide behind the larger.
    """

    registers: int
    accumulators: int
    spills: int
    private_bytes: int
    shared_bytes: int
    workgroups: int
    occupancy: float
    matrix: str
    shared_reads: str
    narrow_reads_in_loop: int
    global_loads: str
    barriers: int
    drained_barriers: int
    accumulator_copies: int
    vector_clocks: int
    matrix_clocks: int


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

    code = AmdCode(assembly)
    waves, warps = int(re.search(r"; Occupancy: (\d+)", assembly).group(1)), kernel.metadata.num_warps
    workgroups = amd_workgroups(waves, warps, kernel.metadata.shared, DEVICES[target.arch])
    vector, matrix = code.loop_clocks(target.arch)
    return Resources(
        registers=field("vgpr_count"),
        accumulators=field("agpr_count"),
        spills=field("vgpr_spill_count"),
        private_bytes=field("private_segment_fixed_size"),
        shared_bytes=kernel.metadata.shared,
        workgroups=workgroups,
        occupancy=workgroups * warps / SIMDS,
        matrix=counted(code.opcodes, "v_mfma"),
        shared_reads=counted(code.opcodes, "ds_read"),
        narrow_reads_in_loop=len(code.in_loops("ds_read_u16")),
        global_loads=code.global_loads(),
        barriers=code.barriers(),
        drained_barriers=code.drained_barriers(),
        accumulator_copies=code.accumulator_copies(),
        vector_clocks=vector,
        matrix_clocks=matrix,
    )


def _nvidia_resources(kernel: CompiledKernel, target: Target) -> Resources:
    code, usage = disassemble(kernel.asm["cubin"])

    def field(name: str) -> int:
        return int(re.search(rf"\b{name}:(\d+)", usage).group(1))

    registers, warps, shared = field("REG"), kernel.metadata.num_warps, kernel.metadata.shared
    tensor_columns = getattr(kernel.metadata, "tmem_size", 0)
    workgroups = nvidia_workgroups(registers, warps, shared, tensor_columns, DEVICES[target.arch])
    return Resources(
        registers=registers,
        accumulators=0,
        spills=sum(opcode.startswith(("LDL", "STL")) for opcode in code.opcodes),
        private_bytes=field("STACK") + field("LOCAL"),
        shared_bytes=shared,
        workgroups=workgroups,
        occupancy=workgroups * warps / SIMDS,
        matrix=counted(code.opcodes, "HMMA", "HGMMA", "UTCHMMA"),
        shared_reads=counted(code.opcodes, "LDS"),
        narrow_reads_in_loop=0,
        global_loads=code.global_loads(),
        barriers=0,
        drained_barriers=0,
        accumulator_copies=0,
        vector_clocks=0,
        matrix_clocks=0,
    )
