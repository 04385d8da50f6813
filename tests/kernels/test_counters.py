"""Counters: launches that may run at the same time never count on the same ones."""

import threading

import torch

from depthfuse.kernels.counters import Counters, counters
from tests.fake_cuda import FakeCuda

CPU = torch.device("cpu")


def test_own_counters_are_the_same_ones_until_more_are_asked_for():
    own, other = Counters(), Counters()
    with own.in_use():
        first = counters(5, CPU)
        assert counters(7, CPU) is first
        with other.in_use():
            assert counters(5, CPU) is not first
        assert counters(7, CPU) is first
        assert counters(first.numel() + 1, CPU).numel() > first.numel()
    assert counters(5, CPU) is not first
    assert first.dtype is torch.int32 and not first.any()


def test_own_counters_are_those_of_one_thread():
    own, seen = Counters(), []
    with own.in_use():
        first = counters(5, CPU)
        thread = threading.Thread(target=lambda: seen.append(counters(5, CPU)))
        thread.start()
        thread.join()
    assert seen[0] is not first


def test_each_stream_has_its_own():
    with FakeCuda():
        card = torch.device("cuda", 0)
        here = counters(5, card)
        assert counters(5, card) is here
        with torch.cuda.stream(torch.cuda.Stream()):
            assert counters(5, card) is not here


def test_each_graph_has_its_own():
    from depthfuse.acceleration.running.cuda_graphs import capture

    with FakeCuda():
        x, taken = torch.ones(3, device="cuda"), []

        def run(x):
            taken.append(counters(5, x.device))
            return x + 1

        for _ in range(2):
            capture(run, (x,))
        run(x)
        *calls, alone = taken
        first, second = calls[: len(calls) // 2], calls[len(calls) // 2 :]
        assert len({id(zeros) for zeros in first}) == len({id(zeros) for zeros in second}) == 1
        assert first[0] is not second[0]
        assert alone is not first[0] and alone is not second[0]


def test_a_graph_of_somebody_else_fills_its_own():
    with FakeCuda():
        card = torch.device("cuda", 0)
        torch.ones(1, device=card)
        before = counters(5, card)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            assert counters(5, card) is not before
