"""Threads that merge while others run, compile, capture or merge models: nobody sees another one's tracing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from nets import build, random_subnet, randomise_norms
from torch import nn

from depthfuse import Supernet, merge
from depthfuse.acceleration import accelerate
from depthfuse.merging.adapters import find_blocks
from depthfuse.merging.folding import fold_batch_norms
from depthfuse.merging.merge import load_merged, merged_structure
from depthfuse.merging.tracing import one_at_a_time


def relative_error(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


class Meanwhile(nn.Module):
    """Lets another thread do something while its forward runs, the tracer's run of it too."""

    def __init__(self, action):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.action = action

    def forward(self, x):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.action).result()
        return self.norm(self.conv(x))


@torch.no_grad()
def test_compiled_models_run_while_another_thread_folds():
    """torch.fx's own tracer sets a flag for all threads, at which compiled models raise."""
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval()
    compiled = torch.compile(inner, backend="eager")
    x = torch.randn(2, 3, 5, 5)
    wanted, ran = compiled(x), []

    def run():
        ran.append(torch.equal(compiled(x), wanted))

    model = randomise_norms(Meanwhile(run).eval())
    y = torch.randn(2, 3, 7, 6)
    before = model(y)
    ran.clear()
    assert fold_batch_norms(model) == 1
    assert ran and all(ran)
    assert relative_error(model(y), before) <= 1e-5


@torch.no_grad()
def test_tracing_patches_nothing_that_others_use():
    seen = []

    def look():
        seen.append((nn.Module.__call__, nn.Module.__getattr__, torch.fx._symbolic_trace.CURRENT_PATCHER))

    look()
    model = randomise_norms(Meanwhile(look).eval())
    assert fold_batch_norms(model) == 1
    look()
    assert len(seen) > 2 and len(set(seen)) == 1


def test_folding_leaves_no_trace_in_the_model():
    """Numbers that a forward makes become constants of the graph, which torch.fx keeps in the model."""

    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)) + torch.arange(4.0)[:, None, None]

    model = randomise_norms(Adds().eval())
    attributes = set(vars(model))
    assert fold_batch_norms(model) == 1
    assert set(vars(model)) == attributes


def test_who_merges_waits_for_who_captures():
    """While torch.export runs, the parts of all modules are stand-ins of another class."""
    model, size = build("resnet")
    subnet = random_subnet(model)
    spec, tensors = subnet.spec(), merge(subnet, size).state_dict()
    jobs = [
        lambda: Supernet(model),
        lambda: find_blocks(model),
        lambda: merge(subnet, size),
        lambda: subnet.subnet(spec),
        lambda: merged_structure(spec),
        lambda: load_merged(spec, tensors, "here"),
        lambda: fold_batch_norms(build("resnet")[0]),
    ]
    for job in jobs:
        with ThreadPoolExecutor(1) as pool:
            with one_at_a_time:
                waiting = pool.submit(job)
                with pytest.raises(TimeoutError):
                    waiting.result(timeout=0.2)
            waiting.result()


def test_merging_beside_accelerating_gives_what_it_gives_alone():
    model, size = build("mobilenet")
    x = torch.randn(2, *size)
    choices = {path: names[0] for path, names in Supernet(model).options().items()}

    def merged():
        supernet = Supernet(model).eval()
        supernet.set_choices(choices)
        return merge(supernet, size)

    with torch.no_grad():
        wanted = merged()(x)
    other, other_size = build("resnet")
    stop = threading.Event()

    def capture():
        while not stop.is_set():
            accelerate(other, torch.randn(1, *other_size), tune="off", verify=False)

    with ThreadPoolExecutor(3) as pool:
        capturing = pool.submit(capture)
        try:
            results = [future.result() for future in [pool.submit(merged) for _ in range(6)]]
        finally:
            stop.set()
        capturing.result()
    with torch.no_grad():
        assert all(torch.equal(result(x), wanted) for result in results)


def test_supernets_run_and_train_while_another_thread_captures_and_merges():
    model, size = build("mobilenet")
    subnet = random_subnet(model, everything=True)
    x = torch.randn(2, *size)
    with torch.no_grad():
        wanted = subnet(x)
    other, other_size = build("resnet")
    stop = threading.Event()

    def run():
        runs = 0
        while not stop.is_set() or not runs:
            assert relative_error(subnet(x).detach(), wanted) <= 1e-5
            runs += 1

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            for seed in range(3):
                accelerate(other, torch.randn(1, *other_size), tune="off", verify=False)
                merge(random_subnet(other, seed), other_size)
        finally:
            stop.set()
        running.result()
