"""Run a whole plan through oneDNN Graph, for one input shape on a CPU.

oneDNN's convolutions run up to twice as fast in its own blocked layout, where depthwise ones above all gain, and
creating a primitive's descriptor costs 50 us at each call of `torch.ops.mkldnn`. oneDNN Graph keeps values in the
blocked layout from one convolution to the next and compiles once. The only way to it in PyTorch is TorchScript, which
is deprecated but there in every version that depthfuse supports; where it is not, the plan runs as it is.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from depthfuse.ops import onednn

logger = logging.getLogger(__name__)

# TorchScript profiles the first runs and compiles after them.
_WARM_UP_RUNS = 3
_switch = threading.Lock()


@contextlib.contextmanager
def _fusion_enabled() -> Iterator[None]:
    # The switch is global, and this must not change how other TorchScript code in the process is compiled.
    with _switch:
        before = torch._C._jit_llga_enabled()
        torch._C._jit_set_llga_enabled(True)
        try:
            yield
        finally:
            torch._C._jit_set_llga_enabled(before)


def compile_plan(plan: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., object] | None:
    """A compiled copy of `plan` for exactly the shapes of `inputs`, or None where that cannot be made here.

    The copy swallows NaN where oneDNN's ReLU does (see `depthfuse.ops.cpu`).
    """
    if not hasattr(torch._C, "_jit_set_llga_enabled") or not onednn.available(inputs[0].dtype):
        return None
    try:
        with _fusion_enabled(), warnings.catch_warnings(), torch.no_grad():
            # Deprecation of TorchScript, and the tracer's advice on Python values that stand for this one shape.
            warnings.simplefilter("ignore")
            script = torch.jit.freeze(torch.jit.trace(plan, inputs, check_trace=False, strict=False))
            for _ in range(_WARM_UP_RUNS):
                script(*inputs)
            if "oneDNNFusionGroup" not in str(torch.jit.last_executed_optimized_graph()):
                return None
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        logger.info("oneDNN Graph cannot run this plan (%s): it runs op by op", str(error).splitlines()[0])
        return None
    return script
