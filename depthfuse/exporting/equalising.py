"""Cross-layer equalisation of a plan: channels of very different size cost most where numbers are rounded to 8 bits.

After Nagel et al. 2019, arXiv 1906.04721. Where act(s x) = s act(x) for s > 0, a channel of a layer's output may be
made s times smaller and what the next layer multiplies it by s times larger. s = sqrt(a / b), a being the largest
weight that makes the channel and b the largest that reads it, makes both sqrt(a b).

Two things differ from the paper. s is rounded to a power of two, so that a net computes the same bits as before (but
for numbers near the least or largest that floats hold), and a channel is off its best range by a factor of sqrt(2) at
most. And a pair of layers is the smallest case of what is scaled here: values that are added to each other share their
scales, so that all layers that write to a residual stream are scaled with all that read it.

ReLU6 is no such activation: it clips at 6 whatever s is. Clipping each channel at 6 / s would be exact, and no runtime
fuses that, so what ends in ReLU6 is left alone; as is what ends in GELU, SiLU or a LayerNorm.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from depthfuse.acceleration.planning import aten
from depthfuse.exporting.subject import Subject
from depthfuse.fused.layers import FusedConv2d, FusedLinear

_HOMOGENEOUS = ("none", "relu")
# They give what they are given, channel by channel, and s times as much where that is s times as much.
_PASSING = frozenset(("relu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "contiguous", "clone"))
_FLATTENING = frozenset(("view", "reshape", "flatten", "squeeze"))
# Chains of pairs converge: a pair's best scales depend on its neighbours'.
_MAX_SWEEPS, _SETTLED = 30, 0.01  # in powers of two

Layer = FusedConv2d | FusedLinear


@dataclass(eq=False)
class Stream:
    """Values that share their channels' scales, as layers write and read them."""

    writers: list[Layer] = field(default_factory=list)
    readers: list[Layer] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return self.writers[0].weight.shape[0]

    def divide(self, powers: Tensor) -> None:
        """Divide the values by 2^powers, and multiply what reads them, in place. powers: [channels] whole numbers."""
        for layer in self.writers:
            _divide_outputs(layer, torch.exp2(powers))
        for layer in self.readers:
            _multiply_inputs(layer, torch.exp2(powers))


def equalised_subject(subject: Subject) -> tuple[Subject, int]:
    """The same with a plan of its own that is equalised, and what `equalise` says of it."""
    plan = replace(subject.plan, module=copy.deepcopy(subject.plan.module))
    return replace(subject, plan=plan), equalise(plan.module)


def equalise(plan: fx.GraphModule) -> int:
    """Equalise the channels between layers, in place; the plan computes the same, to the last bit.

    Args:
        plan: of `FusedConv2d` and `FusedLinear` in any floating-point dtype, as `build_whole_plan` gives it.

    Returns:
        How many streams of values were scaled; 0 where nothing may be.
    """
    streams = streams_of(plan)
    writes = {id(layer): stream for stream in streams for layer in stream.writers}
    reads = {id(layer): stream for stream in streams for layer in stream.readers}
    layers = {id(layer): layer for stream in streams for layer in (*stream.writers, *stream.readers)}
    magnitudes = {key: _by_channels(layer) for key, layer in layers.items()}
    scales = {id(stream): torch.zeros(stream.channels, dtype=torch.float64) for stream in streams}

    def effective(layer: Layer) -> Tensor:
        """[outputs, inputs]: the largest weight between two channels, as it is scaled so far."""
        own = magnitudes[id(layer)]
        if id(layer) in reads:
            own = own * torch.exp2(scales[id(reads[id(layer)])])
        if id(layer) in writes:
            own = own / torch.exp2(scales[id(writes[id(layer)])])[:, None]
        return own

    for _ in range(_MAX_SWEEPS):
        moved = 0.0
        for stream in streams:
            written = torch.stack([effective(layer).amax(1) for layer in stream.writers]).amax(0)
            read = torch.stack([effective(layer).amax(0) for layer in stream.readers]).amax(0)
            step = 0.5 * (written.log2() - read.log2())
            step[(written == 0) | (read == 0)] = 0.0  # a dead channel has no range to equalise
            scales[id(stream)] += step
            moved = max(moved, float(step.abs().max()))
        if moved < _SETTLED:
            break
    for stream in streams:
        stream.divide(scales[id(stream)].round())
    return len(streams)


def streams_of(plan: fx.GraphModule) -> list[Stream]:
    """What may be scaled: each value of a stream is written by a layer with a homogeneous activation, or passed on, and
    read by layers alone.
    """
    above: dict[fx.Node, fx.Node] = {}

    def first(node: fx.Node) -> fx.Node:
        while above.get(node, node) is not node:
            node = above[node]
        return node

    def join(a: fx.Node, b: fx.Node) -> None:
        above[first(a)] = first(b)

    fixed: list[fx.Node] = []  # values that nothing can be scaled in
    writers: list[tuple[fx.Node, Layer]] = []
    readers: list[tuple[fx.Node, Layer]] = []
    calls = [node.target for node in plan.graph.nodes if node.op == "call_module"]
    for node in plan.graph.nodes:
        layer = plan.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, FusedConv2d | FusedLinear) and calls.count(node.target) == 1:
            x, *residual = node.args
            # a linear layer's norm comes before the product, a convolution's behind it
            before, behind = (
                (layer.norm_eps, None) if isinstance(layer, FusedLinear) else (None, layer.norm_eps)
            )
            readers.append((x, layer))
            writers.append((node, layer))
            fixed += [x] if before is not None else []
            fixed += [node] if behind is not None or layer.act not in _HOMOGENEOUS else []
            for other in residual:
                join(node, other)
        elif _passes(node):
            join(node, node.args[0])
        elif _adds(node):
            join(node, node.args[0])
            join(node, node.args[1])
        else:
            fixed += [node, *node.all_input_nodes]
    closed = {first(node) for node in fixed}
    found: dict[fx.Node, Stream] = {}
    for node, layer in writers:
        if first(node) not in closed:
            found.setdefault(first(node), Stream()).writers.append(layer)
    for node, layer in readers:
        if first(node) in found:
            found[first(node)].readers.append(layer)
    return [stream for stream in found.values() if stream.readers and _agree(stream)]


def _agree(stream: Stream) -> bool:
    """Whether all see the same channels: not where values are added that one of them repeats for each channel."""
    counts = {layer.weight.shape[0] for layer in stream.writers} | {
        _inputs(layer) for layer in stream.readers
    }
    return len(counts) == 1


def _inputs(layer: Layer) -> int:
    return layer.weight.shape[1] * (layer.groups if isinstance(layer, FusedConv2d) else 1)


def _passes(node: fx.Node) -> bool:
    name = aten.name_of(node)
    if name in _PASSING:
        return True
    given = aten.shape_of(node.args[0]) if node.args else None
    if name == "mean":
        axes = aten.arguments(node).get("dim")
        return given is not None and len(given) == 4 and axes is not None and {a % 4 for a in axes} == {2, 3}
    shape = aten.shape_of(node)
    one_pixel = given is not None and len(given) == 4 and given[2:] == (1, 1)
    return name in _FLATTENING and one_pixel and shape is not None and shape[:2] == given[:2]


def _adds(node: fx.Node) -> bool:
    """Whether it adds two values of one shape."""
    if aten.name_of(node) != "add" or not all(isinstance(value, fx.Node) for value in node.args[:2]):
        return False
    shapes = [aten.shape_of(value) for value in node.args[:2]]
    return shapes[0] is not None and shapes[0] == shapes[1]


def _by_channels(layer: Layer) -> Tensor:
    """[outputs, inputs] float64: the largest weight between two channels, 0 where groups keep them apart."""
    weight = layer.weight.detach().to("cpu", torch.float64).abs()
    own = weight.flatten(2).amax(2) if weight.dim() > 2 else weight  # [outputs, inputs / groups]
    groups = layer.groups if isinstance(layer, FusedConv2d) else 1
    return own if groups == 1 else torch.block_diag(*own.chunk(groups))


def _divide_outputs(layer: Layer, scale: Tensor) -> None:
    """scale * act(x @ weight + bias + residual) + shift, with weight, bias and shift divided; the residual is."""
    by = scale.to(layer.weight)
    layer.weight /= by.view(-1, *(1,) * (layer.weight.dim() - 1))
    for tensor in (layer.bias, layer.shift):
        if tensor is not None:
            tensor /= by


def _multiply_inputs(layer: Layer, scale: Tensor) -> None:
    by = scale.to(layer.weight)
    if isinstance(layer, FusedLinear):
        layer.weight *= by
        return
    own = by.view(layer.groups, 1, -1).expand(-1, layer.weight.shape[0] // layer.groups, -1)
    layer.weight *= own.reshape(*layer.weight.shape[:2], *(1,) * (layer.weight.dim() - 2))
