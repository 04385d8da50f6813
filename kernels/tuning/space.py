"""The configurations that are worth measuring for a launch, and what they would use, estimated before compiling.

A configuration that needs more shared memory than a program may have does not run, and one that needs more registers
than a thread may have spills, which is slower than its smaller neighbour: neither is compiled. The estimates count what
is large and certain, the tiles in flight and the accumulators, and leave a margin for the rest.

`pool_linear` is not here: the batch chooses between its two forms, and its programs are too small to matter.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch

from depthfuse.kernels.attention import AttentionConfig
from depthfuse.kernels.conv2d import FLAT_BELOW
from depthfuse.kernels.depthwise import DepthwiseConfig
from depthfuse.kernels.depthwise_pointwise import DepthwisePointwiseConfig
from depthfuse.kernels.device.tile import GemmConfig
from depthfuse.kernels.inverted_residual import InvertedResidualConfig
from depthfuse.kernels.launch import DRAINED, IN_FLIGHT, REORDERED, Target, ceil_div, next_power_of_2
from depthfuse.kernels.mlp import MlpConfig, pieces
from depthfuse.kernels.tuning.lookup import Request
from depthfuse.kernels.winograd import WinogradConfig

_REGISTER_MARGIN = 48  # addresses, masks, operands of the matrix instruction in hand


@dataclass(frozen=True)
class Usage:
    """What one program would use, by estimate.

    Attributes:
        shared_bytes: shared memory (LDS) for the tiles in flight.
        registers: 32-bit registers a thread, the margin included.
    """

    shared_bytes: int
    registers: int


MOST = 12  # of a request: each is compiled, which takes a second or more, and there are hundreds of requests


def candidates(request: Request, most: int = MOST) -> list[Any]:
    """The configurations to measure for `request`: of those within the target's limits the nearest to the heuristic's,
    which is a good guess, nearest first. None for an unknown op.
    """
    if request.op not in _SPACES:
        return []
    space, usage = _SPACES[request.op]
    shape = dict(request.shape)
    fitting = [
        config
        for config in dict.fromkeys(space(request, shape))
        if config != request.heuristic and fits(usage(config, request, shape), config, request.target)
    ]
    return sorted(fitting, key=lambda config: distance(config, request.heuristic))[:most]


def distance(config: Any, other: Any) -> float:
    """How many doublings or halvings lie between two configurations, all fields together."""
    pairs = zip(astuple(config), astuple(other), strict=True)
    return sum(abs(math.log2(max(a, 0.5) / max(b, 0.5))) for a, b in pairs)


def fits(usage: Usage, config: Any, target: Target) -> bool:
    """Whether a program of this usage runs on the target without spills, by estimate."""
    return usage.shared_bytes <= target.shared_bytes and usage.registers <= register_limit(
        config.num_warps, target
    )


def register_limit(num_warps: int, target: Target) -> int:
    """Registers that a thread may have where `num_warps` share a program.

    NVIDIA: 255, of 65,536 a multiprocessor. AMD: 512 (vector and accumulation registers), of which two waves a SIMD
    take half each; programs of more than 8 waves put more than two on each of the four SIMDs.
    """
    if target.backend == "hip":
        return 512 // max(2, ceil_div(num_warps, 4))
    return min(255, 65536 // (32 * num_warps))


def threads(num_warps: int, target: Target) -> int:
    return num_warps * (64 if target.backend == "hip" else 32)


def stages_in_flight(num_stages: int, target: Target) -> int:
    """Tiles that lie in shared memory at once; AMD's pipeline holds the newest one in registers."""
    return max(1, num_stages - 1) if target.backend == "hip" else num_stages


def gemm_usage(config: GemmConfig, request: Request, shape: dict[str, int]) -> Usage:
    """A matrix product: both operands' tiles for each stage in shared memory, accumulators in registers.

    Float32 on NVIDIA has no matrix instruction, so both operands' tiles are in registers too.
    """
    target, dtype = request.target, request.dtype
    operands = (config.block_m + config.block_n) * config.block_k
    values = config.block_m * config.block_n
    if target.backend == "cuda" and dtype is torch.float32:
        values += operands
    if request.op == "conv2d" and shape["channels"] < FLAT_BELOW:
        values += config.block_m * config.block_k  # every element of a flat step has an address of its own
    return Usage(
        stages_in_flight(config.num_stages, target) * operands * dtype.itemsize,
        _REGISTER_MARGIN + ceil_div(values, threads(config.num_warps, target)),
    )


def _gemm_space(request: Request, rows: int, columns: int, depth: int, products: int) -> Iterator[GemmConfig]:
    target, dtype = request.target, request.dtype
    fma = target.backend == "cuda" and dtype is torch.float32
    sizes = (32, 64) if fma else (32, 64, 128, 256)
    steps = (16, 32) if fma else (32, 64) if dtype.itemsize == 2 else (32,)
    stages = (1, 2) if target.backend == "hip" else (2, 3) if fma else (2, 3, 4)
    for block_m, block_n, block_k in itertools.product(sizes, sizes, steps):
        # wider than the output is waste, past the narrowest tile that there is
        if block_m > max(32, next_power_of_2(rows)) or block_n > max(32, next_power_of_2(columns)):
            continue
        if block_k > max(32, next_power_of_2(depth)) or block_m * block_n > 128 * 256:
            continue
        tiles = ceil_div(rows, block_m) * ceil_div(columns, block_n) * products
        for num_warps, num_stages, splits in itertools.product((1, 2, 4, 8), stages, (1, 2, 4, 8)):
            # a thread with few values does little between its loads, and with many has no registers for them
            if not 16 <= block_m * block_n // threads(num_warps, target) <= (32 if fma else 128):
                continue
            # parts only where tiles leave compute units idle, and of two steps at least
            idle = tiles * splits <= 2 * target.compute_units
            if splits > 1 and not (idle and ceil_div(depth, block_k) >= 2 * splits):
                continue
            config = GemmConfig(block_m, block_n, block_k, 8, num_warps, num_stages, splits)
            if target.backend == "hip":
                nonkdim = 32 if block_m * block_n >= 64 * 64 else request.heuristic.nonkdim
                config = replace(config, nonkdim=nonkdim, kpack=2 if dtype.itemsize == 2 else 1)
            overlaps = (
                (DRAINED, IN_FLIGHT, REORDERED) if target.arch == "gfx908" else (request.heuristic.overlap,)
            )
            yield from (replace(config, overlap=overlap) for overlap in overlaps)


def _linear_space(request: Request, shape: dict[str, int]) -> Iterator[GemmConfig]:
    yield from _gemm_space(request, shape["rows"], shape["out_channels"], shape["channels"], 1)


def _conv2d_space(request: Request, shape: dict[str, int]) -> Iterator[GemmConfig]:
    few = shape["channels"] < FLAT_BELOW  # the stem, which the heuristic for AMD places by hand
    if few and request.target.backend == "hip":
        return
    # Tap by tap, a step may not cross into the next tap.
    depth = shape["taps"] * shape["channels"] if few else shape["channels"]
    yield from _gemm_space(request, shape["pixels"], shape["out_channels"], depth, shape["groups"])


def depthwise_usage(config: DepthwiseConfig, request: Request, shape: dict[str, int]) -> Usage:
    """A depthwise convolution: the patch's sums and one input row of it, float32 in registers."""
    row = (config.patch_w - 1) * shape["stride_w"] + shape["kernel_w"]
    elements = ceil_div(config.patches * config.block_c, threads(config.num_warps, request.target))
    return Usage(0, _REGISTER_MARGIN + elements * (config.patch_h * config.patch_w + row))


def _depthwise_space(request: Request, shape: dict[str, int]) -> Iterator[DepthwiseConfig]:
    unrolled = shape["kernel_h"] * shape["kernel_w"] <= 9
    heights = (1, 2, 4) if unrolled else (1,)  # larger kernels are unrolled row by row only, see depthwise.py
    widths = [width for width in (1, 2, 4, 7, 8) if width <= max(1, shape["out_width"])]
    channels = shape["channels"]
    blocks = (
        [next_power_of_2(channels)]
        if shape["norm"]
        else [c for c in (32, 64, 128) if c < 2 * max(32, channels)]
    )
    for patch_h, patch_w, block_c in itertools.product(heights, widths, blocks):
        for num_warps, per_thread in itertools.product((1, 2, 4, 8), (2, 4, 8)):
            patches = threads(num_warps, request.target) * per_thread // block_c
            if patches >= 1:
                yield DepthwiseConfig(patch_h, patch_w, patches, block_c, num_warps)


def inverted_residual_usage(config: InvertedResidualConfig, request: Request, shape: dict[str, int]) -> Usage:
    """An inverted residual: pixels and the step's expanded tile pass through shared memory, and stay in registers."""
    rows = config.patches * config.in_h * config.in_w
    channels = max(16, next_power_of_2(shape["channels"]))
    outputs = max(16, next_power_of_2(shape["out_channels"]))
    shared = rows * (channels + config.block_hidden) * request.dtype.itemsize
    # a quarter of the rows are outputs; the expanded tile is there once whole and once taken apart
    values = rows * 2 * config.block_hidden + rows // 4 * outputs
    return Usage(shared, _REGISTER_MARGIN + ceil_div(values, threads(config.num_warps, request.target)))


def _inverted_residual_space(request: Request, shape: dict[str, int]) -> Iterator[InvertedResidualConfig]:
    patch = (4, 4) if shape["stride"] == 1 else (4, 8)  # all that the compiler handles well, see the kernel
    for rows, num_warps in itertools.product((64, 128, 256, 512), (2, 4, 8)):
        yield InvertedResidualConfig(*patch, rows // (patch[0] * patch[1]), num_warps)


def depthwise_pointwise_usage(
    config: DepthwisePointwiseConfig, request: Request, shape: dict[str, int]
) -> Usage:
    """Depthwise and 1x1: filtered rows and a step of the weight in shared memory, all sums in registers."""
    rows = config.patches * config.patch_w
    outputs = max(16, next_power_of_2(shape["out_channels"]))
    per_program = threads(config.num_warps, request.target)
    row = (config.patch_w - 1) * shape["stride_w"] + shape["kernel_w"] + config.patch_w
    registers = ceil_div(config.patches * config.block_c, per_program) * row + ceil_div(
        rows * outputs, per_program
    )
    return Usage(config.block_c * (rows + outputs) * request.dtype.itemsize, _REGISTER_MARGIN + registers)


def _depthwise_pointwise_space(request: Request, shape: dict[str, int]) -> Iterator[DepthwisePointwiseConfig]:
    for patch_w, rows, num_warps in itertools.product((2, 4, 8), (32, 64, 128), (4, 8)):
        yield DepthwisePointwiseConfig(patch_w, rows // patch_w, 32, num_warps)


def winograd_usage(config: WinogradConfig, request: Request, shape: dict[str, int]) -> Usage:
    """Winograd: 16 accumulators and 16 transformed inputs, float32, in registers; a pair of tiles in shared memory."""
    values = 16 * config.block_t * (config.block_n + config.block_c)
    shared = (config.block_t + config.block_n) * config.block_c * request.dtype.itemsize
    return Usage(shared, _REGISTER_MARGIN + ceil_div(values, threads(config.num_warps, request.target)))


def _winograd_space(request: Request, shape: dict[str, int]) -> Iterator[WinogradConfig]:
    for block_t, block_n, block_c in itertools.product((16, 32, 64), (16, 32, 64), (16, 32)):
        for num_warps in (4, 8):
            yield WinogradConfig(block_t, block_n, block_c, num_warps)


def mlp_usage(config: MlpConfig, request: Request, shape: dict[str, int]) -> Usage:
    """An MLP: rows, both weights' steps and the hidden step in shared memory; accumulators of both products."""
    channels, outputs = sum(pieces(shape["channels"])), sum(pieces(shape["out_channels"]))
    weights = config.block_hidden * (channels + outputs)
    held = config.block_m * (channels + config.block_hidden)
    in_flight = stages_in_flight(config.num_stages, request.target)
    values = config.block_m * (outputs + config.block_hidden)
    return Usage(
        (in_flight * weights + held) * request.dtype.itemsize,
        _REGISTER_MARGIN + ceil_div(values, threads(config.num_warps, request.target)),
    )


def _mlp_space(request: Request, shape: dict[str, int]) -> Iterator[MlpConfig]:
    for block_m, block_hidden, num_warps, num_stages in itertools.product(
        (32, 64, 128), (32, 64), (4, 8), (1, 2)
    ):
        yield MlpConfig(block_m, block_hidden, num_warps, num_stages)


def attention_usage(config: AttentionConfig, request: Request, shape: dict[str, int]) -> Usage:
    """Attention: keys and values of each stage, queries, weights in shared memory; scores and output in registers."""
    dim = next_power_of_2(shape["head_dim"])
    in_flight = stages_in_flight(config.num_stages, request.target)
    elements = 2 * in_flight * config.block_n * dim + config.block_m * (dim + config.block_n)
    values = config.block_m * (config.block_n + dim)
    return Usage(
        elements * request.dtype.itemsize,
        _REGISTER_MARGIN + ceil_div(values, threads(config.num_warps, request.target)),
    )


def _attention_space(request: Request, shape: dict[str, int]) -> Iterator[AttentionConfig]:
    half_on_amd = request.target.backend == "hip" and request.dtype.itemsize == 2
    stages = (1, 2) if request.target.backend == "hip" else (1, 2, 3)
    widest = max(32, next_power_of_2(shape["tokens"]))
    for block_m, block_n, num_warps, num_stages in itertools.product(
        (32, 64, 128), (32, 64, 128), (2, 4, 8), stages
    ):
        # a warp holds whole rows of scores, 16 at least
        if block_m <= widest and block_n <= widest and 16 * num_warps <= block_m:
            yield AttentionConfig(block_m, block_n, num_warps, num_stages, interleave=4 if half_on_amd else 1)


_SPACES: dict[str, tuple[Callable[..., Iterator[Any]], Callable[..., Usage]]] = {
    "linear": (_linear_space, gemm_usage),
    "conv2d": (_conv2d_space, gemm_usage),
    "depthwise_conv2d": (_depthwise_space, depthwise_usage),
    "inverted_residual": (_inverted_residual_space, inverted_residual_usage),
    "depthwise_pointwise": (_depthwise_pointwise_space, depthwise_pointwise_usage),
    "winograd_conv2d": (_winograd_space, winograd_usage),
    "mlp": (_mlp_space, mlp_usage),
    "attention": (_attention_space, attention_usage),
}
