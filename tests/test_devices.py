"""One list of GPUs: everything that names them reads it, and its numbers stay what they are."""

import ast
import typing
from pathlib import Path

import pytest
import torch

from depthfuse import config
from depthfuse.devices import DEVICES, OPTIONS
from depthfuse.kernels.launch import TARGETS, Target

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("depthfuse", "kernels", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "devices.py"
]


def test_kernels_plan_for_the_devices_of_the_list():
    assert {
        "gfx908": Target("hip", "gfx908", 120, 65536),
        "gfx90a": Target("hip", "gfx90a", 104, 65536),
        "gfx942": Target("hip", "gfx942", 304, 65536),
        "sm_80": Target("cuda", "sm_80", 108, 166912),
        "sm_90": Target("cuda", "sm_90", 132, 232448),
        "sm_100": Target("cuda", "sm_100", 148, 232448),
        "sm_120": Target("cuda", "sm_120", 170, 101376),
    } == TARGETS


@pytest.mark.parametrize(
    ("option", "arch", "numbers"),
    [
        ("mi100", "gfx908", (184.6, 92.3, 46.1, 23.1, 1229)),
        ("mi210", "gfx90a", (181.0, 181.0, 45.3, 22.6, 1638)),
        ("mi300x", "gfx942", (1307.4, 1307.4, 163.4, 81.7, 5300)),
        ("a100", "sm_80", (312.0, 312.0, 19.5, 19.5, 1555)),
        ("h100", "sm_90", (800.0, 800.0, 66.9, 66.9, 3000)),
        ("b200", "sm_100", (2250.0, 2250.0, 75.0, 75.0, 8000)),
        ("rtx5090", "sm_120", (209.5, 209.5, 104.8, 104.8, 1792)),
    ],
)
def test_peaks(option, arch, numbers):
    device = OPTIONS[option]
    assert device is DEVICES[arch] and len(OPTIONS) == len(DEVICES) == 7
    fp16, bf16, fp32, vector, bandwidth = numbers
    for dtype, rate in ((torch.float16, fp16), (torch.bfloat16, bf16), (torch.float32, fp32)):
        peaks = device.peaks(dtype)
        assert (peaks.matrix_tflops, peaks.vector_tflops, peaks.bandwidth_gbps) == (rate, vector, bandwidth)


def test_settings_offer_the_devices_of_the_list():
    hints = typing.get_type_hints(config.LatencyConfig)
    assert typing.get_args(hints["device"]) == ("here", *OPTIONS)


def test_no_second_list():
    known = {*OPTIONS, *DEVICES, *(option.upper() for option in OPTIONS)}
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            listed = []
            if isinstance(node, ast.Dict):
                listed = node.keys
            elif isinstance(node, ast.Subscript) and isinstance(
                node.slice, ast.Tuple
            ):  # Literal["...", "..."]
                listed = node.slice.elts
            names = [item.value for item in listed if isinstance(item, ast.Constant) and item.value in known]
            if len(names) > 1:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} lists {', '.join(names)}")
    assert not found, "read them from depthfuse/devices.py:\n" + "\n".join(found)
