"""Chains: whatever follows a convolution or a linear layer, the fused graph computes the same, and stops in time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import randomise_norms
from timm.layers import BatchNormAct2d, LayerNorm, LayerNorm2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn

from depthfuse.acceleration import AcceleratedModel, AccelerationError, accelerate
from depthfuse.acceleration.planning import aten
from depthfuse.acceleration.planning.build import build_plan
from depthfuse.acceleration.planning.program import Call, capture
from depthfuse.acceleration.running.execution import ONEDNN, Execution, Executor
from depthfuse.acceleration.running.implementations import choose_chunk, clearly_faster, least_ms
from depthfuse.acceleration.running.onednn_graph import compile_plan
from depthfuse.fused.layers import FusedConv2d, FusedLinear
from depthfuse.measuring.accuracy import relative_error
from depthfuse.merging.merged_blocks import TokenBatchNorm

WIDTH = 6
ACTS = [nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, lambda: nn.GELU(approximate="tanh")]


class Chain(nn.Module):
    """A convolution or linear layer and then `steps`, in order, any of which may be one that cannot be fused."""

    def __init__(self, steps, linear, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = linear
        self.product = nn.Linear(WIDTH, WIDTH) if linear else nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.steps = nn.ModuleList()
        self.kinds = list(steps)
        for index, kind in enumerate(steps):
            layer = nn.Identity()
            if kind == "norm":
                layer = TokenBatchNorm(WIDTH) if linear else nn.BatchNorm2d(WIDTH)
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
                nn.init.uniform_(layer.weight, -2, 2)
                nn.init.normal_(layer.bias)
            elif kind == "act":
                layer = ACTS[(seed + index) % len(ACTS)]()
            elif kind == "dropout":
                layer = nn.Dropout()
            elif kind == "softmax":
                layer = nn.Softmax(-1)
            self.steps.append(layer)
        shape = (WIDTH,) if linear else (1, WIDTH, 1, 1)
        self.scale = nn.Parameter(torch.randn(shape))
        self.shift = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        y = self.product(x)
        for layer, kind in zip(self.steps, self.kinds, strict=True):
            if kind == "residual":
                y = y + x
            elif kind == "residual_first":
                y = torch.add(x, y)
            elif kind == "twice":
                y = y * 0.5 + y.sigmoid()
            elif kind == "scale":
                y = y * self.scale
            elif kind == "number":
                y = 0.75 * y + 0.5
            elif kind == "last_axis_shift":
                y = y + self.shift
            elif kind == "there_and_back" and not self.linear:
                y = (y.permute(0, 2, 3, 1) * self.scale.reshape(-1)).permute(0, 3, 1, 2)
            else:
                y = layer(y)
        return y


KINDS = [
    *("norm", "act", "residual", "residual_first", "scale", "number", "last_axis_shift", "there_and_back"),
    *("dropout", "softmax", "twice"),
]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(KINDS), max_size=6), st.booleans(), st.integers(0, 99))
def test_any_chain_computes_the_same(steps, linear, seed):
    model = Chain(steps, linear, seed).eval().double()
    # As wide as the channels: an addition along the wrong axis would still have a shape that fits.
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64) if linear else torch.randn(2, WIDTH, 5, WIDTH).double()
    fast = accelerate(model, x, tune="heuristic")
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-12
    kind = FusedLinear if linear else FusedConv2d
    assert sum(isinstance(m, kind) for m in fast.modules()) == 1


@pytest.mark.parametrize(
    ("steps", "epilogue"),
    [
        (["norm", "act"], "bias + {act}"),
        (["norm", "residual", "act", "norm"], "bias + {act} + affine + residual"),
        (["norm", "scale", "residual"], "bias + residual"),
        (["act", "norm", "scale", "number"], "bias + {act} + affine"),
        (["dropout", "there_and_back", "residual", "act"], "bias + {act} + residual"),
    ],
)
def test_whole_chains_become_one_operation(steps, epilogue):
    model = Chain(steps, False, 0).eval()
    report = accelerate(model, torch.randn(1, WIDTH, 5, WIDTH), tune="heuristic").report()
    assert len(report.entries) == 1
    act = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
    names = [act.get(type(layer), "gelu") for layer in model.steps if type(layer) in (*act, nn.GELU)]
    expected = epilogue.format(act=(names or [""])[0])
    assert report.entries[0].epilogue.replace("gelu_tanh", "gelu") == expected


class Wrapped(nn.Module):
    """A module whose forward is the given function of (module, x)."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def conv(kernel=3):
    return nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2)


def check(model, x=None):
    x = torch.randn(2, WIDTH, 7, 5) if x is None else x
    model, x = model.eval().double(), x.double()
    with torch.no_grad():
        expected = model(x.clone())
        fast = accelerate(model, x.clone(), tune="heuristic")
        given = fast(x.clone())
    assert relative_error(given, expected) < 1e-12
    return fast


def later_reader_sees_the_overwritten_value(m, x):
    y = m.conv(x)
    z = m.relu(y)
    return m.other(z) + y  # y is z by now


def overwritten_after_it_was_read(m, x):
    y = m.conv(x)
    z = m.other(y)
    y.add_(1)
    return z * y


def the_input_is_the_residual(m, x):
    x += m.conv(x)
    return m.other(x) + x


@pytest.mark.parametrize(
    "function",
    [later_reader_sees_the_overwritten_value, overwritten_after_it_was_read, the_input_is_the_residual],
)
def test_in_place_layers(function):
    check(Wrapped(function, conv=conv(), other=conv(1), relu=nn.ReLU(inplace=True)))


def test_only_later_readers_see_what_was_written_in_place():
    model = Wrapped(overwritten_after_it_was_read, conv=conv(), other=conv(1)).eval()
    program = capture(model, Call.of((torch.randn(1, WIDTH, 4, 4),), {}))
    nodes = list(program.graph.graph.nodes)
    assert not any(aten.writes(node) for node in nodes if node.op == "call_function")
    (added,) = (node for node in nodes if aten.name_of(node) == "add")
    (product,) = (node for node in nodes if aten.name_of(node) == "mul")
    first, other = (node for node in nodes if aten.name_of(node) == "conv2d")
    assert set(product.all_input_nodes) == {other, added}
    assert set(first.users) == {other, added}


def test_one_layer_called_twice_and_weights_shared_between_layers():
    shared, twin = conv(), conv()
    twin.weight = shared.weight
    check(Wrapped(lambda m, x: m.b(F.relu(m.a(F.relu(m.a(x))))), a=shared, b=twin))


def test_two_convolutions_into_one_addition():
    fast = check(
        Wrapped(
            lambda m, x: F.relu(m.norm(m.a(x)) + m.b(x.sin())),
            a=conv(),
            b=conv(1),
            norm=nn.BatchNorm2d(WIDTH),
        )
    )
    assert sum(entry.fused for entry in fast.report().entries) == 2


def test_what_cannot_be_folded_stays():
    def function(m, x):
        y = m.same(x)  # padding in words
        y = m.reflect(y)
        y = m.deconv(y)
        y = m.live(y)  # no running statistics: normalises by the batch
        return y * m.gate(y)  # depends on the input

    fast = check(
        Wrapped(
            function,
            same=nn.Conv2d(WIDTH, WIDTH, 3, padding="same"),
            reflect=nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect"),
            deconv=nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2),
            live=nn.BatchNorm2d(WIDTH, track_running_stats=False),
            gate=nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(1), nn.Sigmoid()),
        )
    )
    kinds = [entry.kind for entry in fast.report().entries]
    assert kinds[:5] == ["FusedConv2d", "pad", "FusedConv2d", "conv_transpose2d", "batch_norm"]
    assert [entry.path for entry in fast.report().entries if entry.fused] == ["same", "reflect", "gate.1"]


def test_parametrised_weights_and_hooks_keep_working():
    seen = []
    model = Wrapped(
        lambda m, x: m.plain(m.watched(m.normed(x))),
        normed=nn.utils.parametrizations.weight_norm(conv()),
        watched=nn.Sequential(conv(), nn.BatchNorm2d(WIDTH)),
        plain=conv(),
    )
    model.watched.register_forward_hook(lambda module, inputs, output: seen.append(output) or output * 2)
    fast = check(model)
    assert [entry.path for entry in fast.report().entries if entry.fused] == ["normed", "watched.0", "plain"]
    seen.clear()
    fast(torch.randn(1, WIDTH, 7, 5))
    assert len(seen) == 1


class Branching(nn.Module):
    """Its control flow depends on values: it cannot be traced, its children can."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.choice = nn.ModuleList([conv(), nn.Sequential(conv(1), nn.GELU())])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, scale: float = 1.0):
        y = self.stem(x)
        for layer in self.choice:
            y = layer(y) if y.mean() > -1e9 else y
        return self.head(y.mean((2, 3))) * scale


def test_children_of_an_untraceable_model_are_fused():
    fast = check(Branching())
    fused = {entry.path: entry.epilogue for entry in fast.report().entries if entry.fused}
    assert fused == {
        "stem.0": "bias + relu",
        "choice.0": "bias",
        "choice.1.0": "bias + gelu",
        "head": "bias",
    }


class Peeking(Branching):
    """Reads a child's weight itself, which a planned child does not have."""

    def forward(self, x):
        return super().forward(x.to(self.stem[0].weight.dtype))


def test_a_module_that_reads_its_childrens_weights_stays():
    fast = check(Peeking())
    assert [(entry.path, entry.kind) for entry in fast.report().entries] == [("", "Peeking")]
    watched = nn.Sequential(conv(), Peeking(), nn.Linear(3, 3))
    watched[1].register_forward_hook(lambda *args: None)
    fast = check(watched)
    assert [(entry.path, entry.fused) for entry in fast.report().entries] == [
        ("0", True),
        ("1", False),
        ("2", True),
    ]


def test_a_model_of_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), conv(1)

        def forward(self, x, y):
            return {"sum": F.relu(self.a(x) + y), "parts": [self.b(y)]}

    model = Two().eval()
    x, y = torch.randn(2, 1, WIDTH, 5, 5).unbind(0)
    fast = accelerate(model, (x, y))
    with torch.no_grad():
        given, expected = fast(x, y), model(x, y)
    assert relative_error(given["sum"], expected["sum"]) < 1e-5
    assert relative_error(given["parts"][0], expected["parts"][0]) < 1e-5


def test_an_error_inside_the_model_is_reported_as_such():
    def fail(m, x):
        raise ValueError("no such class")

    with pytest.raises(AccelerationError, match=r"no such class"):
        accelerate(Wrapped(fail, a=conv()).eval(), torch.randn(1, WIDTH, 4, 4))


def running(fast, executor):
    """The same model, run by another executor."""
    return AcceleratedModel(fast.made, executor, fast.report(), fast.__dict__["_original"])


def test_onednn_graph_runs_only_its_own_shape(monkeypatch):
    model = nn.Sequential(conv(), nn.BatchNorm2d(WIDTH), nn.ReLU(), conv(1), nn.ReLU6()).eval()
    x = torch.randn(2, WIDTH, 9, 9)
    fast = accelerate(model, x, tune="heuristic")
    assert fast.report().executor == "op by op"
    compiled = compile_plan(fast.plan, (x,))
    if compiled is None:
        pytest.skip("this PyTorch has no oneDNN Graph")
    calls = []

    def counted(given):
        calls.append(given.shape)
        return compiled(given)

    fast = running(fast, Executor(fast.made, Execution(compiled=ONEDNN), counted, (tuple(x.shape),)))
    for batch in (2, 3, 2):
        z = torch.randn(batch, WIDTH, 9, 9)
        with torch.no_grad():
            assert relative_error(fast(z), model(z)) < 1e-6
    assert calls == [x.shape] * 2
    x[0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        assert torch.equal(fast(x).isnan(), model(x).isnan())
    assert len(calls) == 2  # its ReLU would have hidden the NaN
    copy.deepcopy(fast)(torch.randn(2, WIDTH, 9, 9))
    assert fast.double()(torch.randn(2, WIDTH, 9, 9)).dtype == torch.float64
    assert len(calls) == 2  # packed weights belong to where and what they were made from


def test_onednn_graph_leaves_torchscript_as_it_was():
    before = torch._C._jit_llga_enabled()
    compile_plan(nn.Sequential(conv(), nn.ReLU()).eval(), (torch.randn(1, WIDTH, 4, 4),))
    assert torch._C._jit_llga_enabled() == before

    class Untraceable(nn.Module):
        def forward(self, x):
            raise RuntimeError("no trace\nof it")

    assert compile_plan(Untraceable(), (torch.randn(1),)) is None
    assert torch._C._jit_llga_enabled() == before


def test_large_batches_run_in_chunks():
    model = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(WIDTH * 25, 3)).eval()
    x = torch.randn(5, WIDTH, 5, 5)
    fast = accelerate(model, x, tune="heuristic")
    fast = running(fast, Executor(fast.made, Execution(chunk=2)))
    seen = []
    fast.plan.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-6
        assert relative_error(fast(x[:2]), model(x[:2])) < 1e-6
    assert seen == [2, 2, 1, 2]


def test_chunks_are_not_for_models_that_mix_images():
    x = torch.randn(4, WIDTH, 5, 5)
    mixing = Wrapped(lambda m, x: m.conv(x) - m.conv(x).mean(0, keepdim=True), conv=conv()).eval()
    pooled = Wrapped(lambda m, x: m.conv(x).mean(0), conv=conv()).eval()
    several = Wrapped(lambda m, x: [m.conv(x)], conv=conv()).eval()
    whole = Wrapped(lambda m, x: m.conv(x).view(4, -1), conv=conv()).eval()  # takes 4 images and no others
    for model in (mixing, pooled, several, whole):
        assert chunk_of(model, x) is None
    assert chunk_of(conv().eval(), x[:1]) is None
    # Above the cache's size it may be worth it or not, but is always one of the sizes that were tried.
    assert chunk_of(conv().eval(), torch.randn(8, WIDTH, 64, 64)) in (None, 1, 2, 4)


def chunk_of(model, x):
    call = Call.of((x,), {})
    return choose_chunk(build_plan(copy.deepcopy(model), model, call, "auto"), call)


def test_measuring_prefers_the_usual_unless_another_is_clearly_faster():
    assert not clearly_faster("a", "b", {"a": 0.99, "b": 1.0})
    assert clearly_faster("a", "b", {"a": 0.9, "b": 1.0})
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    times = least_ms({name: lambda name=name: count(name) for name in calls}, rounds=2)
    assert set(times) == set(calls) and all(value > 0 for value in times.values())
    assert all(value >= 2 for value in calls.values())


def test_layers_of_timm():
    model = nn.Sequential(
        Conv2dSame(WIDTH, WIDTH, 3, stride=2),
        BatchNormAct2d(WIDTH, act_layer=nn.LeakyReLU),
        BatchNormAct2d(WIDTH, act_layer=nn.SiLU),
        MaxPool2dSame(3, 2),
        AvgPool2dSame(2, 2),
        LayerNorm2d(WIDTH),
        Conv2dSame(WIDTH, WIDTH, 2, bias=False, dilation=2),
        BatchNormAct2d(WIDTH, apply_act=False),
        nn.Flatten(2),
        LayerNorm(6),
    )
    randomise_norms(model)
    for size in ((21, 16), (24, 14)):  # padded differently
        fast = check(model, torch.randn(2, WIDTH, *size))
    kinds = [(entry.path, entry.kind) for entry in fast.report().entries]
    assert kinds == [
        ("0", "pad"),
        ("0", "FusedConv2d"),
        ("1.act", "leaky_relu"),
        ("2", "batch_norm"),
        ("2.act", "silu"),
        ("3", "pad"),
        ("3", "max_pool2d"),
        ("4", "avg_pool2d"),
        ("5", "layer_norm"),
        ("6", "pad"),
        ("6", "FusedConv2d"),
        ("9", "layer_norm"),
    ]
    assert type(model[9]) is LayerNorm and model[1].weight.requires_grad


def test_functions_with_constant_weights_are_fused():
    def function(m, x):
        weight = m.standard.weight - m.standard.weight.mean((1, 2, 3), keepdim=True)
        y = F.relu(F.conv2d(x, weight, m.standard.bias, padding=1))
        y = F.conv2d(y, m.plain.weight, None, (2, 1), (1, 0), 1, 2)
        y = F.linear(y.mean((2, 3)), m.head.weight, bias=m.head.bias)
        return F.conv2d(y[:, :, None, None], torch.ones(3, WIDTH, 1, 1, dtype=y.dtype) * y.mean())

    layers = {
        "standard": conv(),
        "plain": nn.Conv2d(WIDTH, WIDTH, 3, groups=2),
        "head": nn.Linear(WIDTH, WIDTH),
    }
    model = Wrapped(function, **layers)
    model.plain.weight = nn.Parameter(torch.randn(WIDTH, WIDTH // 2, 3, 3))
    fast = check(model, torch.randn(2, WIDTH, 9, 7))
    fused = [(entry.kind, entry.epilogue) for entry in fast.report().entries if entry.fused]
    assert fused == [("FusedConv2d", "bias + relu"), ("FusedConv2d", "none"), ("FusedLinear", "bias")]
    assert "conv2d" in [entry.kind for entry in fast.report().entries]  # whose weight depends on the input
