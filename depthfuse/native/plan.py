"""A plan for the engine: tensors and nodes are collected, then checked and packed by it once, and run in one call."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from depthfuse.native.library import NodeSpec, TensorSpec, library

ARENA, INPUT, OUTPUT = range(3)
(
    CONV,
    DEPTHWISE,
    MAX_POOL,
    MEAN,
    ADD,
    LAYER_NORM,
    ATTENTION,
    COPY,
    FROM_PLANES,
    TO_PLANES,
    CONSTANT,
    MULTIPLY,
    MAP,
    AVERAGE_POOL,
    PAD,
    GROUP_NORM,
    RESIZE,
) = range(17)
# By their number in abi.h; those from "sigmoid" on are of ADD, MULTIPLY and MAP only.
ACTIVATIONS = (
    "none",
    "relu",
    "relu6",
    "gelu",
    "gelu_tanh",
    "silu",
    "hardswish",
    "sigmoid",
    "hardsigmoid",
    "tanh",
    "leaky_relu",
)
NEAREST, BILINEAR, BILINEAR_CORNERS = range(3)
DIRECT, WINOGRAD_2, WINOGRAD_4, TILES, TILES_BF16 = 0, 2, 4, 16, 17
# Which products of bfloat16 an instruction set has; another computes directly what asks for them.
BY_TILES = {"amx": (TILES, TILES_BF16), "avx512_bf16": (TILES_BF16,)}
_GROUPS = 8  # where a convolution's are, among its numbers
_ERROR_BYTES = 256


@dataclass
class Node:
    """One operation, see df_node of csrc/cpu/abi.h; tensors of weights in the place of offsets.

    names: of the graph's operations that it computes.
    """

    op: int
    x: int
    y: int
    x2: int = -1
    act: str = "none"
    algorithm: int = DIRECT
    numbers: Sequence[int] = ()
    groups: int = 1  # of a convolution
    f: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    names: list[str] = field(default_factory=list)


@dataclass
class Builder:
    """Collects a plan. Tensors are float32 [n, h, w, c], named by their number."""

    tensors: list[TensorSpec] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    def tensor(self, shape: Sequence[int], place: int = ARENA) -> int:
        """A tensor [n, h, w, c]; inputs and outputs are numbered in the order in which they are made."""
        index = sum(t.place == place for t in self.tensors) if place != ARENA else 0
        self.tensors.append(TensorSpec(place, index, *shape, 0))
        return len(self.tensors) - 1

    def shape(self, tensor: int) -> tuple[int, int, int, int]:
        t = self.tensors[tensor]
        return t.n, t.h, t.w, t.c

    def pad(self, tensor: int, border: int) -> None:
        """Let at least `border` pixels of zeros lie around the images of a tensor in the arena."""
        self.tensors[tensor].border = max(self.tensors[tensor].border, border)

    def copy(
        self,
        x: int,
        y: int,
        *,
        y_pixel: int = 0,
        y_channel: int = 0,
        x_pixel: int = 0,
        x_channel: int = 0,
        pixels: int | None = None,
        channels: int | None = None,
    ) -> None:
        """Add a copy of x's pixels, counted along h and w, and channels into y's; None for all of x's."""
        _, h, w, c = self.shape(x)
        counts = (h * w if pixels is None else pixels, c if channels is None else channels)
        self.nodes.append(Node(COPY, x, y, numbers=(y_pixel, y_channel, x_pixel, x_channel, *counts)))

    def build(self) -> NativePlan:
        """Raises ValueError where the engine refuses the plan, saying why. Missing: there is no engine."""
        return NativePlan(self)


class NativePlan:
    """A plan that the engine has taken."""

    def __init__(self, builder: Builder) -> None:
        functions = library()
        parts: list[Tensor] = []
        count = 0

        def offset(values: Tensor | None) -> int:
            nonlocal count
            if values is None:
                return -1
            parts.append(values.detach().to("cpu", torch.float32).reshape(-1))
            count += parts[-1].numel()
            return count - parts[-1].numel()

        specs = (NodeSpec * len(builder.nodes))()
        for spec, node in zip(specs, builder.nodes, strict=True):
            spec.op, spec.x, spec.x2, spec.y = node.op, node.x, node.x2, node.y
            spec.act, spec.algorithm, spec.f = ACTIVATIONS.index(node.act), node.algorithm, node.f
            spec.p[: len(node.numbers)] = list(node.numbers)
            if node.op == CONV:
                spec.p[_GROUPS] = node.groups
            for name in ("weight", "bias", "scale", "shift"):
                setattr(spec, name, offset(getattr(node, name)))
        weights = torch.cat(parts) if parts else torch.empty(0)
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        tensors = (TensorSpec * len(builder.tensors))(*builder.tensors)
        handle = functions.df_plan_create(
            tensors, len(tensors), specs, len(specs), weights.data_ptr(), weights.numel(), error, _ERROR_BYTES
        )
        if not handle:
            raise ValueError(f"the native engine refuses the plan: {error.value.decode(errors='replace')}")
        self._handle, self._run = handle, functions.df_plan_run
        self._bytes, self._nodes = functions.df_plan_bytes, len(specs)
        places = [[t for t in tensors if t.place == place] for place in (INPUT, OUTPUT)]
        self._counts = [[t.n * t.h * t.w * t.c for t in found] for found in places]
        weakref.finalize(self, functions.df_plan_destroy, handle)

    @property
    def bytes(self) -> int:
        """Of its own memory: packed weights, and what lies between its nodes."""
        return self._bytes(self._handle)

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], threads: int | None = None) -> None:
        """Compute `outputs` from `inputs`: float32 on the CPU, dense, as many values each as the plan's tensors.

        threads: at most so many; None for `torch.get_num_threads()`.

        Raises ValueError for anything else: the engine would read or write where it must not.
        """
        for given, counts in zip((inputs, outputs), self._counts, strict=True):
            if len(given) != len(counts):
                raise ValueError(f"{len(given)} tensors given, expected {len(counts)}")
            for x, count in zip(given, counts, strict=True):
                fits = x.dtype is torch.float32 and x.device.type == "cpu" and x.is_contiguous()
                if not fits or x.numel() != count:
                    layout = "dense" if x.is_contiguous() else f"strides {list(x.stride())}"
                    raise ValueError(
                        f"given {list(x.shape)} {x.dtype} on {x.device}, {layout}; "
                        f"expected {count} float32 on the cpu, dense"
                    )
        self._run_timed(inputs, outputs, threads, None)

    def run_one(self, x: Tensor, y: Tensor, threads: int) -> None:
        """As `run`, for a plan of one input and one output, both known to be right: nothing is checked here, where each
        step of Python costs as much as some layers.
        """
        inputs, outputs = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
        self._run(self._handle, ctypes.byref(inputs), ctypes.byref(outputs), threads, None)

    def profile(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], threads: int | None = None, runs: int = 10
    ) -> list[float]:
        """The least time in ms that each node took in so many runs, in their order: 0 for one that runs with the next
        that takes more. Arguments as of `run`.
        """
        self.run(inputs, outputs, threads)
        times = (ctypes.c_double * self._nodes)()
        least = [math.inf] * self._nodes
        for _ in range(runs):
            self._run_timed(inputs, outputs, threads, times)
            least = [min(pair) for pair in zip(least, times, strict=True)]
        return least

    def _run_timed(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], threads: int | None, times: Any
    ) -> None:
        pointers = [
            (ctypes.c_void_p * max(1, len(given)))(*(x.data_ptr() for x in given))
            for given in (inputs, outputs)
        ]
        self._run(self._handle, *pointers, threads or torch.get_num_threads(), times)
