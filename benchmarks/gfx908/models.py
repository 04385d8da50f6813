"""Whole networks at small images, plain and with every other block merged, end to end by gfx908 code.

`accelerate` plans them for the MI100 and compares what comes out with the model in eager PyTorch, by its own tolerance.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import nn

import depthfuse
from benchmarks.gfx908.faults import Fault, Unsupported
from benchmarks.gfx908.operators import DTYPES, RIGHT, recorded
from depthfuse.errors import DepthfuseError

import timm  # isort: skip  after depthfuse, which knows its torchvision remedy

IMAGE_SIZES = {"resnet34": 64, "mobilenetv2_100": 64, "convnext_tiny": 64, "deit_tiny_patch16_224": 64}


BLOCKS = ("plain", "merged")


@dataclass(frozen=True)
class Row:
    """One network, run end to end.

    Attributes:
        launches, workgroups: of one forward pass.
        error: the largest difference from float64, as a share of the largest output.
    """

    triton: str
    network: str
    dtype: str
    blocks: str  # of BLOCKS
    image: str
    launches: int
    workgroups: int
    outcome: str
    error: float
    seconds: float


def model_of(network: str, merged: bool) -> nn.Module:
    """The network with random weights and running statistics that are not those of a fresh one."""
    torch.manual_seed(0)
    size = {"img_size": IMAGE_SIZES[network]} if network.startswith("deit") else {}
    model = timm.create_model(network, num_classes=10, **size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    if not merged:
        return model.eval()
    supernet = depthfuse.Supernet(model).eval()
    choices = {path: next(iter(names)) for path, names in list(supernet.options().items())[1::2]}
    supernet.set_choices(choices)
    return depthfuse.merge(supernet).eval()


def check(network: str, dtype: str, blocks: str) -> Row:
    """Plan, run and compare one network."""
    start, outcome, error, counted = time.perf_counter(), RIGHT, float("nan"), []
    size = IMAGE_SIZES[network]
    model = model_of(network, blocks == "merged")
    x = torch.randn(1, 3, size, size)
    with recorded() as launches, torch.no_grad():
        try:
            options = {"dtype": DTYPES[dtype], "backend": "triton", "tune": "heuristic", "dynamic": False}
            fast = depthfuse.accelerate(model, x, **options)
            before, given = len(launches), x.to(DTYPES[dtype])
            y = fast(given)
            counted = launches[before:]
            wanted = model.double()(given.double())
            error = ((y.double() - wanted).abs().max() / wanted.abs().max()).item()
        except (Fault, Unsupported, DepthfuseError) as fault:
            outcome = f"{type(fault).__name__}: {fault}"
    return Row(
        triton=triton.__version__,
        network=network,
        dtype=dtype,
        blocks=blocks,
        image=f"{size} x {size}",
        launches=len(counted),
        workgroups=sum(torch.Size(launch.grid).numel() for launch in counted),
        outcome=outcome,
        error=round(error, 6),
        seconds=round(time.perf_counter() - start, 1),
    )


def rows(networks: list[str], dtypes: list[str], blocks: list[str]) -> Iterator[Row]:
    """Each network with each of these `BLOCKS`."""
    for network in networks:
        for dtype in dtypes:
            for kind in blocks:
                yield check(network, dtype, kind)
