"""Read a module's structure off its graph.

The module is traced to its layers: convolution, batch norm and activation in a row, with a shortcut beside it or none;
or the parts of a ConvNeXt block. What stands in the way is named. torchvision's, Hugging Face's and a user's own blocks
come in here; the families of the paper are known by class.
"""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import fx, nn

from depthfuse.merging.adapters.chain import Subsample
from depthfuse.merging.adapters.layers import (
    ACTIVATION_FUNCTIONS,
    ACTIVATIONS,
    DROPOUTS,
    IN_PLACE,
    PRODUCTS,
    BlockTracer,
    is_drop_path,
    is_layer_norm,
    is_sum,
)
from depthfuse.merging.adapters.structure import (
    ConvNeXtStructure,
    Layer,
    NoBlock,
    Readings,
    Structure,
    Unread,
)
from depthfuse.merging.computed_weights import plain_type
from depthfuse.merging.tracing import copy_around_tensors

log = logging.getLogger(__name__)

_MOST_STAGES = 4  # what is longer is a network, not a block

_readings: Readings[Structure | ConvNeXtStructure] = Readings()


def structure_of(block: nn.Module, anew: bool = False) -> Structure | ConvNeXtStructure:
    """How a module computes a block. Raises Unread with what stands in the way, NoBlock where it looks like none."""
    return _readings.of(block, lambda: _Reader(block).structure(), anew)


class _Reader:
    """Reads the graph of one module."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        products = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in block.modules())
        if not 2 <= products <= 2 * _MOST_STAGES:
            raise NoBlock(f"{products} convolutions and linear layers")
        if not any(isinstance(m, nn.Conv2d) for m in block.modules()):
            raise NoBlock("no convolution")
        others = list(inspect.signature(plain_type(block).forward).parameters.values())[2:]
        if may := [parameter.name for parameter in others if parameter.default is None]:
            raise Unread(f"its caller may give it more than one input ({', '.join(may)})")
        tracer = BlockTracer()
        try:
            # Dropout and stochastic depth may be functions, which do nothing in evaluation mode.
            self.graph = tracer.trace(copy_around_tensors(block).eval())
        except Exception as error:  # the block's own code, on a proxy
            log.debug("%s is not read as a block: %s: %s", type(block).__name__, type(error).__name__, error)
            raise NoBlock(f"its code cannot be followed ({type(error).__name__})") from error
        for path, module in tracer.root.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, fx.Proxy) and name not in module._parameters:
                    raise Unread(f"it keeps a value beside its output, in {f'{path}.{name}'.lstrip('.')}")
        calls = [node.target for node in self.graph.nodes if node.op == "call_module"]
        stateful = [t for t in calls if block.get_submodule(t).state_dict()]
        if len(set(stateful)) < len(stateful):
            raise Unread("a layer that is called twice")
        for node in self.graph.nodes:
            if self._writes(node) and any(len(given.users) > 1 for given in node.all_input_nodes):
                raise Unread(f"{_name(node, block)} writes over what others read")
        given = [node for node in self.graph.nodes if node.op == "placeholder" and node.users]
        if len(given) != 1:
            raise NoBlock(f"{len(given)} inputs")
        self.x = given[0]
        sums = sum(is_sum(node) for node in self.graph.nodes)
        if sums > 1:
            raise NoBlock(f"{sums} sums")

    def structure(self) -> Structure | ConvNeXtStructure:
        (output,) = next(node for node in self.graph.nodes if node.op == "output").args
        if not isinstance(output, fx.Node):
            raise NoBlock("its output is no single tensor")
        end: list[Layer] = []
        node = output
        while (act := self._activation(node)) is not None or self._does_nothing(node):
            if act is not None:
                end.insert(0, act)
            node = self._before(node)
        if not is_sum(node):
            main, fork, side = self._row(node, self.x), self.x, None
        else:
            a, b = self._operands(node)
            rows = [self._ancestors(a), self._ancestors(b)]
            fork = next(n for n in rows[0] if n in rows[1])
            sides = [self._row(a, fork), self._row(b, fork)]
            sides.sort(key=lambda row: sum(kind == "conv" for kind, _ in row))
            side, main = sides
            if not side and not end and fork is self.x and "linear" in [kind for kind, _ in main]:
                return _convnext(main)
        before, stages, drop_path = self._stages(main, residual=side is not None)
        if fork is not self.x:
            if before:
                raise Unread("a norm or activation before each branch")
            before = self._layers_before(fork)
        if len(stages) < 2:
            raise NoBlock("fewer than two convolutions in a row")
        if len(stages) > _MOST_STAGES:
            raise NoBlock(f"a chain of {len(stages)} convolutions")
        if side is None and stages[-1][1] is None and not end:
            raise NoBlock("the norm of its last convolution, if there is one, is no part of it")
        has_act = any(acts or self._acts_of_norm(norm) for _, norm, acts in stages)
        if not has_act and not before:
            raise Unread("no activation that could be removed: the block is linear already")
        return Structure(
            tuple(stages),
            None if side is None else self._shortcut(side),
            drop_path,
            tuple(end),
            tuple(before),
            fork is not self.x,
        )

    # From the graph to rows of layers.

    def _before(self, node: fx.Node) -> fx.Node:
        """The one tensor that a node reads."""
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if len(inputs) != 1:
            raise Unread(_obstacle(node, self.block))
        return inputs[0]

    def _operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        if len(node.all_input_nodes) != 2 or len(node.args) != 2 or node.kwargs:
            raise Unread("a sum that is no skip")
        return tuple(node.all_input_nodes)

    def _ancestors(self, node: fx.Node) -> list[fx.Node]:
        """A node, what it reads, and so on to the input."""
        row = [node]
        while node is not self.x:
            node = self._before(node)
            row.append(node)
        return row

    def _row(self, node: fx.Node, start: fx.Node) -> list[tuple[str, Any]]:
        """The layers from `start` to `node`, in order: (kind, Layer or what describes it)."""
        row: list[tuple[str, Any]] = []
        while node is not start:
            if node is self.x or node.op == "get_attr":
                raise Unread("a branch that does not read the block's input")
            if is_sum(node):
                raise NoBlock("a sum within a chain")
            if len(node.users) > 1:
                raise Unread(f"{_name(node, self.block)} has two readers")
            kind = self._kind(node)
            if kind is not None:
                row.insert(0, kind)
            node = self._before(node)
        return row

    def _kind(self, node: fx.Node) -> tuple[str, Any] | None:
        """(kind, layer) of a node, None for what does nothing."""
        act = self._activation(node)
        if act is not None:
            return "act", act
        if node.op == "call_module":
            module, layer = self.block.get_submodule(node.target), Layer(node.target)
            kind = plain_type(module)
            if self._does_nothing(node):
                return None
            if is_drop_path(module):
                return "drop path", layer
            if issubclass(kind, nn.Conv2d):
                return "conv", layer
            if kind is BatchNormAct2d and not isinstance(module.drop, nn.Identity):
                raise Unread("dropout inside a norm")
            if kind in (nn.BatchNorm2d, BatchNormAct2d):
                return "norm", layer
            if is_layer_norm(module):
                return "layer norm", layer
            if kind is nn.Linear:
                return "linear", layer
            if kind in DROPOUTS:
                return "dropout", layer
            if kind is nn.AvgPool2d:
                return "pool", layer
        elif node.target in PRODUCTS and len(node.args) == 2:
            factors = [n.target for n in node.args if isinstance(n, fx.Node) and n.op == "get_attr"]
            if len(factors) == 1:
                return "scale", factors[0]
        elif node.target in (torch.permute, "permute"):
            order = node.args[1] if len(node.args) == 2 else node.args[1:]
            if tuple(order) in ((0, 2, 3, 1), (0, 3, 1, 2)):
                return "permute", tuple(order)
        elif node.target is operator.getitem:
            strides = _subsampling(node.args[1])
            if strides is not None:
                return "subsample", strides
        elif node.target is F.pad:
            padding = _channel_padding(node)
            if padding is not None:
                return "pad", padding
        raise Unread(_obstacle(node, self.block))

    def _writes(self, node: fx.Node) -> bool:
        """Whether a node is an activation that writes over its input."""
        if node.op == "call_module":
            return getattr(self.block.get_submodule(node.target), "inplace", False) is True
        return node.target in IN_PLACE or node.kwargs.get("inplace") is True

    def _does_nothing(self, node: fx.Node) -> bool:
        return node.op == "call_module" and plain_type(self.block.get_submodule(node.target)) is nn.Identity

    def _activation(self, node: fx.Node) -> Layer | None:
        if node.op == "call_module":
            module = self.block.get_submodule(node.target)
            fits = isinstance(module, ACTIVATIONS) and not any(True for _ in module.parameters())
            return Layer(node.target) if fits else None
        kind = ACTIVATION_FUNCTIONS.get(node.target) if isinstance(node.target, str | Callable) else None
        if kind is None or node.op not in ("call_function", "call_method"):
            return None
        options = {name: value for name, value in node.kwargs.items() if name not in ("inplace", "input")}
        extra = [a for a in node.args[1:] if not isinstance(a, bool)]
        if kind is nn.LeakyReLU and len(extra) == 1:
            options["negative_slope"] = extra.pop()
        return None if extra else Layer(None, kind(**options))

    def _acts_of_norm(self, norm: Layer | None) -> bool:
        module = None if norm is None else norm.of(self.block)
        return isinstance(module, BatchNormAct2d) and not isinstance(module.act, nn.Identity)

    # From rows of layers to a chain.

    def _stages(
        self, row: list[tuple[str, Any]], residual: bool
    ) -> tuple[list[Layer], list[tuple[Layer, Layer | None, tuple[Layer, ...]]], Layer | None]:
        """(Layers before the first convolution, stages, stochastic depth)."""
        before: list[Layer] = []
        stages: list[list[Any]] = []
        drop_path = None
        for i, (kind, layer) in enumerate(row):
            if drop_path is not None:
                raise Unread("a layer after stochastic depth")
            if kind == "conv":
                stages.append([layer, None, []])
            elif not stages and kind in ("norm", "act", "dropout"):
                before.append(layer)
            elif kind == "norm" and stages and stages[-1][1] is None and not stages[-1][2]:
                stages[-1][1] = layer
            elif kind in ("act", "dropout") and stages:
                stages[-1][2].append(layer)
            elif kind == "drop path":
                drop_path = layer
            else:
                where = "between" if any(later == "conv" for later, _ in row[i:]) else "after"
                raise Unread(f"a {kind} {where} the convolutions")
        if residual and stages:
            _, norm, acts = stages[-1]
            if acts or self._acts_of_norm(norm):
                raise Unread("an activation between the last convolution and the skip")
        return before, [(conv, norm, tuple(acts)) for conv, norm, acts in stages], drop_path

    def _layers_before(self, fork: fx.Node) -> list[Layer]:
        layers, node = [], fork
        while node is not self.x:
            kind = self._kind(node)
            if kind is not None:
                if kind[0] not in ("norm", "act", "dropout"):
                    raise Unread(f"a {kind[0]} before both branches")
                layers.insert(0, kind[1])
            node = self._before(node)
        return layers

    def _shortcut(self, row: list[tuple[str, Any]]) -> tuple[Layer, ...]:
        kinds = [kind for kind, _ in row]
        if kinds in (["subsample"], ["pad"], ["subsample", "pad"]):
            stride = row[0][1] if kinds[0] == "subsample" else (1, 1)
            before, after = row[-1][1] if kinds[-1] == "pad" else (0, 0)
            return (Layer(None, Subsample(stride, before, after)),)
        if kinds not in ([], ["conv"], ["conv", "norm"], ["pool", "conv"], ["pool", "conv", "norm"]):
            raise Unread(f"a shortcut of {', '.join(kinds)}")
        if "norm" in kinds and self._acts_of_norm(row[-1][1]):
            raise Unread("an activation in the shortcut")
        return tuple(layer for _, layer in row)


def _convnext(row: list[tuple[str, Any]]) -> ConvNeXtStructure:
    """Depthwise convolution, layer norm, linear, activation, linear, scale: in this order, the middle with channels
    last.

    Raises Unread for anything else.
    """
    order = [kind for kind, _ in row]
    left = list(row)

    def take(kind: str, optional: bool = False) -> Any:
        if left and left[0][0] == kind:
            return left.pop(0)[1]
        if optional:
            return None
        raise Unread(f"linear layers and {', '.join(dict.fromkeys(order))}: no ConvNeXt block")

    depthwise, there = take("conv"), take("permute")
    norm, fc1, act = take("layer norm"), take("linear"), take("act")
    drop, fc2 = take("dropout", optional=True), take("linear")
    gamma = take("scale", optional=True)
    back = take("permute")
    gamma = gamma or take("scale", optional=True)
    drop_path = take("drop path", optional=True)
    if left or (there, back) != ((0, 2, 3, 1), (0, 3, 1, 2)):
        raise Unread(f"linear layers and {', '.join(dict.fromkeys(order))}: no ConvNeXt block")
    return ConvNeXtStructure(depthwise, norm, fc1, act, drop, fc2, gamma, drop_path)


def _subsampling(index: Any) -> tuple[int, int] | None:
    """(rows, columns) of x[:, :, ::rows, ::columns]."""
    if not isinstance(index, tuple) or len(index) != 4 or not all(isinstance(i, slice) for i in index):
        return None
    if any(i.start not in (None, 0) or i.stop is not None for i in index):
        return None
    steps = [1 if i.step is None else i.step for i in index]
    return (steps[2], steps[3]) if steps[:2] == [1, 1] else None


def _channel_padding(node: fx.Node) -> tuple[int, int] | None:
    """(before, after) of a padding of channels with zeros."""
    names = ("input", "pad", "mode", "value")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    padding = given.get("pad")
    plain = given.get("mode", "constant") == "constant" and given.get("value") in (None, 0, 0.0)
    if not plain or not isinstance(padding, tuple | list) or len(padding) != 6 or any(padding[:4]):
        return None
    if not all(isinstance(n, int) and n >= 0 for n in padding):
        return None
    return padding[4], padding[5]


def _name(node: fx.Node, block: nn.Module) -> str:
    """What a node computes, for a reason."""
    if node.op == "call_module":
        return f"{plain_type(block.get_submodule(node.target)).__name__} {node.target}"
    return getattr(node.target, "__name__", str(node.target))


def _obstacle(node: fx.Node, block: nn.Module) -> str:
    if node.target in PRODUCTS and len(node.all_input_nodes) > 1:
        return "a gate depends on the input"
    if len(node.all_input_nodes) > 1:
        return f"branches meet ({_name(node, block)})"
    return _name(node, block)
