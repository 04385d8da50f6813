"""The latency table: what each block costs on this machine, kept or merged in each way, as accelerated code."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from depthfuse.accelerate import accelerate
from depthfuse.config import LatencyConfig
from depthfuse.costs import CostTable
from depthfuse.env import device_name
from depthfuse.log import progress
from depthfuse.spec import KEEP
from depthfuse.supernet import Supernet, SwitchBlock
from depthfuse.timing import time_interleaved

log = logging.getLogger(__name__)


def measure_latencies(
    supernet: Supernet,
    input_size: tuple[int, int, int],
    config: LatencyConfig | None = None,
    cache: Path | None = None,
) -> CostTable:
    """Measure every block of a supernet, kept and merged, each accelerated, on inputs of the shape it sees.

    input_size: (C, H, W). Blocks of the same type and shapes share one measurement. With `cache`, a table measured
    under the same conditions is read back, and the new one is written there.
    """
    config = config or LatencyConfig()
    device = next(supernet.parameters()).device
    conditions = {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": str(next(supernet.parameters()).dtype).removeprefix("torch."),
        "batch_size": config.batch_size,
        "input_size": list(input_size),
        "backend": config.backend,
        "torch": torch.__version__,
        "model": supernet.source.name,
        "model_kwargs": json.loads(json.dumps(supernet.source.kwargs)),
    }
    if cache is not None and cache.exists():
        table = CostTable.load(cache)
        if table.conditions == conditions:
            return table
        log.info("the latency table %s was measured under other conditions: measuring again", cache)

    net = copy.deepcopy(supernet).eval()
    x = torch.randn(config.batch_size, *input_size, device=device)
    given = block_inputs(net, x)
    modules: dict[str, tuple[nn.Module, Tensor]] = {}  # one for each distinct shape
    keys: dict[tuple[str, str], str] = {}  # (path, candidate) -> key of its measurement
    for path, block in net.blocks.items():
        for name in [KEEP, *block.candidates]:
            block.choice = name
            module = block.fuse()
            key = _signature(module, given[path])
            keys[path, name] = key
            modules.setdefault(key, (module, given[path]))
    net.set_choices({})
    calls: dict[str, Callable[[], object]] = {}
    with progress("latency table", total=len(modules) + 1) as bar:
        for key, (module, example) in modules.items():
            calls[key] = _call(module, example, config)
            bar.advance()
        plain = copy.deepcopy(net.model)
        for path, block in net.blocks.items():
            plain.set_submodule(path, block.block)
        calls["whole"] = _call(plain, x, config)
        times = time_interleaved(calls, rounds=config.rounds)
        bar.advance()
    blocks_ms: dict[str, dict[str, float]] = {}
    for (path, name), key in keys.items():
        blocks_ms.setdefault(path, {})[name] = times[key].median_ms
    saved = {
        path: {n: forms[KEEP] - forms[n] for n in forms if n != KEEP} for path, forms in blocks_ms.items()
    }
    table = CostTable(conditions, "ms", times["whole"].median_ms, saved)
    if cache is not None:
        table.save(cache)
    return table


def _call(module: nn.Module, example: Tensor, config: LatencyConfig) -> Callable[[], object]:
    fast = accelerate(module.eval(), example_inputs=example, backend=config.backend)
    return lambda: fast(example)


@torch.no_grad()
def block_inputs(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each switch block is given when the net sees x: {block path: its input}."""
    given: dict[str, Tensor] = {}

    def hook(module: SwitchBlock, args: tuple[Tensor, ...]) -> None:
        given[module.path] = args[0].clone()  # the block may write over its input

    blocks = [m for m in net.modules() if isinstance(m, SwitchBlock)]
    handles = [m.register_forward_pre_hook(hook) for m in blocks]
    net(x)
    for handle in handles:
        handle.remove()
    return given


def _signature(module: nn.Module, example: Tensor) -> str:
    """Equal for modules of the same structure and shapes, whatever their weights."""
    shapes = [(name, list(p.shape)) for name, p in module.state_dict().items()]
    text = json.dumps([repr(module), shapes, list(example.shape)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def count_costs(*a): ...
