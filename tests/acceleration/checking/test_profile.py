"""The costs in a profile: exact counts, latencies that exist, the roofline's arithmetic, and the table of it all."""

from types import SimpleNamespace

import pytest
import torch
from nets import build
from torch import nn

from depthfuse.acceleration import Cost, accelerate
from depthfuse.acceleration.checking import profile
from depthfuse.acceleration.checking.profile import _clock
from depthfuse.measured_cache import MeasuredCache
from depthfuse.measuring import roofline
from depthfuse.measuring.counting import count_macs
from depthfuse.measuring.roofline import DEVICES, Peaks, peaks_of, roofline_us

CPU = torch.device("cpu")
PEAKS = Peaks(matrix_tflops=2e-3, vector_tflops=1e-3, bandwidth_gbps=4.0, source="a toy")


@pytest.fixture
def known_peaks(monkeypatch):
    monkeypatch.setattr(profile, "peaks_of", lambda device, dtype: PEAKS)


def test_counts_are_exact(known_peaks):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 9, 5),
    ).eval()
    x = torch.randn(2, 4, 6, 6)
    costs = [e.cost for e in accelerate(model, x, tune="heuristic").profile(x).entries]
    assert [cost.macs for cost in costs] == [
        2 * 36 * 8 * 4 * 9,
        2 * 36 * 8 * 9,
        0,
        2 * 5 * 72,
    ]  # a view is no operation
    image, pooled = 2 * 8 * 36, 2 * 8 * 9
    elements = [
        2 * 4 * 36 + 8 * 4 * 9 + image,
        image + 8 * 9 + 8 + image,
        image + pooled,
        pooled + 5 * 72 + 5 + 2 * 5,
    ]
    assert [cost.bytes_moved for cost in costs] == [4 * n for n in elements]
    assert costs[0].roofline_ms == 2 * costs[0].macs / 2e-3 / 1e9  # bound by arithmetic
    assert costs[1].roofline_ms == 2 * costs[1].macs / 1e-3 / 1e9  # depthwise: no matrix units
    assert costs[2].roofline_ms == pytest.approx(costs[2].bytes_moved / 4e6)  # bound by memory
    for cost in costs:
        assert cost.latency_ms > 0 and cost.before_ms is None
        assert cost.roofline_percent == 100 * cost.roofline_ms / cost.latency_ms


@pytest.mark.parametrize("family", ["resnet_d", "convnext", "vit"])
def test_nothing_is_left_out(family, known_peaks):
    model, size = build(family)
    x = torch.randn(1, *size)
    fast = accelerate(model, x, tune="heuristic")
    report = fast.profile(x, model=model, passes=1)
    assert sum(entry.cost.macs for entry in report.entries) == count_macs(model, size)
    assert all(entry.cost.before_ms > 0 for entry in report.entries)
    assert [entry.path for entry in report.entries] == [entry.path for entry in fast.report().entries]
    assert all(entry.cost is None for entry in fast.report().entries)  # what was measured is in the new one
    head = str(report).splitlines()[0].split()
    assert head[:5] == ["path", "op", "implementation", "latency_ms", "before_ms"]
    assert head[5:9] == ["MACs", "bytes", "roofline_ms", "roofline_%"]


def test_profiles_of_reduced_precision_and_of_children(known_peaks):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            y = self.stem(x)
            return self.head(y.mean((2, 3))) if y.mean() > -1e9 else y

    model = Branching().eval()
    x = torch.randn(1, 3, 4, 4)
    fast = accelerate(model, x, dtype=torch.bfloat16, tune="off")
    conv, head = fast.profile(x, model=model, passes=1).entries
    assert (conv.path, conv.cost.macs) == ("stem.0", 16 * 6 * 27)
    assert (head.path, head.cost.bytes_moved) == ("head", 2 * (6 + 12 + 2 + 2))
    assert conv.cost.before_ms > 0


def test_another_model_is_refused(known_peaks):
    model, size = build("resnet")
    x = torch.randn(1, *size)
    fast = accelerate(model, x, tune="off")
    other, _ = build("mobilenet")
    with pytest.raises(ValueError, match=r"takes the model that was accelerated"):
        fast.profile(x, model=other)
    with pytest.raises(ValueError, match=r"not made for a call like \(float32\[1, 2, 45, 45\]\)"):
        fast.profile(x[:, :2])


def test_roofline_percent():
    assert Cost(2.0, None, 0, 0, 1.0).roofline_percent == 50


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", None),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", None),
        ("AMD Instinct MI100", "MI100"),
    ],
)
def test_gpus_are_known_by_the_name_that_their_driver_gives(name, known, monkeypatch):
    monkeypatch.setattr(roofline, "device_name", lambda device: name)
    monkeypatch.setattr(roofline, "_measure", lambda device, dtype: PEAKS)
    monkeypatch.setattr(roofline, "MeasuredCache", SimpleNamespace(of=lambda device: MeasuredCache.of(CPU)))
    found = peaks_of(torch.device("cuda"), torch.float16)
    assert found.source == (f"peaks of {known}" if known else PEAKS.source)


def test_the_peaks_of_a_cpu_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path))
    calls = []
    monkeypatch.setattr(roofline, "_measure", lambda device, dtype: calls.append(dtype) or PEAKS)
    assert [peaks_of(CPU, torch.float32) for _ in range(3)] == [PEAKS] * 3
    assert peaks_of(CPU, torch.bfloat16) == PEAKS
    assert calls == [torch.float32, torch.bfloat16]
    cache = MeasuredCache.of(CPU)
    cache.put({"peaks": "torch.float32"}, {"speed": 1})
    assert peaks_of(CPU, torch.float32) == PEAKS
    assert len(calls) == 3


def test_measured_peaks_are_possible(monkeypatch):
    latencies = {"product": 8.0, "copy": 32.0}

    def timings(runs, **kwargs):
        for run in runs.values():
            run()
        return {name: roofline.Timing((latencies[name],)) for name in runs}

    monkeypatch.setattr(roofline, "time_interleaved", timings)
    peaks = roofline._measure(CPU, torch.float32)
    assert peaks.matrix_tflops == pytest.approx(2 * 2048**3 / 8e-3 / 1e12)
    assert peaks.bandwidth_gbps == pytest.approx(2 * 2**26 / 32e-3 / 1e9)
    latencies["product"] = 30.0  # slow: no larger one is tried
    assert roofline._measure(CPU, torch.float32).matrix_tflops == pytest.approx(2 * 512**3 / 30e-3 / 1e12)


def test_the_table_of_gpus():
    assert roofline_us("sm_90", 800e12, 0, torch.float16, True) == pytest.approx(1e6)
    assert roofline_us("sm_90", 66.9e12, 0, torch.float16, False) == pytest.approx(1e6)
    assert roofline_us("gfx908", 0, 1229e9, torch.float32, True) == pytest.approx(1e6)
    assert DEVICES["sm_80"].peaks(torch.float64) is None
    with pytest.raises(KeyError, match="sm_80 in torch.float64"):
        roofline_us("sm_80", 1, 1, torch.float64, True)


def test_the_clock_of_a_cpu():
    mark, between_ms = _clock(CPU)
    assert between_ms(mark(), mark()) >= 0
    assert between_ms(1.0, 1.5) == 500
