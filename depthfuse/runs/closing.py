"""The closing comparison of a run: all forms of its net, side by side in accuracy and latency."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from depthfuse.acceleration import AcceleratedModel, Report, accelerate
from depthfuse.config import DTYPES, LatencyConfig, SearchConfig
from depthfuse.costs.latency import conditions_of
from depthfuse.costs.table import CostTable
from depthfuse.data import DataBundle
from depthfuse.env import versions
from depthfuse.measuring.counting import count_macs, count_parameters
from depthfuse.measuring.timing import time_interleaved
from depthfuse.merging.supernet import Supernet
from depthfuse.runs.report import acceleration_document, check_budget
from depthfuse.spec import ModelSource, SubnetSpec
from depthfuse.tasks import Task
from depthfuse.training.evaluation import evaluate

log = logging.getLogger(__name__)

_PASSES = 5  # of each operation, for the table of operations


class Closing:
    """The nets, all on one device.

    settings: of the latencies. size: of one image, (C, H, W).
    """

    def __init__(
        self,
        baseline: nn.Module,
        pruned: nn.Module,
        merged: nn.Module,
        size: tuple[int, int, int],
        settings: LatencyConfig,
    ):
        self.size, self.settings = size, settings
        self.dtype = DTYPES[settings.dtype]
        self.device = next(baseline.parameters()).device
        self.x = torch.randn(settings.batch_size, *size, device=self.device)
        self.baseline, merged = baseline.eval(), merged.eval()
        options: dict[str, Any] = {"dtype": self.dtype, "backend": settings.backend}
        self.nets: dict[str, nn.Module] = {
            "baseline": self.baseline,
            "baseline accelerated": accelerate(self.baseline, self.x, **options),
            "pruned": pruned.eval(),
            "merged": merged,
            "merged accelerated": accelerate(merged, self.x, **options),
        }

    def rows(self, data: DataBundle, task: Task) -> list[dict[str, Any]]:
        """One for each net: the metric in percent on the validation images, counts, and times in ms."""
        timed = {name: _in_dtype(net, self.dtype) for name, net in self.nets.items()}
        given = self.x.to(self.dtype)
        calls: dict[str, Callable[[], object]] = {
            name: functools.partial(net, given) for name, net in timed.items()
        }
        times = time_interleaved(calls, rounds=max(self.settings.rounds, 15), device=self.device)
        rows = []
        for name, net in self.nets.items():
            counted = self.nets[name.removesuffix(" accelerated")]
            rows.append(
                {
                    "net": name,
                    "top1": evaluate(net, data.val_loader(), task=task).top1,
                    "parameters": count_parameters(counted),
                    "macs": count_macs(counted, self.size, self.device),
                    "latency_ms": times[name].median_ms,
                    "latency_quartiles_ms": list(times[name].quartiles_ms),
                    "speedup": times[name].speedup_over(times["baseline accelerated"]),
                }
            )
        return rows

    def document(
        self,
        source: ModelSource,
        spec: SubnetSpec,
        search: SearchConfig,
        table: CostTable,
        data: DataBundle,
        task: Task,
    ) -> dict[str, Any]:
        """What results.json holds (`report.RESULTS`): `rows`, how they came about, and whether they meet the budget.

        source, spec: of the net, and of what was pruned of it. search, table: what that was chosen by.
        """
        rows = self.rows(data, task)
        supernet = Supernet(self.baseline)
        conditions = conditions_of(supernet, self.size, self.settings)
        choices = spec.mapping()
        here = not table.differing(conditions)
        return {
            "model": source.name,
            "model_kwargs": source.kwargs,
            "metric": task.metric,
            "conditions": conditions,
            "versions": {name: found for name, found in versions().items() if found},
            "chosen_by": table.conditions,
            "noisy_latencies": table.noisy(),
            "rows": rows,
            "budget": check_budget(search, rows, choices, here),
            "choices": choices,
            "blocks": supernet.options(),
            "accelerated": self.reports(),
        }

    def reports(self) -> dict[str, Any]:
        """What `accelerate` found of the two nets that it made, each with what its operations cost."""
        return {
            name: acceleration_document(self._profiled(name.removesuffix(" accelerated"), net))
            for name, net in self.nets.items()
            if isinstance(net, AcceleratedModel)
        }

    def _profiled(self, name: str, fast: AcceleratedModel) -> Report:
        try:
            return fast.profile(self.x, model=self.nets[name], passes=_PASSES)
        except Exception as failure:  # it only adds to the report, and shall not cost a run its result
            log.warning("the operations of the %s net cannot be told apart: %s", name, failure)
            return fast.report()


def _in_dtype(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The net itself where it is in that dtype, else a copy that is."""
    own = next(t.dtype for t in [*net.parameters(), *net.buffers()] if t.is_floating_point())
    return net if own == dtype else copy.deepcopy(net).to(dtype)
