"""Several threads: accelerating at once, and running models while another thread accelerates."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from nets import build

from depthfuse.acceleration import accelerate
from depthfuse.measuring.accuracy import relative_error


def test_two_threads_accelerate_at_once():
    model, size = build("resnet")
    x = torch.randn(1, *size)
    with torch.no_grad():
        expected = model(x)
    with ThreadPoolExecutor(2) as pool:
        for fast in pool.map(lambda tune: accelerate(model, x, tune=tune), ["heuristic", "measure"] * 2):
            assert relative_error(fast(x), expected) < 1e-5
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_other_threads_run_models_while_one_is_traced():
    model, size = build("resnet")
    other, other_size = build("vit")
    x, y = torch.randn(1, *size), torch.randn(2, *other_size)
    running = accelerate(other, y, tune="heuristic")
    expected = running(y)
    stop = threading.Event()

    def serve():
        while not stop.is_set():
            assert torch.equal(running(y), expected)
            with torch.no_grad():
                assert relative_error(other(y), expected) < 1e-5

    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve)
        try:
            for _ in range(5):
                accelerate(model, x, tune="off", verify=False)
        finally:
            stop.set()
        serving.result()
