"""Find the feed-forward branch at the end of a block: norm, linear layer, activation, linear layer, then the skip.

What comes before it (attention over windows, pooling, mixing of tokens) is not looked into: it stays the block's own
code.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from timm.models.mlp_mixer import Affine
from torch import fx, nn

from depthfuse.merging.adapters.feed_forward import FeedForward, Step
from depthfuse.merging.adapters.layers import (
    ACTIVATION_FUNCTIONS,
    ACTIVATIONS,
    DROPOUTS,
    PRODUCTS,
    BlockTracer,
    is_drop_path,
    is_sum,
)
from depthfuse.merging.adapters.structure import NoBlock, Readings, Unread
from depthfuse.merging.computed_weights import plain_type
from depthfuse.merging.tracing import copy_around_tensors

log = logging.getLogger(__name__)

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, Affine)
_RESHAPES = (torch.reshape, torch.Tensor.view, "reshape", "view")
_VIEWS_OF_SCALE = ("view", "reshape", "unsqueeze", torch.reshape, torch.unsqueeze, operator.getitem)
_ACTIVATION_LIBRARIES = ("timm.layers.activations", "transformers.activations")

# Blocks whose own code asks for sizes, which no proxy can tell.
_SWIN = FeedForward(
    (
        Step("norm", "layernorm_after"),
        Step("linear", "mlp.fc1"),
        Step("act", "mlp.activation_fn"),
        Step("linear", "mlp.fc2"),
        Step("dropout", "dropout"),
    ),
    from_the_skip=True,
    keeps_input=True,
    has_mixer=True,
    returned=2,
)
_KNOWN = {"transformers.models.swin.modeling_swin.SwinLayer": _SWIN}

_readings: Readings[FeedForward] = Readings()


def feed_forward_of(block: nn.Module, anew: bool = False) -> FeedForward:
    """Where a block's feed-forward branch lies. Raises Unread with what stands in the way, NoBlock where there is
    none.
    """
    return _readings.of(block, lambda: _find(block), anew)


def _find(block: nn.Module) -> FeedForward:
    kind = plain_type(block)
    known = _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
    if known is None:
        return _Reader(block).feed_forward()
    try:
        for step in known.steps:
            block.get_submodule(step.path)
    except AttributeError as error:
        raise Unread(f"its layers are not those of the versions that depthfuse knows ({error})") from error
    return known


def _is_activation(module: nn.Module) -> bool:
    if any(True for _ in module.parameters()):
        return False
    return isinstance(module, ACTIVATIONS) or type(module).__module__.startswith(_ACTIVATION_LIBRARIES)


def _has_numbers(module: nn.Module) -> bool:
    """Whether a layer's weights are single numbers, as those of an activation may be."""
    weights = list(module.parameters())
    return bool(weights) and all(weight.numel() == 1 for weight in weights)


class _TolerantTracer(BlockTracer):
    """Follows the code of modules as far as it can; one that it cannot follow is one operation."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return (
            isinstance(module, _NORMS)
            or _is_activation(module)
            or _has_numbers(module)
            or super().is_leaf_module(module, qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = len(self.graph.nodes)
        try:
            return super().call_module(m, forward, *args, **kwargs)
        except Exception as error:  # its own code, on a proxy
            log.debug("%s is taken as one: %s: %s", type(m).__name__, type(error).__name__, error)
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


class _Reader:
    """Reads the graph of one module from its end."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        try:
            self.graph = _TolerantTracer().trace(copy_around_tensors(block).eval())
        except Exception as error:  # the block's own code, on a proxy
            log.debug("%s is not read as a block: %s: %s", type(block).__name__, type(error).__name__, error)
            raise NoBlock(f"its code cannot be followed ({type(error).__name__})") from error
        given = [node for node in self.graph.nodes if node.op == "placeholder"]
        if not given:
            raise NoBlock("no input")
        self.x = given[0]
        self.calls = [node.target for node in self.graph.nodes if node.op == "call_module"]

    def feed_forward(self) -> FeedForward:
        (output,) = next(node for node in self.graph.nodes if node.op == "output").args
        returned = None
        if isinstance(output, tuple) and output and isinstance(output[0], fx.Node):
            output, returned = output[0], len(output)
        if not isinstance(output, fx.Node):
            raise NoBlock("its output is no tensor")
        node = self._past_reshapes(output)
        if not is_sum(node) or len(node.args) != 2 or node.kwargs:
            raise NoBlock("it does not end in a skip")
        if not all(isinstance(each, fx.Node) for each in node.args):
            raise NoBlock("a sum with a number")
        problems = []
        for branch, skip in (node.args, node.args[::-1]):
            try:
                steps, start = self._steps(branch)
            except Unread as problem:
                problems.append(problem)
                continue
            mixer, keeps = self._before(skip)
            same = self._past_reshapes(start) is self._past_reshapes(skip)
            return FeedForward(steps, same, keeps, mixer, returned)
        # of two sides the one with layers of a feed-forward branch has the better reason
        raise next((p for p in problems if not isinstance(p, NoBlock)), problems[0])

    def _past_reshapes(self, node: fx.Node) -> fx.Node:
        """The tensor that a node gives in another shape with the same last axis."""
        while True:
            if node.op == "call_module" and plain_type(self.block.get_submodule(node.target)) is nn.Identity:
                node = node.args[0]
                continue
            if node.target not in _RESHAPES or not node.args or not isinstance(node.args[0], fx.Node):
                return node
            sizes = node.args[1:]
            sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
            if not sizes or not self._is_channels(sizes[-1]):
                return node
            node = node.args[0]

    def _is_channels(self, size: Any) -> bool:
        """Whether a size is the last one of some tensor's shape."""
        if not isinstance(size, fx.Node) or size.target is not operator.getitem:
            return False
        shape, index = size.args
        taken = [user.args[1] for user in shape.users if user.target is operator.getitem]
        of_shape = shape.target in (getattr, "size") and (shape.target == "size" or shape.args[1] == "shape")
        return of_shape and all(isinstance(i, int) for i in taken) and index in (-1, max(taken, default=-1))

    def _steps(self, node: fx.Node) -> tuple[tuple[Step, ...], fx.Node]:
        """The steps of a branch that ends at `node`, and what its first one reads."""
        steps: list[Step] = []
        linears = 0
        while True:
            kind, path, before = self._step(node)
            if linears == 2 and kind not in ("norm", "nothing"):
                break
            if before is None:
                raise (Unread if linears or path == "a gate" else NoBlock)(path)
            if len(node.users) > 1:
                raise Unread(f"{kind} {path} has two readers")
            stateful = kind in ("norm", "linear")
            if stateful and self.calls.count(path) > 1:
                raise Unread(f"{path} is called twice")
            if kind != "nothing":
                steps.insert(0, Step(kind, path))
            linears += kind == "linear"
            node = before
            if linears == 2 and kind == "norm":
                break
        return _checked(steps, self.block), node

    def _step(self, node: fx.Node) -> tuple[str, str, fx.Node | None]:
        """(kind, path of its layer or parameter, what it reads)."""
        if node.op == "call_module":
            module = self.block.get_submodule(node.target)
            kind = plain_type(module)
            if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
                return "other", node.target, None
            before = node.args[0]
            if kind is nn.Identity:
                return "nothing", "", before
            if is_drop_path(module):
                return "drop path", node.target, before
            if kind in DROPOUTS:
                return "dropout", node.target, before
            if kind is nn.Linear or (kind is nn.Conv2d and _is_pointwise(module)):
                return "linear", node.target, before
            if isinstance(module, _NORMS):
                return "norm", node.target, before
            if _is_activation(module):
                return "act", node.target, before
            return "other", f"{kind.__name__} {node.target}", None  # also an activation with weights
        if node.target in PRODUCTS and len(node.args) == 2 and not node.kwargs:
            for value, factor in (node.args, node.args[::-1]):
                while isinstance(factor, fx.Node) and factor.target in _VIEWS_OF_SCALE:
                    factor = factor.args[0]
                if isinstance(factor, fx.Node) and factor.op == "get_attr" and isinstance(value, fx.Node):
                    return "scale", factor.target, value
            return "other", "a gate" if len(node.all_input_nodes) > 1 else "a product with a number", None
        if node.op in ("call_function", "call_method") and node.target in ACTIVATION_FUNCTIONS:
            name = getattr(node.target, "__name__", node.target)
            return "other", f"{name} is called as a function: let the block hold it as a module", None
        return "other", getattr(node.target, "__name__", str(node.target)), None

    def _before(self, skip: fx.Node) -> tuple[bool, bool]:
        """(whether anything comes before the branch, whether that is the input and a sum)."""
        node, mixer = self._past_reshapes(skip), False
        while node is not self.x:
            mixer = True
            if not is_sum(node) or len(node.args) != 2 or node.kwargs:
                return True, False
            sides = [self._past_reshapes(side) for side in node.args if isinstance(side, fx.Node)]
            kept = [side for side in sides if side is self.x or is_sum(side)]
            if not kept:
                return True, False
            node = kept[0]
        return mixer, True


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _checked(steps: list[Step], block: nn.Module) -> tuple[Step, ...]:
    """The steps where they are [norm] linear act linear [norm] [scale], with dropout and stochastic depth anywhere."""
    kinds = [step.kind for step in steps if step.kind not in ("dropout", "drop path")]
    middle = kinds[kinds.index("linear") :]
    if middle[:3] != ["linear", "act", "linear"] or middle[3:] not in (
        [],
        ["norm"],
        ["scale"],
        ["norm", "scale"],
    ):
        raise NoBlock(f"its last branch is {', '.join(kinds)}")
    first, second = (block.get_submodule(step.path) for step in steps if step.kind == "linear")
    if plain_type(first) is not plain_type(second):
        raise Unread("a linear layer and a convolution")
    return tuple(steps)
