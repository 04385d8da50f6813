"""Graphs: which shapes are captured, padded or run as they are, without a GPU; and the real thing on one."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

from depthfuse.acceleration import accelerate
from depthfuse.acceleration.running.cuda_graphs import GraphCache
from depthfuse.measuring.accuracy import relative_error


class Recorder:
    """Stands for `capture`: remembers the shapes, refuses some, and notices two replays at once."""

    def __init__(self, refused=()):
        self.shapes, self.refused, self.busy = [], refused, threading.Lock()

    def __call__(self, run, inputs):
        shape, stride = tuple(inputs[0].shape), inputs[0].stride()
        self.shapes.append(shape)
        if shape in self.refused:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay(*given):
            assert (tuple(given[0].shape), given[0].stride()) == (shape, stride)
            assert self.busy.acquire(blocking=False), "two threads at once"
            try:
                return run(*given).clone()
            finally:
                self.busy.release()

        return replay


def double(x):
    return 2 * x


def images(batch, side=4):
    return torch.randn(batch, 3, side, side)


def test_each_shape_is_captured_once():
    recorder = Recorder()
    graphs = GraphCache(double, capture=recorder)
    for batch in (1, 2, 1, 2, 1):
        x = images(batch)
        assert torch.equal(graphs(x), 2 * x)
    assert recorder.shapes == [(1, 3, 4, 4), (2, 3, 4, 4)]
    graphs(images(2).contiguous(memory_format=torch.channels_last))  # other strides are another capture
    graphs(images(2).double())
    assert len(recorder.shapes) == 4


def test_the_least_recently_used_makes_room():
    recorder = Recorder()
    graphs = GraphCache(double, limit=2, capture=recorder)
    for side in (4, 5, 4, 6, 4, 5):
        graphs(images(1, side))
    assert [shape[2] for shape in recorder.shapes] == [4, 5, 6, 5]
    assert len(graphs) == 2


def test_what_cannot_be_captured_runs_as_it_is_and_is_not_tried_again(caplog):
    recorder = Recorder(refused={(1, 3, 4, 4)})
    graphs = GraphCache(double, capture=recorder)
    x = images(1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(graphs(x), 2 * x)
    assert recorder.shapes == [(1, 3, 4, 4)]
    assert len(caplog.records) == 1
    assert (
        "[1, 3, 4, 4] run launch by launch: they cannot be captured (operation not permitted" in caplog.text
    )
    assert len(graphs) == 0


def test_a_batch_that_nearly_fills_a_capture_is_padded_to_it():
    recorder = Recorder()
    graphs = GraphCache(double, batchwise=True, capture=recorder)
    for batch in (8, 7, 6, 5, 8):
        x = images(batch)
        y = graphs(x)
        assert y.shape == x.shape
        assert torch.equal(y, 2 * x)
    assert [shape[0] for shape in recorder.shapes] == [8, 5]
    graphs(images(7, side=5))  # another image size
    assert recorder.shapes[-1] == (7, 3, 5, 5)


def test_without_evidence_that_images_are_independent_nothing_is_padded():
    recorder = Recorder()
    graphs = GraphCache(lambda x: x - x.mean(), capture=recorder)
    for batch in (8, 7):
        x = images(batch)
        assert torch.equal(graphs(x), x - x.mean())
    assert [shape[0] for shape in recorder.shapes] == [8, 7]


def test_empty_batches_and_errors():
    recorder = Recorder()
    graphs = GraphCache(double, capture=recorder)
    assert graphs(images(0)).shape == (0, 3, 4, 4)
    assert recorder.shapes == []

    def fails(x):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        GraphCache(fails, capture=lambda run, inputs: run)(images(1))


@pytest.mark.parametrize("broken", ["stale", "half"])
def test_a_replay_that_gives_other_values_is_not_used(broken, caplog):
    def capture(run, inputs):
        first = run(*inputs).clone()

        def replay(x):
            y = run(x).clone()
            y[-1:] = first[-1:]  # as if the last launch had gone elsewhere
            return first if broken == "stale" else y

        return replay

    graphs = GraphCache(double, capture=capture)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            x = images(2)
            assert torch.equal(graphs(x), 2 * x)
    assert len(graphs) == 0
    assert caplog.text.count("its replay gives other values") == 1


def test_one_replay_at_a_time():
    graphs = GraphCache(double, batchwise=True, capture=Recorder())
    inputs = [images(1 + i % 4) for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        for x, y in zip(inputs, pool.map(graphs, inputs), strict=True):
            assert torch.equal(y, 2 * x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "test_convnext", "test_vit"])
def test_replays_give_what_the_plan_gives(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval().cuda().half()
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(4, *size, device="cuda", dtype=torch.float16)
    fast = accelerate(model, x, tune="heuristic")
    assert "graph" in fast.report().executor
    kept = []
    for batch in (4, 3, 1, 4, 2):
        given = torch.randn(batch, *size, device="cuda", dtype=torch.float16)
        kept.append((fast(given), fast.plan(given)))
    for replayed, planned in kept:
        assert relative_error(replayed, planned) < 2e-2
    inputs = [torch.randn(1 + i % 3, *size, device="cuda", dtype=torch.float16) for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        for given, y in zip(inputs, pool.map(fast, inputs), strict=True):
            assert relative_error(y, fast.plan(given)) < 2e-2
