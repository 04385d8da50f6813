"""What is accelerated, saved and loaded again and again leaves nothing behind.

In processes of their own: memory is then theirs alone, and no log that pytest captures holds what it was told of.
"""

import subprocess
import sys

import pytest

# 18 MB of weights, and a plan that oneDNN Graph always runs.
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


# A net that cannot be captured, whose children can, and one of these.
CAPTURES = """
import gc
import linecache
import sys
import torch
from torch import fx, nn
from torch.fx import graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from depthfuse import accelerate, load_accelerated


class InParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.rest = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))

    def forward(self, x):
        y = self.conv(x)
        return self.rest(y if float(y.detach().sum()) < 1e9 else -y)


def environments():
    for _ in range(3):  # what C++ holds of a circle is let go of one round later
        gc.collect()
    return sum(type(thing) is ShapeEnv for thing in gc.get_objects())


def sources():
    gc.collect()
    lines = sum(name.startswith("<eval_with_key>") for name in linecache.cache)
    return len(graph_module._loader.eval_cache), lines


def step(model, x):
    fast = accelerate(model, x, tune="heuristic", verify="blocks")
    if not isinstance(model, InParts):  # which cannot be built without its class
        fast.save(sys.argv[1])
        load_accelerated(sys.argv[1])
    return fast


model = InParts().eval()
for net, x in ((model, torch.randn(2, 3, 8, 8)), (model.rest, torch.randn(2, 4, 6, 6))):
    for _ in range(2):
        step(net, x)
    first, notes = environments(), sources()
    for _ in range(4):
        step(net, x)
    now = environments()
    assert now <= first, (now, first)
    assert sources() == notes, (sources(), notes)
    fast = step(net, x)
    (graph, *_) = (module for module in fast.modules() if isinstance(module, fx.GraphModule))
    source = linecache.getlines(type(graph).forward.__code__.co_filename)
    assert "def forward" in "".join(source), source  # for tracebacks, as long as it may run
    del fast, graph, _
    assert sources() == notes, (sources(), notes)
"""


def run(script, path):
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_weights_and_compiled_code_are_freed(tmp_path):
    said = run(HEAVY, tmp_path / "fast.safetensors")
    if "no oneDNN Graph" in said:
        pytest.skip("this PyTorch has no oneDNN Graph")
    resident_mb = [float(word) for word in said.split()]
    # One of the 14 copies of the weights that seven repetitions compile would be more.
    assert resident_mb[-1] - resident_mb[2] < 15, resident_mb


def test_captures_are_freed(tmp_path):
    run(CAPTURES, tmp_path / "fast.safetensors")
