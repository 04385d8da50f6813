"""Plans: what is refused, memory that is shared, threads."""

import ctypes
import gc
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from native_ops import convolve, needs_engine

from depthfuse.kernels.arguments import Tail, Window
from depthfuse.native import plan as native
from depthfuse.native.library import NodeSpec, TensorSpec, library
from depthfuse.native.plan import Builder, Node

pytestmark = needs_engine


def chain(depth=4, channels=16, size=12):
    """Convolutions of 3x3, one after another, each with the one before the last as residual."""
    builder = Builder()
    source, x = (
        builder.tensor((1, size, size, channels), native.INPUT),
        builder.tensor((1, size, size, channels)),
    )
    builder.copy(source, x)
    before = x
    for i in range(depth):
        last = i == depth - 1
        builder.pad(x, 1)
        y = builder.tensor((1, size, size, channels), native.OUTPUT if last else native.ARENA)
        weight = torch.randn(channels, 3, 3, channels, generator=torch.Generator().manual_seed(i)) / 12
        node = Node(native.CONV, x, y, x2=before, act="relu", numbers=(3, 3, 1, 1, 1, 1, 1, 1), weight=weight)
        builder.nodes.append(node)
        before, x = x, y
    return builder


def test_memory_is_shared_by_tensors_that_are_never_there_together():
    # 32 channels are whole panels on every instruction set, so that no weight is padded.
    short, long = chain(4, channels=32).build(), chain(24, channels=32).build()
    weights = 20 * 32 * 9 * 32 * 4
    assert long.bytes - short.bytes < 1.2 * weights


def outputs_of(planned, x, threads=2):
    y = torch.full((1, 12, 12, 16), float("nan"))
    planned.run([x], [y], threads)
    return y


def test_runs_repeat_themselves_whatever_the_threads():
    planned, x = chain(8).build(), torch.randn(1, 12, 12, 16)
    first = outputs_of(planned, x, 1)
    assert first.isfinite().all()
    for threads in (1, 2, 3, 7, 300):
        assert torch.equal(outputs_of(planned, x, threads), first)


def test_the_times_of_the_nodes_are_those_of_a_run():
    planned, x = chain(4).build(), torch.randn(1, 12, 12, 16)
    result = torch.empty(1, 12, 12, 16)
    started = time.perf_counter()
    times_ms = planned.profile([x], [result], threads=1, runs=20)
    took_ms = (time.perf_counter() - started) * 1e3
    assert torch.equal(result, outputs_of(planned, x))
    assert len(times_ms) == 5 and min(times_ms) > 0  # the copy of the input, too
    assert sum(times_ms) * 20 < took_ms


def test_many_threads_run_many_plans():
    plans, x = [chain(8).build() for _ in range(3)], torch.randn(1, 12, 12, 16)
    wanted, wrong = outputs_of(plans[0], x), []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(60):
            if not torch.equal(outputs_of(rng.choice(plans), x, rng.randint(1, 4)), wanted):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, sys, torch
sys.path.insert(0, "tests")
from native.test_plan import chain, outputs_of
planned, x = chain(8).build(), torch.randn(1, 12, 12, 16)
wanted = outputs_of(planned, x, 3)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(outputs_of(planned, x, 3), wanted) else 1)
assert torch.equal(outputs_of(planned, x, 3), wanted)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plans_are_freed():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def many(count):
        for _ in range(count):
            outputs_of(chain(4, 16, 12).build(), torch.randn(1, 12, 12, 16))
        gc.collect()

    many(20)
    before = resident()
    many(200)
    assert resident() - before < 8  # MB; of 200 plans it would be 20 at least


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.ones(1, 12, 12, 15), torch.ones(1, 12, 12, 16), "expected 2304 float32"),
        (torch.ones(1, 12, 12, 16).double(), torch.ones(1, 12, 12, 16), "torch.float64"),
        (torch.ones(1, 12, 12, 16), torch.ones(1, 12, 11, 16), "expected 2304"),
        (torch.ones(1, 12, 16, 24)[..., ::2], torch.ones(1, 12, 12, 16), "dense"),
    ],
)
def test_wrong_tensors_are_refused(x, y, says):
    with pytest.raises(ValueError, match=says):
        chain().build().run([x], [y])
    with pytest.raises(ValueError, match="0 tensors given, expected 1"):
        chain().build().run([], [y])


def specs(builder):
    """A plan's structures, which a test may damage; all weights start at 0."""
    nodes = (NodeSpec * len(builder.nodes))()
    for spec, node in zip(nodes, builder.nodes, strict=True):
        spec.op, spec.x, spec.x2, spec.y = node.op, node.x, node.x2, node.y
        spec.p[: len(node.numbers)] = list(node.numbers)
        if node.op == native.CONV:
            spec.p[8] = node.groups
        spec.bias = spec.scale = spec.shift = -1
    return (TensorSpec * len(builder.tensors))(*builder.tensors), nodes


def all_kinds():
    """Every operation once, and what they give in one another."""
    builder = Builder()
    planes, rows = (
        builder.tensor((2, 12, 12, 16), native.INPUT),
        builder.tensor((2, 12, 12, 16), native.INPUT),
    )
    a, b, c, d, e, f, g, padded, joined, pooled, averaged, mean = (
        builder.tensor(shape)
        for shape in [
            *[(2, 12, 12, 16)] * 7,
            (2, 15, 14, 16),
            (2, 12, 12, 48),
            (2, 6, 6, 16),
            (2, 6, 6, 16),
            (2, 1, 1, 16),
        ]
    )
    builder.nodes.append(Node(native.FROM_PLANES, planes, a))
    builder.copy(rows, b)
    builder.pad(a, 1)
    window = (3, 3, 1, 1, 1, 1, 1, 1)
    builder.nodes += [
        Node(native.CONV, a, c, x2=b, act="relu", numbers=window, groups=2),
        Node(native.DEPTHWISE, a, d, numbers=window),
        Node(native.ADD, c, e, x2=d),
        Node(native.LAYER_NORM, e, f),
        Node(native.CONSTANT, -1, g),
        Node(native.PAD, f, padded, numbers=(1, 2, 1, 1)),
    ]
    for i, part in enumerate((e, f, g)):
        builder.copy(part, joined, y_channel=16 * i)
    attended = builder.tensor((2, 12, 12, 16))
    builder.nodes += [
        Node(native.ATTENTION, joined, attended, numbers=(2,)),
        Node(native.MAX_POOL, attended, pooled, numbers=(3, 3, 2, 2, 1, 1, 1, 1)),
        Node(native.AVERAGE_POOL, attended, averaged, numbers=(2, 2, 2, 2, 0, 0, 1, 1, 1, 1)),
        Node(native.MEAN, averaged, mean),
    ]
    gated, mapped, normed, resized = (builder.tensor(s) for s in [*[(2, 6, 6, 16)] * 3, (2, 5, 9, 16)])
    outputs = [builder.tensor(shape, native.OUTPUT) for shape in ((2, 5, 9, 16), (2, 15, 14, 16))]
    builder.nodes += [
        Node(native.MULTIPLY, pooled, gated, x2=mean),
        Node(native.MAP, gated, mapped, act="sigmoid"),
        Node(native.GROUP_NORM, mapped, normed, numbers=(4,)),
        Node(native.RESIZE, normed, resized, numbers=(native.BILINEAR,)),
        Node(native.TO_PLANES, resized, outputs[0]),
    ]
    builder.copy(padded, outputs[1])
    return builder


def create(tensors, nodes, weights):
    error = ctypes.create_string_buffer(200)
    handle = library().df_plan_create(
        tensors, len(tensors), nodes, len(nodes), weights.data_ptr(), weights.numel(), error, 200
    )
    if handle:
        library().df_plan_destroy(handle)
    return bool(handle), error.value.decode()


def run_on_zeros(tensors, nodes, weights):
    """A plan that is taken, on inputs of its own sizes."""
    handle = library().df_plan_create(
        tensors, len(tensors), nodes, len(nodes), weights.data_ptr(), weights.numel(), None, 0
    )
    buffers = [
        [torch.zeros(t.n * t.h * t.w * t.c) for t in tensors if t.place == place]
        for place in (native.INPUT, native.OUTPUT)
    ]
    pointers = [(ctypes.c_void_p * max(1, len(given)))(*(x.data_ptr() for x in given)) for given in buffers]
    library().df_plan_run(handle, *pointers, 2, None)
    library().df_plan_destroy(handle)


def test_damaged_plans_are_refused_or_harmless():
    """Any field of any structure set to any number: refused with a reason, or a plan that stays within its memory."""
    rng, refused, ran = random.Random(0), 0, 0
    weights = torch.zeros(16 * 12 * 12)
    assert {node.op for node in all_kinds().nodes} == set(range(17))
    for _ in range(4000):
        tensors, nodes = specs(all_kinds())
        for _ in range(rng.randint(1, 2)):
            spec = rng.choice([*tensors, *nodes])
            name = rng.choice([name for name, _ in spec._fields_ if name != "f"])
            value = rng.choice([-(2**31), -2, -1, 0, 1, 2, 3, 5, 11, 12, 13, 17, 255, 2**20, 2**31 - 1])
            if name == "p":
                spec.p[rng.randrange(10)] = value
            else:
                setattr(spec, name, value)
        taken, error = create(tensors, nodes, weights)
        assert taken or error
        refused += not taken
        if taken and all(t.n * t.h * t.w * t.c < 10**6 for t in tensors):
            run_on_zeros(tensors, nodes, weights)
            ran += 1
    assert refused > 2000
    assert ran > 200


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t, n: setattr(n[1], "weight", 1), "weights lie outside"),
        (lambda t, n: setattr(n[1], "weight", -2), "weights lie outside"),
        (lambda t, n: setattr(n[1], "bias", 16 * 9 * 16 - 15), "weights lie outside"),
        (lambda t, n: setattr(n[1], "x", 99), "tensor is 99"),
        (lambda t, n: setattr(n[1], "x", 3), "no node has written"),
        (lambda t, n: setattr(t[1], "border", 0), "past a border"),
        (lambda t, n: setattr(t[2], "h", 13), "does not follow from its window"),
        (lambda t, n: setattr(n[1], "y", 1), "writes over what it reads"),
        (lambda t, n: setattr(n[1], "y", 0), "writes to an input"),
        (lambda t, n: setattr(n[1], "act", 7), "activation is 7"),
        (lambda t, n: n[1].p.__setitem__(8, 3), "groups do not fit"),
        (lambda t, n: setattr(n[1], "op", 77), "operation is 77"),
        (lambda t, n: setattr(n[1], "algorithm", 3), "algorithm is 3"),
        (lambda t, n: setattr(t[2], "c", 2**30), "size is 1073741824"),
        (lambda t, n: setattr(t[0], "index", 1), "not numbered in order"),
        (lambda t, n: setattr(t[0], "border", 1), "have a border"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said(damage, says):
    tensors, nodes = specs(chain(3))
    weights = torch.zeros(16 * 9 * 16)
    assert create(tensors, nodes, weights)[0]
    damage(tensors, nodes)
    taken, error = create(tensors, nodes, weights)
    assert not taken
    assert says in error


def test_an_empty_output_is_no_plan():
    with pytest.raises(ValueError, match="size is 0"):
        convolve(torch.ones(0, 3, 4, 4), torch.ones(2, 3, 1, 1), Window(), Tail())
