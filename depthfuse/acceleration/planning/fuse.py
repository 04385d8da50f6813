"""Put fused modules in the place of what a graph's nodes compute together, by passes over the graph.

A pass looks for one pattern and replaces each place where it finds it; what it must keep is said at `Pass`. The first
one finds convolution and linear chains; where our kernels run, those of `accelerate/blocks.py` then put whole blocks
together. A chain starts at a convolution or linear layer and follows its only reader, as long as what that does fits

    y = scale * act(norm(conv(x) + bias) + residual) + shift

Batch norm, LayerScale and constants before the residual and the activation are folded into weight and bias,
in float64; after them they become scale and shift. A LayerNorm before a linear layer or behind a depthwise convolution
is taken in where the kernels run, which normalise what they hold anyway: before, its affine belongs in the weight and
the bias, behind, it is scale and shift. Permutations on the way (ConvNeXt goes from [N, H, W, C]
back to [N, C, H, W]) are moved behind the fused module, and their inverse before the residual; in
channels_last both are free. So are reshapes to a list of rows (a batch norm over tokens works on such a list).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from depthfuse.acceleration.planning import aten
from depthfuse.acceleration.planning.elements import Act, Add, Affine, Norm, layer_norm, read
from depthfuse.acceleration.planning.fuse_attention import fuse_attention
from depthfuse.acceleration.planning.fuse_blocks import KERNEL_PASSES
from depthfuse.acceleration.planning.graph import constant_of, insert_fused, mark_value, new_call, path_of
from depthfuse.acceleration.planning.rows import keeps_rows
from depthfuse.errors import AccelerationError
from depthfuse.fused.layers import FusedConv2d, FusedLinear, FusedModule
from depthfuse.ops import resolve_backend

_PERMUTE = torch.ops.aten.permute.default
CONV_CHANNEL_AXIS = -3
LINEAR_CHANNEL_AXIS = -1


@dataclass
class Chain:
    """A product layer and all that was found to follow it, as the arguments of a fused module (float64)."""

    start: fx.Node
    source: fx.Node
    geometry: (
        dict[str, Any] | None
    )  # stride, padding, dilation, groups of a convolution; None for a linear layer
    weight: Tensor  # the layer's own; what is folded into it waits in row_scale and column_scale
    bias: Tensor | None
    channel_axis: int
    end: fx.Node
    nodes: list[fx.Node]
    norm_eps: float | None = None
    row_scale: Tensor | None = None  # of each output channel
    column_scale: Tensor | None = None  # of each input of a linear layer
    residual: fx.Node | None = None
    residual_permute: tuple[int, ...] | None = None  # how the output lay where the residual was added
    act: str | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    permute: tuple[int, ...] | None = None  # of the output, so far
    rows: fx.Node | None = None  # the reshape that brought the output into the form that it has so far
    pieces: list[str] = field(default_factory=list)

    def take(self, element) -> bool:
        """Absorb one element if it fits; says whether it did."""
        if isinstance(element, Norm):
            return self._take_norm(element)
        if isinstance(element, Affine):
            return self._take_affine(element)
        if isinstance(element, Act):
            if self.act is not None or self.scale is not None or self.shift is not None:
                return False
            self.act = element.name
            self.pieces.append(element.name)
            return True
        if isinstance(element, Add):
            taken = (self.residual, self.act, self.scale, self.shift, self.rows)
            if any(value is not None for value in taken):
                return False
            self.residual, self.residual_permute = element.other, self.permute
            self.pieces.append("residual")
            return True
        if self.rows is not None:
            return False
        ndim = len(element.dims)
        before = self.permute or tuple(range(ndim))
        axis = element.dims.index(ndim + self.channel_axis)
        self.permute = tuple(before[d] for d in element.dims)
        self.channel_axis = axis - ndim
        return True

    def take_rows(self, node: fx.Node) -> bool:
        """Absorb a reshape of a linear layer's output that keeps its rows."""
        if not keeps_rows(node, self.end) or self.geometry is not None or self.permute is not None:
            return False
        self.rows = None if aten.shape_of(node) == aten.shape_of(self.start) else node
        return True

    def _take_affine(self, element: Affine) -> bool:
        wide = any(v is not None and v.dim() == 1 and len(v) > 1 for v in (element.scale, element.shift))
        if wide and element.axis != self.channel_axis:
            return False
        channels = self.weight.shape[0]
        scale = None if element.scale is None else element.scale.expand(channels)
        shift = None if element.shift is None else element.shift.expand(channels)
        if self.act is None and self.residual is None and self.norm_eps is None:
            self._fold(scale, shift)
        else:
            if scale is not None:
                self.scale = scale if self.scale is None else self.scale * scale
                self.shift = None if self.shift is None else self.shift * scale
            if shift is not None:
                self.shift = shift if self.shift is None else self.shift + shift
        self.pieces.append("affine")
        return True

    def _take_norm(self, norm: Norm) -> bool:
        """LayerNorm behind a depthwise convolution, whose kernel holds all channels of its pixels."""
        groups = 1 if self.geometry is None else self.geometry["groups"]
        fits = groups > 1 and self.weight.shape[:2] == (groups, 1)
        taken = (self.norm_eps, self.act, self.residual, self.scale, self.shift)
        if not fits or any(value is not None for value in taken) or norm.axis != self.channel_axis:
            return False
        self.norm_eps, self.scale, self.shift = norm.eps, norm.weight, norm.bias
        self.pieces.append("norm")
        return True

    def take_norm_before(self, node: fx.Node, norm: Norm) -> None:
        """Absorb the LayerNorm at `node` that this chain's linear layer reads, alone."""
        self.norm_eps = norm.eps
        if norm.bias is not None:
            shift = self._scaled(self.weight) @ norm.bias
            self.bias = shift if self.bias is None else self.bias + shift
        if norm.weight is not None:
            self.column_scale = norm.weight
        self.source = node.args[0]
        self.nodes.insert(0, node)

    def _fold(self, scale: Tensor | None, shift: Tensor | None) -> None:
        if scale is not None:
            self.row_scale = scale if self.row_scale is None else self.row_scale * scale
            self.bias = None if self.bias is None else self.bias * scale
        if shift is not None:
            self.bias = shift if self.bias is None else self.bias + shift

    def _scaled(self, weight: Tensor, first: int = 0) -> Tensor:
        """Rows of the layer's weight, from row `first` on, with all that was folded into them; float64."""
        weight = weight.double()
        if self.row_scale is not None:
            scale = self.row_scale[first : first + len(weight)]
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        return weight if self.column_scale is None else weight * self.column_scale

    @torch.no_grad()
    def write_weight(self, target: Tensor) -> None:
        """Write the folded weight into `target`, rounded once.

        A few rows at a time: float64 copies of every layer would leave as many holes in the heap, and planning a net
        would need twice its memory.
        """
        if self.row_scale is None and self.column_scale is None:
            return
        for first in range(0, len(target), 64):
            rows = slice(first, first + 64)
            target[rows].copy_(self._scaled(self.weight[rows], first))


# What the fused modules compute in.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def start_chain(node: fx.Node) -> Chain | None:
    """A chain that holds only the layer of `node`, or None if that is no convolution or linear that we can run: with
    constant weights, all in one dtype.
    """
    name = aten.name_of(node)
    if name not in ("linear", "conv2d") or (name == "conv2d" and node.target._overloadname != "default"):
        return None
    given = aten.arguments(node)
    weight, bias = constant_of(given["weight"]), constant_of(given["bias"])
    if weight is None or (bias is None and given["bias"] is not None) or weight.numel() == 0:
        return None
    dtypes = {aten.dtype_of(given[key]) for key in ("input", "weight", "bias") if given[key] is not None}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        return None
    if name == "linear":
        return _chain(node, None, weight, bias, given["input"]) if weight.dim() == 2 else None
    if len(aten.shape_of(node) or ()) != 4:
        return None
    geometry = {key: _pair(given[key]) for key in ("stride", "padding", "dilation")}
    if not all(isinstance(n, int) for pair in geometry.values() for n in pair):
        return None
    return _chain(node, {**geometry, "groups": given["groups"]}, weight, bias, given["input"])


def _pair(value: list[int] | int) -> list[int]:
    found = [value] if isinstance(value, int) else list(value)
    return found * 2 if len(found) == 1 else found


def _chain(
    node: fx.Node, geometry: dict[str, Any] | None, weight: Tensor, bias: Tensor | None, source: fx.Node
) -> Chain:
    axis = LINEAR_CHANNEL_AXIS if geometry is None else CONV_CHANNEL_AXIS
    bias = None if bias is None else bias.double()
    return Chain(node, source, geometry, weight, bias, axis, node, [node])


def look_back(chain: Chain) -> None:
    """Absorb the LayerNorm before a linear layer, where nothing else reads its values."""
    if chain.geometry is not None:
        return
    _choose_token_first(chain)
    before = chain.source
    norm = layer_norm(before)
    if norm is None or aten.dtype_of(before) != aten.dtype_of(before.args[0]):
        return
    questions = [user for user in before.users if aten.name_of(user) == "sym_size"]
    if set(before.users) != {chain.start, *questions}:
        return
    for question in questions:  # its input has the same shape
        question.replace_input_with(before, before.args[0])
    chain.take_norm_before(before, norm)


def _choose_token_first(chain: Chain) -> None:
    """Of norm(x)[:, 0], what the head of a ViT reads, make norm(x[:, 0]): the other tokens need no norm."""
    choice = chain.source
    if aten.name_of(choice) != "select" or len(choice.users) != 1:
        return
    norm, axis = choice.args[0], choice.args[1]
    ndim = len(aten.shape_of(norm) or ())
    if layer_norm(norm) is None or len(norm.users) != 1 or axis % ndim == ndim - 1:
        return
    graph = norm.graph
    with graph.inserting_before(norm):
        token = new_call(graph, choice.target, (norm.args[0], *choice.args[1:]), choice)
    norm.args = (token, *norm.args[1:])
    mark_value(norm, choice)
    choice.replace_all_uses_with(norm)
    graph.erase_node(choice)
    chain.source = norm


def grow(chain: Chain, norms: bool) -> None:
    """Follow the only reader as far as the fused module's schema goes; `norms`: LayerNorm is part of that."""
    while len(chain.end.users) == 1:
        (user,) = chain.end.users
        longer = copy.copy(chain)
        longer.pieces = list(chain.pieces)
        elements = [] if longer.take_rows(user) else read(user, chain.end)
        if elements is not None and not norms and any(isinstance(e, Norm) for e in elements):
            return
        if elements is None or not all(longer.take(element) for element in elements):
            return
        longer.end, longer.nodes = user, [*chain.nodes, user]
        vars(chain).update(vars(longer))


def fuse_chains(plan: fx.GraphModule, backend: str) -> None:
    """Replace every chain of `plan` by a fused module."""
    norms = runs_triton_kernels(plan, backend)
    for node in list(plan.graph.nodes):
        chain = start_chain(node)
        if chain is None:
            continue
        if norms:
            look_back(chain)
        grow(chain, norms)
        emit(plan, chain, build(chain, backend))


# Changes a plan in place: (plan, backend). A pass puts each fused module in with
# `graph.insert_fused`, which writes down for which nodes it stands; the node whose value is that of the pattern's last
# one says so with `graph.mark_value`. Shapes and dtypes stay on the nodes for the passes after it.
Pass = Callable[[fx.GraphModule, str], None]


def runs_triton_kernels(plan: fx.GraphModule, backend: str) -> bool:
    """Whether our kernels run the plan where its weights are."""
    tensor = next(iter([*plan.parameters(), *plan.buffers()]), None)
    return tensor is not None and resolve_backend(backend, tensor.device)[0] == "triton"


def fuse(plan: fx.GraphModule, backend: str) -> None:
    """Run all passes over `plan`, in place."""
    passes: tuple[Pass, ...] = (
        fuse_attention,
        fuse_chains,
        *(KERNEL_PASSES if runs_triton_kernels(plan, backend) else ()),
    )
    for run in passes:
        run(plan, backend)
        plan.graph.eliminate_dead_code()


def build(chain: Chain, backend: str) -> FusedModule:
    """The fused module of a chain, in the dtype that its layer computes in.

    Raises AccelerationError where folding took a weight beyond what that holds: it would become infinite.
    """
    dtype = aten.dtype_of(chain.start)
    assert dtype is not None

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    tensors = (cast(chain.weight), cast(chain.bias), cast(chain.scale), cast(chain.shift))
    act = chain.act or "none"
    module: FusedLinear | FusedConv2d
    if chain.geometry is None:
        module = FusedLinear(*tensors, act=act, norm_eps=chain.norm_eps, backend=backend)
    else:
        module = FusedConv2d(*tensors, **chain.geometry, act=act, norm_eps=chain.norm_eps, backend=backend)
    chain.write_weight(module.weight)
    _check_range(chain, module, dtype)
    return module


def _check_range(chain: Chain, module: FusedModule, dtype: torch.dtype) -> None:
    exact = {"weight": chain.weight, "bias": chain.bias, "scale": chain.scale, "shift": chain.shift}
    if not all(t is None or bool(t.isfinite().all()) for t in exact.values()):
        return  # the model's own
    for name, tensor in module.tensors().items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise AccelerationError(
                f"{path_of(chain.start)}: with the norms folded into it, its {name} is beyond what {dtype} holds "
                f"({torch.finfo(dtype).max:,.0f}): choose dtype=torch.bfloat16 or torch.float32"
            )


def emit(plan: fx.GraphModule, chain: Chain, module: FusedModule) -> None:
    """Put a call of the fused module where the chain ended, with the permutations around it."""
    graph = plan.graph
    with graph.inserting_before(chain.end):
        arguments = [chain.source]
        if chain.residual is not None:
            residual = chain.residual
            if chain.residual_permute is not None:
                inverse = [chain.residual_permute.index(d) for d in range(len(chain.residual_permute))]
                value = aten.value_of(residual)
                residual = new_call(graph, _PERMUTE, (residual, inverse), residual)
                residual.meta["val"] = None if value is None else value.permute(inverse)
            arguments.append(residual)
        result = insert_fused(plan, module, tuple(arguments), chain.nodes)
        if chain.permute is not None:
            inverse = [chain.permute.index(d) for d in range(len(chain.permute))]
            result.meta["val"] = chain.end.meta["val"].permute(inverse)
            result = new_call(graph, _PERMUTE, (result, list(chain.permute)), chain.end)
        if chain.rows is not None:
            result.meta["val"] = chain.start.meta["val"]
            result = new_call(graph, chain.rows.target, (result, *chain.rows.args[1:]), chain.end)
        mark_value(result, chain.end)
    chain.end.replace_all_uses_with(result)
    for node in reversed(chain.nodes):
        graph.erase_node(node)
