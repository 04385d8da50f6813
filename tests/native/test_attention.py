"""Attention, directly and by products of bfloat16, against float64. Without tiles, all ways are the direct one."""

import pytest
import torch
import torch.nn.functional as F
from native_ops import needs_engine, run
from timm.models.vision_transformer import VisionTransformer

from depthfuse import accelerate
from depthfuse.acceleration.running.native_engine import compile_plan
from depthfuse.native import plan as native
from depthfuse.native.library import isa, why_missing
from depthfuse.native.plan import Builder, NativePlan, Node
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import assert_within

pytestmark = needs_engine
AS_EXACT = (native.DIRECT, native.TILES)
WAYS = pytest.mark.parametrize(
    "algorithm", [native.DIRECT, native.TILES, native.TILES_BF16], ids=["direct", "tiles", "rounded"]
)
SIZES = pytest.mark.parametrize(
    ("tokens", "heads", "dim"),
    [(1, 1, 1), (7, 2, 16), (197, 3, 64), (50, 1, 33), (33, 2, 24), (128, 1, 80), (31, 3, 100), (64, 2, 32)],
)


def attend(qkv, heads, algorithm=native.DIRECT, threads=2):
    images, tokens, channels = qkv.shape
    builder = Builder()
    x = builder.tensor((images, 1, tokens, channels), native.INPUT)
    y = builder.tensor((images, 1, tokens, channels // 3), native.OUTPUT)
    scale = (channels // 3 // heads) ** -0.5
    builder.nodes.append(Node(native.ATTENTION, x, y, algorithm=algorithm, numbers=(heads,), f=scale))
    return run(builder, [qkv], y, threads).view(images, tokens, channels // 3)


@SIZES
@WAYS
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_way_is_right(tokens, heads, dim, algorithm, threads):
    qkv = torch.randn(2, tokens, 3 * heads * dim)
    if algorithm == native.TILES_BF16:
        qkv = qkv.bfloat16().float()
    value, error = oracle.attention(qkv, heads, sums=torch.float32)
    if algorithm == native.TILES_BF16:
        # Their probabilities are rounded, each by 2^-9 of itself: so the sum by 2^-9 of that of magnitudes.
        q, k, v = qkv.view(2, tokens, 3, -1).unbind(2)
        magnitudes, _ = oracle.attention(torch.cat([q, k, v.abs()], -1), heads, sums=torch.float32)
        error = error + 2**-9 * magnitudes
    assert_within(attend(qkv, heads, algorithm, threads), value, error)


@pytest.mark.skipif(why_missing() is not None or isa() != "amx", reason="this processor has no tiles")
def test_tiles_are_what_runs():
    qkv = torch.randn(1, 197, 3 * 64)
    ways = [attend(qkv, 1, way) for way in (native.DIRECT, native.TILES, native.TILES_BF16)]
    assert not torch.equal(ways[0], ways[1]) and not torch.equal(ways[0], ways[2])


@pytest.mark.parametrize("algorithm", AS_EXACT)
def test_large_scores(algorithm):
    qkv = 30 * torch.randn(1, 20, 3 * 32)
    q, k, v = qkv.double().view(1, 20, 3, 1, 32).permute(2, 0, 3, 1, 4)
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 20, 32)
    torch.testing.assert_close(attend(qkv, 1, algorithm).double(), wanted, rtol=0, atol=2e-3)


@WAYS
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4e38])
@pytest.mark.parametrize("part", range(3), ids=["query", "key", "value"])
def test_values_without_parts(algorithm, value, part):
    """As the direct way has them, in whichever row they are and wherever else."""
    qkv = torch.randn(2, 70, 3, 2 * 32)
    qkv[1, 66, part, 40] = value
    wanted, given = attend(qkv.flatten(2), 2), attend(qkv.flatten(2), 2, algorithm)
    limits = {"rtol": 2e-2, "atol": 2e-2} if algorithm == native.TILES_BF16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(given, wanted, equal_nan=True, **limits)


def test_other_algorithms_are_refused():
    with pytest.raises(ValueError, match="an attention's algorithm is 4"):
        attend(torch.randn(1, 8, 3 * 16), 1, native.WINOGRAD_4)


@pytest.mark.parametrize(
    ("side", "dtype", "algorithm"),
    [
        (192, torch.float32, native.TILES),  # 145 tokens
        (176, torch.float32, native.DIRECT),  # 122
        (64, torch.bfloat16, native.TILES_BF16),
        (192, torch.float16, native.TILES),
    ],
)
def test_which_way_a_plan_takes(side, dtype, algorithm, monkeypatch):
    taken = []
    build = NativePlan.__init__

    def seen(self, builder):
        taken.extend(node.algorithm for node in builder.nodes if node.op == native.ATTENTION)
        build(self, builder)

    monkeypatch.setattr(NativePlan, "__init__", seen)
    net = VisionTransformer(side, 16, num_classes=5, embed_dim=32, depth=2, num_heads=2).eval().to(dtype)
    x = torch.randn(1, 3, side, side).to(dtype)
    assert compile_plan(accelerate(net, x, tune="off").plan, (x,)) is not None
    assert taken == [algorithm] * 2
