"""Two linear layers with an activation between them, in one launch: the MLP of ConvNeXt and ViT blocks.

    y = scale * act(w2 act_inner(w1 n(x) + b1) + b2 + residual) + shift

where n(x) is x, or (`norm_eps` given) LayerNorm of x without its affine, which belongs in w1 and b1. LayerScale
belongs in w2 and b2.

The hidden tensor is four times as wide as x, and two launches write and read it. Here a program owns BLOCK_M rows,
keeps them whole, and walks the hidden channels: it computes BLOCK_HIDDEN of them, applies the activation, and adds
their share to the output's accumulator. Every program reads both weights, from L2, so rows must be many enough to hide
that; and a row, its hidden step and its output must fit one program, which holds up to 256 channels. Wider layers
are two `linear` launches, whose fused tails leave little to gain there.
"""
# ruff: noqa: RUF005  Triton compiles no starred expressions, so tuples are concatenated.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from depthfuse.kernels.arguments import NO_TAIL, Tail, TwoLayers
from depthfuse.kernels.device.epilogue import activate, finish
from depthfuse.kernels.device.tile import within_reduction
from depthfuse.kernels.launch import (
    REORDERED,
    Launch,
    Target,
    ceil_div,
    compiler_options,
    needs_wide_offsets,
    next_power_of_2,
    require_rows,
    require_tail,
    target_of,
)
from depthfuse.kernels.tuning.lookup import tuned

MAX_CHANNELS = 256


@dataclass(frozen=True)
class MlpConfig:
    """One program of a fused MLP.

    Attributes:
        block_m: rows a program: each re-reads both weights, so more rows mean less traffic from L2.
        block_hidden: hidden channels a step, between the two products: 32 keeps the step's tensors small.
        num_warps: as many as keep the output's accumulator, block_m x channels, within half of the registers.
        num_stages: weight tiles in flight.
    """

    block_m: int
    block_hidden: int
    num_warps: int
    num_stages: int

    def options(self, target: Target) -> dict:
        """Compiler options on `target`."""
        return compiler_options(
            target, self.num_warps, self.num_stages, nonkdim=16, kpack=2, overlap=REORDERED
        )


@triton.jit
def piece_of(INDEX: tl.constexpr, CHANNELS: tl.constexpr, WIDTHS: tl.constexpr):
    """(channels of piece INDEX, which of them exist: a constant where all do, so that the compiler drops the mask)."""
    c = INDEX * WIDTHS[0] + tl.arange(0, WIDTHS[INDEX])
    if INDEX * WIDTHS[0] + WIDTHS[INDEX] <= CHANNELS:
        return c, tl.full(c.shape, True, tl.int1)
    else:
        return c, c < CHANNELS


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """An accumulator [ROWS, WIDTH]; Triton 3.6 takes an element of a tuple as an argument, but in no shape."""
    return tl.zeros((ROWS, WIDTH), dtype=tl.float32)


@triton.jit
def load_rows(pointer, row, CHANNELS: tl.constexpr, WIDTHS: tl.constexpr):
    """Rows of CHANNELS, the first one `row` elements from `pointer`, in pieces of WIDTHS channels."""
    pieces = ()
    for i in tl.static_range(len(WIDTHS)):
        c, exists = piece_of(i, CHANNELS, WIDTHS)
        pieces = pieces + (tl.load(pointer + row[:, None] + c[None, :], mask=exists[None, :], other=0.0),)
    return pieces


@triton.jit
def normalize_rows(
    pieces, CHANNELS: tl.constexpr, EPS: tl.constexpr, WIDTHS: tl.constexpr, DTYPE: tl.constexpr
):
    """LayerNorm without its affine over rows that are there in pieces."""
    total = 0.0
    for i in tl.static_range(len(WIDTHS)):
        total += tl.sum(pieces[i].to(tl.float32), axis=1)
    mean = (total / CHANNELS)[:, None]
    squares = 0.0
    for i in tl.static_range(len(WIDTHS)):
        _, exists = piece_of(i, CHANNELS, WIDTHS)
        centred = tl.where(exists[None, :], pieces[i].to(tl.float32) - mean, 0.0)
        squares += tl.sum(centred * centred, axis=1)
    inverse = tl.rsqrt(squares / CHANNELS + EPS)[:, None]
    normal = ()
    for i in tl.static_range(len(WIDTHS)):
        _, exists = piece_of(i, CHANNELS, WIDTHS)
        centred = tl.where(exists[None, :], pieces[i].to(tl.float32) - mean, 0.0)
        normal = normal + ((centred * inverse).to(DTYPE),)
    return normal


@triton.jit(do_not_specialize=["rows"])
def mlp_kernel(
    x,  # [rows, CHANNELS]
    w1,  # [HIDDEN, CHANNELS]
    b1,  # [HIDDEN] or None
    w2,  # [OUT_CHANNELS, HIDDEN]
    b2,  # [OUT_CHANNELS] or None
    residual,  # like y, or None
    scale,  # [OUT_CHANNELS] or None
    shift,  # [OUT_CHANNELS] or None
    y,  # [rows, OUT_CHANNELS]
    rows,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    NORM_EPS: tl.constexpr,  # None: no normalisation
    ACT_INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # widths of the pieces of a row of x, a tuple
    BLOCK_N: tl.constexpr,  # likewise of y
    BLOCK_HIDDEN: tl.constexpr,
):
    tile = tl.program_id(0)
    if WIDE:
        tile = tile.to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows past the end compute a copy of the last one, which is never stored.
    a = load_rows(x, tl.minimum(row, rows - 1) * CHANNELS, CHANNELS, BLOCK_C)
    if NORM_EPS is not None:
        a = normalize_rows(a, CHANNELS, NORM_EPS, BLOCK_C, x.dtype.element_ty)

    acc = ()
    for i in tl.static_range(len(BLOCK_N)):
        acc = acc + (zeros(BLOCK_M, BLOCK_N[i]),)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        h = start + tl.arange(0, BLOCK_HIDDEN)
        h_mask = within_reduction(h, HIDDEN, BLOCK_HIDDEN)
        hidden = tl.zeros((BLOCK_M, BLOCK_HIDDEN), dtype=tl.float32)
        for i in tl.static_range(len(BLOCK_C)):
            c, exists = piece_of(i, CHANNELS, BLOCK_C)
            mask = h_mask[:, None] & exists[None, :]
            weight = tl.load(w1 + h[:, None] * CHANNELS + c[None, :], mask=mask, other=0.0)
            hidden = tl.dot(a[i], weight.T, hidden, input_precision="ieee")
        if b1 is not None:
            hidden += tl.load(b1 + h, mask=h_mask, other=0.0).to(tl.float32)[None, :]
        hidden = activate(hidden, ACT_INNER).to(x.dtype.element_ty)
        sums = ()
        for i in tl.static_range(len(BLOCK_N)):
            n, exists = piece_of(i, OUT_CHANNELS, BLOCK_N)
            mask = exists[:, None] & h_mask[None, :]
            weight = tl.load(w2 + n[:, None] * HIDDEN + h[None, :], mask=mask, other=0.0)
            sums = sums + (tl.dot(hidden, weight.T, acc[i], input_precision="ieee"),)
        acc = sums

    for i in tl.static_range(len(BLOCK_N)):
        n, n_mask = piece_of(i, OUT_CHANNELS, BLOCK_N)
        offset = row[:, None] * OUT_CHANNELS + n[None, :]
        mask = (row < rows)[:, None] & n_mask[None, :]
        out = finish(acc[i], b2, residual, scale, shift, n, n_mask, offset, mask, ACTIVATION)
        tl.store(y + offset, out.to(y.dtype.element_ty), mask=mask)


def pieces(channels: int) -> tuple[int, ...]:
    """Widths, powers of 2 and at least 16, that cover a row: one, or two where that is less in all (96 = 64 + 32)."""
    one = max(16, next_power_of_2(channels))
    two = (one // 2, max(16, next_power_of_2(channels - one // 2)))
    return two if sum(two) < one else (one,)


def config_for(channels: int, dtype: torch.dtype, target: Target) -> MlpConfig:
    """The tile for rows of `channels`; all choices are free of spills on every target."""
    if target.backend == "interpreter":
        return MlpConfig(64, 32, 4, 1)
    if target.backend == "cuda" and dtype is torch.float32:
        return MlpConfig(32, 16, 4, 1)  # plain multiply-adds: operands are in registers, too
    if channels <= 128:
        return MlpConfig(128, 32, 8, 1)
    if target.backend == "hip":
        return MlpConfig(128, 32, 8, 1)  # 64 rows on 8 warps would read LDS 16 bits at a time
    return MlpConfig(64, 32, 8, 1)  # 128 rows spill: half of the registers are accumulator


def supports(channels: int, out_channels: int, dtype: torch.dtype) -> bool:
    """Whether rows of this width fit one program: of float32, half as many channels fill the same LDS."""
    return max(channels, out_channels) <= (MAX_CHANNELS if dtype.itemsize == 2 else MAX_CHANNELS // 2)


def plan(
    x: torch.Tensor,  # [rows, C] contiguous
    weights: TwoLayers,  # [hidden, C], [hidden], [K, hidden], all contiguous
    tail: Tail,  # residual [rows, K] contiguous
    y: torch.Tensor,  # [rows, K] contiguous
    *,
    act_inner: str,
    norm_eps: float | None,
    config: MlpConfig | None,
    target: Target,
) -> Launch:
    """The launch that computes `y`."""
    rows, channels = x.shape
    hidden, out_channels = weights.w1.shape[0], weights.w2.shape[0]
    shape = {
        "rows": rows,
        "channels": channels,
        "hidden": hidden,
        "out_channels": out_channels,
        "norm": int(norm_eps is not None),
    }
    config = config or tuned(
        "mlp", config_for(max(channels, out_channels), x.dtype, target), x, target, **shape
    )
    arguments = {
        "x": x,
        **weights._asdict(),
        **tail.tensors("b2"),
        "y": y,
        "rows": rows,
        "CHANNELS": channels,
        "HIDDEN": hidden,
        "OUT_CHANNELS": out_channels,
        "NORM_EPS": norm_eps,
        "ACT_INNER": act_inner,
        "ACTIVATION": tail.act,
        "WIDE": needs_wide_offsets(x, y),
        "BLOCK_M": config.block_m,
        "BLOCK_C": pieces(channels),
        "BLOCK_N": pieces(out_channels),
        "BLOCK_HIDDEN": config.block_hidden,
    }
    return Launch(mlp_kernel, (ceil_div(rows, config.block_m),), arguments, config.options(target))


def mlp(
    x: torch.Tensor,  # [..., C]
    weights: TwoLayers,  # [hidden, C], [hidden], [K, hidden]
    tail: Tail = NO_TAIL,  # residual [..., K]
    *,
    act_inner: str = "gelu",
    norm_eps: float | None = None,
    config: MlpConfig | None = None,
) -> torch.Tensor:  # [..., K]
    """Linear, activation, linear in one launch, after LayerNorm where `norm_eps` is given; see this file's head.

    float16, bfloat16 or float32 in and out, float32 accumulation; the hidden step is rounded to the dtype of `x`.
    That the arguments fit each other, and `supports`, is for the caller to check, as `depthfuse.ops.mlp` does.

    Raises:
        ValueError: a tensor that is not contiguous.
    """
    target = target_of(x)
    require_rows(x=x, **weights._asdict())
    require_tail(tail, require_rows)
    y = torch.empty((*x.shape[:-1], weights.w2.shape[0]), dtype=x.dtype, device=x.device)
    x2, residual2, y2 = (None if t is None else t.view(-1, t.shape[-1]) for t in (x, tail.residual, y))
    options = {"act_inner": act_inner, "norm_eps": norm_eps, "config": config, "target": target}
    plan(x2, weights, tail._replace(residual=residual2), y2, **options).run(x)
    return y
