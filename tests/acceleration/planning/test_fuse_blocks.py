"""Blocks in one launch: what is put together where our kernels run, that it computes the same, what is left alone."""

import pytest
import timm
import torch
from nets import build, randomise_norms
from torch import nn

from depthfuse import Supernet, merge
from depthfuse.acceleration import accelerate, load_accelerated
from depthfuse.fused.blocks import (
    FusedAttention,
    FusedBlock,
    FusedDepthwisePointwise,
    FusedInvertedResidual,
    FusedMlp,
    FusedPoolLinear,
)
from depthfuse.fused.layers import FusedConv2d, FusedModule
from depthfuse.measuring.accuracy import relative_error

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
# Compiled on the GPU where there is one (marked `gpu`), in Triton's interpreter on the CPU where there is none.
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


def count(fast, kind):
    return sum(isinstance(m, kind) for m in fast.plan.modules())


def kinds(fast):
    return [entry.kind for entry in fast.report().entries]


def vit():
    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 2, "num_classes": 7}
    model = timm.create_model("deit_tiny_patch16_224", **sizes).eval()
    for layer in model.modules():
        if isinstance(layer, nn.LayerNorm):
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias)
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return model, (3, 24, 24)


def convnext():
    torch.manual_seed(0)
    sizes = {"dims": (8, 12, 16, 20), "depths": (1, 1, 2, 1), "num_classes": 7}
    model = timm.create_model("convnext_tiny", **sizes).eval()
    for layer in model.modules():
        if isinstance(layer, nn.LayerNorm):
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias)
        if isinstance(getattr(layer, "gamma", None), nn.Parameter):
            nn.init.normal_(layer.gamma)
    return model, (3, 32, 32)


def check(model, size, device, dtype=torch.float32):
    x = torch.randn(2, *size, device=device)
    model = model.to(device)
    # Compared here, once: each run of a net takes seconds in the interpreter.
    backend = "triton" if device == "cpu" else "auto"
    fast = accelerate(model, x, dtype=dtype, backend=backend, tune="heuristic", verify=False)
    with torch.no_grad():
        expected = model(x)
        assert expected.std() > 0
        assert relative_error(fast(x), expected) < {torch.float32: 1e-5, torch.float16: 1e-2}[dtype]
    return fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_vit(dtype, device):
    model, size = vit()
    fast = check(model, size, device, dtype)
    assert (count(fast, FusedAttention), count(fast, FusedMlp)) == (2, 2)
    assert count(fast, nn.LayerNorm) == 0
    assert count(fast, nn.Linear) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_convnext(dtype, device):
    model, size = convnext()
    fast = check(model, size, device, dtype)
    assert (count(fast, FusedMlp), count(fast, FusedPoolLinear)) == (5, 1)
    filters = [m for m in fast.plan.modules() if isinstance(m, FusedConv2d) and m.groups > 1]
    assert [m.norm_eps is not None for m in filters] == [True] * 5


def test_mobilenet(device):
    model, _ = build("mobilenet")
    fast = check(model, (3, 32, 32), device)
    assert count(fast, FusedInvertedResidual) > 8
    assert (count(fast, FusedDepthwisePointwise), count(fast, FusedPoolLinear)) == (1 + late_blocks(model), 1)


def late_blocks(model):
    """Inverted residuals that are too wide for one launch: their depthwise and projection go together."""
    blocks = [m for m in model.modules() if type(m).__name__ == "InvertedResidual"]
    return sum(max(b.conv_pw.in_channels, b.conv_pwl.out_channels) > 64 for b in blocks)


def test_merged_convnext_is_two_convolutions_in_one_launch(device):
    model, size = convnext()
    supernet = Supernet(model).eval()
    supernet.set_choices({"stages.0.blocks.0": "factorised", "stages.2.blocks.1": "factorised"})
    merged = merge(randomise_norms(supernet)).eval()
    fast = check(merged, size, device)
    blocks = [m for m in fast.plan.modules() if isinstance(m, FusedDepthwisePointwise)]
    assert len(blocks) == 2
    assert all(m.scale is not None and m.config()["act"] == "gelu" for m in blocks)


@pytest.mark.parametrize("family", ["resnet", "vit_scaled"])
def test_nets_with_other_blocks(family, device):
    """A ViT that normalises queries and keys keeps its attention; a basic block has nothing to put together."""
    model, size = build(family)
    fast = check(model, size, device)
    assert count(fast, (FusedAttention, FusedInvertedResidual, FusedDepthwisePointwise)) == 0


def test_on_the_reference_backend_only_attention_is_put_together():
    for (model, size), attentions in ((vit(), 2), (convnext(), 0)):
        fast = accelerate(model, torch.randn(1, *size), backend="reference", tune="heuristic")
        assert count(fast, FusedBlock) == count(fast, FusedAttention) == attentions
        assert kinds(fast).count("layer_norm") > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_on_a_cpu(scale, dtype):
    """As far from float64 as the rounding of scores and weights, both of which "bmm" writes down, lets it be."""
    block = FusedAttention(torch.empty(0, dtype=dtype), heads=3, scale=scale, backend="auto")
    qkv = torch.randn(2, 11, 3 * 3 * 8).to(dtype)
    q, k, v = qkv.double().view(2, 11, 3, 3, 8).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-1, -2) * (8**-0.5 if scale is None else scale), -1)
    exact = (weights @ v).transpose(1, 2).flatten(2)
    for name in block.candidates():
        block.use(name, qkv.shape)
        assert block.implementation() == name
        y = block(qkv)
        assert (y.dtype, y.shape) == (dtype, (2, 11, 24))
        assert (y.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * qkv.double().abs().max()
        assert block(qkv[:0]).shape == (0, 11, 24)
    assert {"bmm", "plain"} == set(block.candidates())


@pytest.mark.parametrize("make", [vit, convnext])
def test_plans_of_blocks_are_saved_and_loaded(make, device, tmp_path):
    model, size = make()
    fast = check(model, size, device)
    fast.save(tmp_path / "fast.safetensors")
    again = load_accelerated(tmp_path / "fast.safetensors", device=device, tune="heuristic")
    blocks = [type(m).__name__ for m in fast.plan.modules() if isinstance(m, FusedBlock)]
    assert blocks
    assert [type(m).__name__ for m in again.plan.modules() if isinstance(m, FusedBlock)] == blocks
    x = torch.randn(2, *size, device=device)
    assert torch.equal(again(x), fast(x))


class TwoReaders(nn.Module):
    """The hidden layer and the normalised rows are read twice."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = (
            nn.LayerNorm(16),
            nn.Linear(16, 32),
            nn.GELU(),
            nn.Linear(32, 16),
        )

    def forward(self, x):
        rows = self.norm(x)
        hidden = self.act(self.fc1(rows))
        return self.fc2(hidden) + hidden.mean(-1, keepdim=True) + rows


def test_what_others_read_too_stays(device):
    fast = check(TwoReaders().eval(), (5, 16), device)
    assert (count(fast, FusedMlp), kinds(fast).count("layer_norm")) == (0, 1)


def test_what_has_hooks_stays(device):
    model, size = vit()
    seen = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: seen.append("fc1"))
    model.blocks[1].norm1.register_forward_hook(lambda *_: seen.append("norm1"))
    x = torch.randn(1, *size, device=device)
    model = model.to(device)
    fast = accelerate(model, x, backend="triton" if device == "cpu" else "auto", tune="off")
    assert count(fast, FusedMlp) == 1
    seen.clear()
    fast(x)
    assert sorted(seen) == ["fc1", "norm1"]


def sparse(*shape):
    """Few ones and minus ones: whatever the order of sums, the result is the same integer."""
    return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.4)).float()


IMAGE = (2, 6, 7, 5)
BLOCKS = {
    "inverted_residual": (
        lambda: FusedInvertedResidual(
            sparse(16, 6, 1, 1), sparse(16), sparse(16, 1, 3, 3), sparse(16), sparse(6, 16, 1, 1), sparse(6),
            sparse(6), sparse(6), stride=1, act_inner="relu6", act="relu", backend="auto",
        ),
        IMAGE, IMAGE,
    ),
    "depthwise_pointwise": (
        lambda: FusedDepthwisePointwise(
            sparse(6, 1, 5, 5), sparse(6), sparse(8, 6, 1, 1), sparse(8), sparse(8), sparse(8),
            stride=(2, 1), padding=(2, 2), dilation=(1, 1), act_inner="relu", act="relu", backend="auto",
        ),
        IMAGE, (2, 8, 4, 5),
    ),
    "mlp": (
        lambda: FusedMlp(
            sparse(16, 6), sparse(16), sparse(8, 16), sparse(8), act_inner="relu", act="none", backend="auto"
        ),
        (3, 5, 6), (3, 5, 8),
    ),
    "attention": (lambda: FusedAttention(torch.empty(0), heads=2, scale=0.0, backend="auto"), (2, 4, 192), None),
    "pool_linear": (lambda: FusedPoolLinear(sparse(5, 6), sparse(5), backend="auto"), (2, 6, 4, 2), None),
}  # fmt: skip


@pytest.mark.parametrize(("make", "shape", "residual"), BLOCKS.values(), ids=BLOCKS)
def test_every_implementation_gives_the_same(make, shape, residual, device, monkeypatch):
    block = make().to(device)
    inputs = [sparse(*s).to(device) for s in (shape, residual) if s is not None]
    expected = block(*inputs)
    twin = type(block)(**block.tensors(), **block.config())
    assert torch.equal(twin.to(device)(*inputs), expected)
    if device == "cpu":
        block.backend = "triton"
    names = block.candidates()
    assert names[0] == "triton"
    for name in names:
        block.use(name, shape)
        assert block.implementation() == name
        assert torch.equal(block(*inputs), expected)
    assert block._packed is None or name in ("triton", "layers")
    block.to(torch.float64)  # what was packed was packed for float32
    assert block._packed is None


def test_convolutions_offer_winograd_where_products_are_the_limit(device):
    for channels, expected in ((64, ["triton", "winograd"]), (16, ["triton"])):
        conv = FusedConv2d(4 * sparse(channels, channels, 3, 3), padding=(1, 1), act="relu", backend="triton")
        assert conv.candidates() == expected
        x = sparse(1, channels, 5, 4).to(device)
        conv = conv.to(device)
        y = conv(x)
        for name in expected:
            conv.use(name, x.shape)
            assert conv.implementation() == name
            assert torch.equal(conv(x), y)


def test_blocks_are_fused_modules_with_plain_descriptions():
    for make, *_ in BLOCKS.values():
        block = make()
        assert isinstance(block, FusedModule)
        assert all(isinstance(v, int | float | str | list | None) for v in block.config().values())
