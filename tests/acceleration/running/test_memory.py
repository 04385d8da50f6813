"""What is accelerated, saved and loaded again and again leaves nothing behind."""

import gc
import linecache
import subprocess
import sys

import pytest
import torch
from torch import fx, nn
from torch.fx import graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from depthfuse.acceleration import accelerate, load_accelerated

# 18 MB of weights, and a plan that oneDNN Graph always runs. In a process of its own, whose memory is its alone.
HEAVY = """
import sys
import torch
from torch import nn
from benchmarks.tools.memory import repeat
from depthfuse import accelerate, load_accelerated
from depthfuse.acceleration.running import choose

torch.set_num_threads(1)
choose.clearly_faster = lambda *_: True
choose.judge = lambda execution, _: execution
model = nn.Sequential(
    nn.Conv2d(3, 512, 3), nn.ReLU(), nn.Conv2d(512, 512, 3), nn.ReLU(), nn.Conv2d(512, 512, 3), nn.ReLU()
).eval()
x = torch.randn(1, 3, 9, 9)
path = sys.argv[1]


def step():
    fast = accelerate(model, x)
    fast.save(path)
    assert load_accelerated(path).report().executor == fast.report().executor, "another choice"
    if "oneDNN Graph" not in fast.report().executor:
        print("no oneDNN Graph")
        sys.exit()


print(*(tidied for _, _, tidied in repeat(step, 10, every=1)))
"""


def test_weights_and_compiled_code_are_freed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, tmp_path / "fast.safetensors"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    if "no oneDNN Graph" in done.stdout:
        pytest.skip("this PyTorch has no oneDNN Graph")
    resident_mb = [float(word) for word in done.stdout.split()]
    # One of the 14 copies of the weights that seven repetitions compile would be more.
    assert resident_mb[-1] - resident_mb[2] < 15, resident_mb


def left() -> tuple[int, int, int]:
    """How many environments of symbolic sizes, generated sources, and lines of them for tracebacks there are."""
    gc.collect()
    environments = sum(type(thing) is ShapeEnv for thing in gc.get_objects())
    lines = sum(name.startswith("<eval_with_key>") for name in linecache.cache)
    return environments, len(graph_module._loader.eval_cache), lines


class InParts(nn.Module):
    """Cannot be captured; its children can."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.rest = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3))

    def forward(self, x):
        y = self.conv(x)
        return self.rest(y if float(y.detach().sum()) < 1e9 else -y)


@pytest.mark.parametrize("whole", [True, False])
def test_captures_are_freed(whole, tmp_path):
    model, path = InParts().eval(), tmp_path / "fast.safetensors"
    model = model.rest if whole else model
    x = torch.randn(2, 4 if whole else 3, 8, 8)

    def step():
        fast = accelerate(model, x, tune="heuristic", verify="blocks")
        if whole:  # the other cannot be built without its class
            fast.save(path)
            load_accelerated(path)
        return fast

    step()
    before = left()
    for _ in range(3):
        step()
    assert left() == before
    fast = step()
    (graph, *_) = (module for module in fast.modules() if isinstance(module, fx.GraphModule))
    source = linecache.getlines(type(graph).forward.__code__.co_filename)
    assert "def forward" in "".join(source)  # for tracebacks, as long as it may run
    del fast, graph
    assert left() == before
