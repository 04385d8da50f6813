"""Run a whole plan through oneDNN Graph, for one input shape on a CPU.

oneDNN's convolutions run up to twice as fast in its own blocked layout, where depthwise ones above all gain, and
creating a primitive's descriptor costs 50 us at each call of `torch.ops.mkldnn`. oneDNN Graph keeps values in the
blocked layout from one convolution to the next and compiles once. The only way to it in PyTorch is TorchScript, which
is deprecated but there in every version that depthfuse supports; where it is not, the plan runs as it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from depthfuse.ops import onednn

logger = logging.getLogger(__name__)

# TorchScript profiles the first runs and compiles after them.
_WARM_UP_RUNS = 3
# How many compiled partitions oneDNN Graph keeps, whoever else has dropped them; it looks once, at the first one.
# TorchScript holds those that it runs itself and never asks for one again: the cache only fills, by up to 70 MB.
_CACHE_CAPACITY = "DNNL_GRAPH_COMPILED_PARTITION_CACHE_CAPACITY"
_switch = threading.Lock()


@contextlib.contextmanager
def _fusion_enabled() -> Iterator[None]:
    # The switch is global, and this must not change how other TorchScript code in the process is compiled.
    with _switch:
        before, capacity_given = torch._C._jit_llga_enabled(), _CACHE_CAPACITY in os.environ
        torch._C._jit_set_llga_enabled(True)
        os.environ.setdefault(_CACHE_CAPACITY, "0")
        try:
            yield
        finally:
            torch._C._jit_set_llga_enabled(before)
            if not capacity_given:
                os.environ.pop(_CACHE_CAPACITY, None)


def compile_plan(plan: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., object] | None:
    """A compiled copy of `plan` for exactly the shapes of `inputs`, or None where that cannot be made here.

    The copy swallows NaN where oneDNN's ReLU does (see `depthfuse.ops.cpu`).
    """
    if not hasattr(torch._C, "_jit_set_llga_enabled") or not onednn.available(inputs[0].dtype):
        return None
    try:
        with _fusion_enabled(), warnings.catch_warnings(), torch.no_grad():
            # The tracer's advice on Python values that stand for this one shape.
            warnings.simplefilter("ignore")
            script = _script(plan, inputs)
            for _ in range(_WARM_UP_RUNS):
                script(*inputs)
            if "oneDNNFusionGroup" not in str(torch.jit.last_executed_optimized_graph()):
                return None
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        logger.info("oneDNN Graph cannot run this plan (%s): it runs op by op", str(error).splitlines()[0])
        return None
    return script


def _script(plan: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., object]:
    """`plan` as a TorchScript function that owns all it consists of.

    What `torch.jit.trace` and `torch.jit.freeze` make belongs to one registry, which keeps code, weights and compiled
    kernels until the process ends: 38 MB for each ResNet-18. This is the same code, as a function in a registry of its
    own. The plan's weights, which need no gradient, become constants, as they do by freezing.
    """
    graph, _ = torch._C._create_graph_by_tracing(plan.__call__, inputs, _no_name, False, False)
    torch._C._jit_pass_optimize_frozen_graph(graph, True)
    return torch._C._create_function_from_graph("plan", graph)


def _no_name(_value: Tensor) -> str:
    return ""
