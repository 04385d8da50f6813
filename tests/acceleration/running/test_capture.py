"""What a capture asks of its surroundings: the inputs' device, a scope without autograd and inference mode, one stream.

Without a card `torch.cuda` is a double that keeps book of the current device and stream, and of what is captured where.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from depthfuse.acceleration.running import cuda_graphs


class Double:
    """The part of `torch.cuda` that captures use. Work is seen by it through `work`."""

    def __init__(self):
        self.current, self.streams, self.capturing, self.log = 0, {}, None, []
        self.CUDAGraph = lambda: SimpleNamespace(recorded=[], replay=None)

    def _made(self, name):
        return SimpleNamespace(
            name=name, device=self.current, wait_stream=lambda other: None, wait_event=lambda event: None
        )

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before

    def Stream(self):
        return self._made("side")

    def current_stream(self):
        return self.streams.setdefault(self.current, self._made(f"default of {self.current}"))

    @contextlib.contextmanager
    def stream(self, stream):
        before = self.streams.get(self.current)
        self.streams[stream.device] = stream
        yield
        self.streams[stream.device] = before

    @contextlib.contextmanager
    def graph(self, graph, stream=None):
        assert stream is not None and stream.device == self.current
        self.capturing = graph, self.current
        with self.stream(stream):
            yield
        captured, device = self.capturing
        self.capturing = None
        assert captured.recorded, "nothing was captured: a replay would give stale outputs"

        def replay():
            assert self.current == device, "replayed on another device"
            for work in captured.recorded:
                work()

        captured.replay = replay

    def Event(self):
        return SimpleNamespace(record=lambda stream: self.log.append(("record", stream.device)))

    def work(self, device, run):
        """A launch on `device`, on its current stream: seen by a capture only where that captures."""
        self.log.append((self.current_stream().name, self.current))
        if self.capturing is not None and self.current == device:
            self.capturing[0].recorded.append(run)
        run()


class OnCard:
    """A tensor that says that it is on a card."""

    def __init__(self, tensor, device):
        self.tensor, self.device = tensor, device
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def stride(self):
        return self.tensor.stride()


@pytest.mark.parametrize("inference", [False, True])
def test_a_capture_is_on_its_inputs_device_and_in_no_inference_mode(inference, monkeypatch):
    double = Double()
    monkeypatch.setattr(torch, "cuda", double)
    card = torch.device("cuda", 1)
    made = []

    def empty_strided(shape, stride, dtype, device):
        assert device == card
        made.append(torch.zeros(shape, dtype=dtype))
        return SimpleNamespace(copy_=lambda x: made[-1].copy_(x.tensor))

    monkeypatch.setattr(torch, "empty_strided", empty_strided)
    modes = []
    output = torch.zeros(3)

    def run(x):
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        double.work(1, lambda: output.copy_(2 * x))
        return output

    x = torch.tensor([1.0, 2.0, 3.0])
    with torch.inference_mode(inference):
        replay = cuda_graphs.capture(run, (OnCard(x, card),))
    assert set(modes) == {(False, False)}
    assert not made[0].is_inference()
    assert {entry for entry in double.log} == {("side", 1)}  # warmed up and captured on one stream
    y = replay(torch.tensor([4.0, 5.0, 6.0]))
    assert torch.equal(y, torch.tensor([8.0, 10.0, 12.0]))
    assert y is not output and double.current == 0
    assert double.log[-1] == ("record", 1)
