"""What is accelerated, saved and loaded again and again leaves nothing behind.

In processes of their own: memory is then theirs alone, and no log that pytest captures holds what it was told of.
"""

import subprocess
import sys

import pytest
from native_ops import needs_engine
from on_request import LONG, on_request

CALLS, CALLS_IF_LONG = 300, 10_000

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


# What both of the next two begin with: nets that the native engine always runs.
NATIVE = """
import sys
import torch
from torch import nn
from benchmarks.tools.memory import resident_mb, tidy
from depthfuse import accelerate
from depthfuse.acceleration.running import choose, native_engine
from depthfuse.native.plan import TILES, WINOGRAD_4

usual = choose.clearly_faster
choose.clearly_faster = lambda a, b, ms: b != choose.NATIVE and usual(a, b, ms)
choose.judge = lambda execution, _: execution
torch.set_num_threads(2)
torch.manual_seed(0)
times, warm_up = int(sys.argv[1]), int(sys.argv[2])


def grown_mb(step):
    for _ in range(warm_up):
        step()
    tidy()
    before = resident_mb()
    for _ in range(times):
        step()
    tidy()
    return resident_mb() - before


"""

# One output takes 64 KiB, and what lies between the operations more.
CALLED = (
    NATIVE
    + """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.winograd = nn.Conv2d(16, 16, 3, padding=1)
        self.inverted = nn.Sequential(
            nn.Conv2d(16, 96, 1), nn.ReLU6(), nn.Conv2d(96, 96, 3, padding=1, groups=96), nn.ReLU6(),
            nn.Conv2d(96, 16, 1),
        )
        self.patches, self.norm = nn.Conv2d(16, 64, 4, stride=4), nn.LayerNorm(64)
        self.qkv, self.projection = nn.Linear(64, 192), nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x):
        x = self.winograd(self.stem(x)).relu()
        x = self.patches(x + self.inverted(x)).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).reshape(*x.shape[:2], 3, 2, 32).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.projection(attended)
        return x + self.mlp(x)


asked = []
native_engine.fastest_algorithm = lambda shape, filters, numbers: (
    asked.append(shape) or (WINOGRAD_4 if numbers[:4] == (3, 3, 1, 1) else TILES)
)
x = torch.randn(1, 3, 64, 64)
fast = accelerate(Net().eval(), x, engines="own")
assert fast.report().executor.startswith(choose.NATIVE) and asked, fast.report()
assert fast(x).nbytes == 64 << 10
print(grown_mb(lambda: fast(x)))
"""
)

# One plan's weights take 2.25 MiB.
CREATED = (
    NATIVE
    + """
model = nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 3), nn.ReLU()).eval()
x = torch.randn(1, 3, 7, 7)


def step():
    fast = accelerate(model, x, engines="own", dynamic=False)
    assert fast.report().executor.startswith(choose.NATIVE), fast.report()


print(grown_mb(step))
"""
)


def run(script, *arguments, limit_s=300):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
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


@needs_engine
def test_calls_of_the_native_engine_keep_nothing():
    """10,000 with DEPTHFUSE_LONG=1, and the same bound: then 1 KiB a call is found."""
    grown_mb = float(run(CALLED, CALLS_IF_LONG if LONG else CALLS, 50, limit_s=3600 if LONG else 300))
    assert grown_mb < CALLS * 64 / 1024 / 2, "one output a call, or anything larger, would be twice as much"


@needs_engine
@on_request("a minute")
def test_plans_of_the_native_engine_are_freed():
    grown_mb = float(run(CREATED, 200, 3, limit_s=3600))
    assert grown_mb < 20 * 2.25 / 2, "the weights of one plan in twenty would be twice as much"
