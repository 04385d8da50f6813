"""Multiply-accumulates of a model, counted on a real forward pass, and its parameters."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count

# PyTorch counts attention on GPUs, and leaves out the operator that it runs on a CPU.
_CPU_ATTENTION = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
if _CPU_ATTENTION is not None:

    @register_flop_formula(_CPU_ATTENTION)
    def _cpu_attention_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query_shape, key_shape, value_shape)


@torch.no_grad()
def count_macs(net: nn.Module, input_size: tuple[int, ...], device: torch.device | str = "cpu") -> int:
    """Multiply-accumulates of convolutions, linears and attention for one input of `input_size` (without batch)."""
    was_training = net.training
    net.eval()
    parameter = next(net.parameters(), None)
    x = torch.zeros(1, *input_size, device=device, dtype=None if parameter is None else parameter.dtype)
    with FlopCounterMode(display=False) as counter:
        net(x)
    net.train(was_training)
    return counter.get_total_flops() // 2


def count_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
