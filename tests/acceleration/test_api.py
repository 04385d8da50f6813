"""accelerate() against the model it was given: exact algebra in float64, rounding in float32, and every refusal."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import timm
import torch
from nets import SMALL, build, randomise_norms
from torch import nn

from depthfuse import Supernet, merge
from depthfuse.acceleration import AccelerationError, accelerate, api
from depthfuse.acceleration.checking import verify as verify_module
from depthfuse.acceleration.planning import elements
from depthfuse.acceleration.planning.graph import path_of
from depthfuse.acceleration.planning.program import Call
from depthfuse.fused.layers import FusedModule
from depthfuse.measuring.accuracy import relative_error
from depthfuse.measuring.timing import Timing
from depthfuse.merging.merge import merged_structure
from depthfuse.ops import BackendError

# Model and side of the image: one of each kind of block, and of each thing that is left as it was.
ZOO = [
    ("test_resnet", 64),
    ("test_vit", 160),
    ("test_vit4", 160),
    ("test_convnext", 32),
    ("test_convnext2", 32),
    ("test_efficientnet", 64),
    ("test_efficientnet_gn", 64),
    ("test_byobnet", 64),
    ("test_mambaout", 32),
    ("test_nfnet", 64),
    ("resnet18", 64),
    ("resnet26t", 48),
    ("seresnet18", 64),
    ("mobilenetv2_035", 48),
    ("mobilenetv3_small_050", 64),
    ("ghostnet_050", 64),
    ("convnext_atto", 32),
    ("convnextv2_atto", 32),
    ("repvgg_a0", 64),
    ("regnetx_002", 64),
]
FEW = ("resnet", "mobilenet", "convnext_linear", "vit_scaled")


def zoo_model(name):
    torch.manual_seed(0)
    model = randomise_norms(timm.create_model(name, num_classes=7).eval())
    for layer in model.modules():  # heads start at zero, LayerScale near it: neither would show a mistake
        for key in ("gamma", "ls1", "ls2"):
            scale = getattr(layer, key, None)
            if isinstance(scale, nn.Parameter):
                nn.init.normal_(scale)
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return model


def kinds(fast):
    """Of all operations that its plan is made of."""
    return [entry.kind for entry in fast.report().entries]


@pytest.mark.parametrize(("name", "side"), ZOO)
def test_zoo_is_exact_in_float64(name, side):
    # In float64 nothing but the algebra of fusion remains: what is left is rounding, amplified by the net's depth.
    model = zoo_model(name).double()
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    fast = accelerate(model, x, tune="heuristic")
    with torch.no_grad():
        expected = model(x)
        assert expected.std() > 0
        assert relative_error(fast(x), expected) < 1e-11
        # one image more, and more of them, than the plan was made for
        larger = torch.randn(3, 3, side, side, dtype=torch.float64)
        assert relative_error(fast(larger), model(larger)) < 1e-11
    report = fast.report()
    assert report.fused_count > 0
    assert report.fused_count + report.unfused_count == len(report.entries)


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "mobilenetv2_035", "regnetx_002"])
def test_no_batch_norm_and_no_relu_is_left(name):
    fast = accelerate(zoo_model(name), torch.randn(1, 3, 64, 64), tune="heuristic")
    assert not {"batch_norm", "relu", "hardtanh", "conv2d", "linear"} & set(kinds(fast))


@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_every_merge_candidate(family):
    """Each on every block that takes it, in a model built anew from the spec and the weights, as loading does."""
    model, size = build(family)
    supernet = randomise_norms(Supernet(model)).eval()
    options = supernet.options()
    x = torch.randn(2, *size, dtype=torch.float64)
    for candidate in dict.fromkeys(name for names in options.values() for name in names):
        supernet.set_choices({path: candidate for path, names in options.items() if candidate in names})
        merged = merge(supernet, size).double()
        rebuilt = merged_structure(supernet.spec()).double()
        rebuilt.load_state_dict(merged.state_dict())
        fast = accelerate(rebuilt, x, tune="heuristic", dynamic=False)
        wanted = merged(x)
        assert (fast(x) - wanted).abs().max() <= 1e-10 * wanted.abs().max(), candidate
        assert not [entry.path for entry in fast.report().entries if entry.kind in ("Dropped", "Identity")]


@pytest.mark.parametrize("tune", ["measure", "heuristic"])
@pytest.mark.parametrize("family", FEW)
def test_float32_is_as_close_to_float64_as_the_model_itself(family, tune):
    model, size = build(family)
    x = torch.randn(3, *size)
    exact = copy.deepcopy(model).double()
    fast = accelerate(model, x, tune=tune)
    with torch.no_grad():
        reference = exact(x.double())
        ours, own = relative_error(fast(x), reference), relative_error(model(x), reference)
    # Other orders of summation may fall out a little worse, folded weights are rounded once more.
    assert ours <= 4 * own + 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("family", SMALL)
def test_merged_nets(family):
    model, size = build(family)
    supernet = Supernet(model).eval()
    chosen = {path: next(iter(b.candidates)) for path, b in supernet.blocks.items() if b.candidates}
    supernet.set_choices(dict(list(chosen.items())[::2]))
    merged = merge(randomise_norms(supernet)).eval().double()
    x = torch.randn(2, *size, dtype=torch.float64)
    fast = accelerate(merged, x, tune="heuristic")
    with torch.no_grad():
        assert relative_error(fast(x), merged(x)) < 1e-11
    # The norm behind a merged block's activation is part of the fused operation.
    assert "batch_norm" not in kinds(fast)
    modules = dict(merged.named_modules())
    assert all(entry.path.partition(":")[0] in modules for entry in fast.report().entries if entry.fused)
    assert any("affine" in entry.epilogue for entry in fast.report().entries)


@pytest.mark.parametrize("family", FEW)
def test_inputs_of_other_batches_layouts_and_dtypes(family):
    model, size = build(family)
    fast = accelerate(model, torch.randn(2, *size))
    x = torch.randn(5, *size)
    wide = torch.zeros(5, 2 * size[0], *size[1:])
    wide[:, ::2] = x
    with torch.no_grad():
        expected = model(x)
        for given in (x, x.contiguous(memory_format=torch.channels_last), wide[:, ::2], x.clone().double()):
            result = fast(given)
            assert result.dtype == torch.float32
            assert relative_error(result, expected) < 1e-5
        assert relative_error(fast(x[:1]), expected[:1]) < 1e-5
        assert fast(x[:0]).shape == (0, *expected.shape[1:])
    assert not fast(x.requires_grad_()).requires_grad


def test_other_image_sizes():
    model, _ = build("resnet")
    fast = accelerate(model, torch.randn(1, 3, 45, 45))
    x = torch.randn(2, 3, 61, 33)
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-5


@pytest.mark.parametrize("family", FEW)
def test_the_model_is_left_alone_and_shares_nothing(family):
    model, size = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(1, *size)
    fast = accelerate(model, x)
    expected = fast(x).clone()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert all(t.untyped_storage().data_ptr() not in own for t in [*fast.parameters(), *fast.buffers()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(fast(x), expected)
    assert not any(p.requires_grad for p in fast.parameters())


def test_default_input_is_the_size_the_model_was_made_for():
    assert accelerate(timm.create_model("test_resnet").eval()).report().max_relative_error < 1e-5
    for name, arguments in (("test_vit", {"img_size": 64}), ("test_resnet", {"in_chans": 1})):
        model = timm.create_model(name, **arguments).eval()
        assert accelerate(model, tune="heuristic").report().max_relative_error < 1e-5


@pytest.mark.parametrize("family", FEW)
def test_non_finite_values_come_out_as_from_the_model(family):
    model, size = build(family)
    x = torch.randn(3, *size)
    fast = accelerate(model, x)
    for fill in (float("nan"), float("inf"), -float("inf"), 3e38):
        x[1, 0, 5, 7] = fill
        with torch.no_grad():
            expected, given = model(x), fast(x)
        assert torch.equal(given.isnan(), expected.isnan()), fill
        assert relative_error(given[[0, 2]], expected[[0, 2]]) < 1e-5, fill


def test_refusals():
    model, size = build("resnet")
    x = torch.randn(1, *size)
    with pytest.raises(AccelerationError, match=r"training mode.*model.eval\(\)"):
        accelerate(copy.deepcopy(model).train(), x)
    partly = copy.deepcopy(model)
    partly.layer2.train()
    with pytest.raises(AccelerationError, match=r"layer2"):
        accelerate(partly, x)
    with pytest.raises(
        AccelerationError,
        match=r"does not take the example input \(float32\[1, 4, 45, 45\]\): Given groups=1",
    ):
        accelerate(model, torch.randn(1, 4, 45, 45))
    with pytest.raises(
        AccelerationError, match=r"float64\[1, 3, 45, 45\]\) \(its weights are in torch.float32\)"
    ):
        accelerate(model, x.double())
    with pytest.raises(AccelerationError, match=r"does not take the example input \('image.jpg'\)"):
        accelerate(model, "image.jpg")
    with pytest.raises(AccelerationError, match=r"no weights"):
        accelerate(nn.ReLU().eval(), x)
    unused = nn.ReLU().eval()
    unused.table = nn.Parameter(torch.ones(3))
    with pytest.raises(AccelerationError, match=r"ReLU uses none of its weights"):
        accelerate(unused, x)
    with pytest.raises(AccelerationError, match=r"pass example_inputs"):
        accelerate(nn.Conv2d(3, 4, 1).eval())
    with pytest.raises(AccelerationError, match=r"dtype is torch.int32"):
        accelerate(model, x, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"unknown backend 'cuda'"):
        accelerate(model, x, backend="cuda")
    with pytest.raises(ValueError, match=r"tune is 'fast'"):
        accelerate(model, x, tune="fast")


def test_an_explicit_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model, size = build("resnet")
    with pytest.raises(BackendError, match=r"need a CUDA or ROCm device"):
        accelerate(model, torch.randn(1, *size), backend="triton")


def test_inputs_are_checked_at_every_call():
    model, size = build("resnet")
    fast = accelerate(model, torch.randn(1, *size), tune="heuristic")
    # What the model does not take it refuses in its own words, and goes on.
    for refused in (torch.randn(1, 4, 45, 45), torch.zeros(1, *size, dtype=torch.uint8), [1, 2]):
        with pytest.raises((RuntimeError, TypeError)) as own:
            model(refused)
        with pytest.raises(own.type) as ours:
            fast(refused)
        assert str(ours.value) == str(own.value)
    with pytest.raises(TypeError, match="is missing the argument 'x'"):
        fast()
    with pytest.raises(TypeError, match="got an unexpected argument 'size'"):
        fast(torch.randn(1, *size), size=3)
    with pytest.raises(RuntimeError, match=r"cannot be trained"):
        fast.train()


def test_a_wrong_plan_is_refused_and_the_layer_named(monkeypatch):
    model, size = build("resnet")
    right = elements.batch_norm

    def wrong(node):
        found = right(node)
        return (1.5 * found[0], found[1]) if found and path_of(node) == "layer3.1.bn2" else found

    monkeypatch.setattr(elements, "batch_norm", wrong)
    with pytest.raises(AccelerationError, match=r"first wrong operation: layer3\.1\.conv2,"):
        accelerate(model, torch.randn(1, *size), tune="heuristic")
    accelerate(model, torch.randn(1, *size), verify=False, tune="heuristic")


def test_a_mistake_behind_a_head_of_zeros_is_found(monkeypatch):
    model, size = build("resnet")
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    x = torch.randn(1, *size)
    assert accelerate(model, x, tune="heuristic").report().max_relative_error < 1e-5
    right = elements.batch_norm
    monkeypatch.setattr(elements, "batch_norm", lambda node: None)
    plain = accelerate(model, x, tune="heuristic")  # norms left as they are: slower, not wrong
    assert plain.report().max_relative_error < 1e-5
    assert "batch_norm" in kinds(plain)

    def without_shift(node):
        found = right(node)
        return found and (found[0], torch.zeros_like(found[1]))

    monkeypatch.setattr(elements, "batch_norm", without_shift)
    with pytest.raises(AccelerationError, match=r"first wrong operation: conv1,"):
        accelerate(model, x, tune="heuristic")


def test_report_names_every_operation_by_its_path_in_the_model():
    model, size = build("resnet_d")
    report = accelerate(model, torch.randn(1, *size), tune="heuristic").report()
    modules = dict(model.named_modules())
    paths = [path for entry in report.entries for path in (entry.path, *entry.absorbed)]
    assert all(path.partition(":")[0] in modules for path in paths)
    # Every convolution, norm and linear layer is accounted for once.
    weighted = {n for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)}
    assert sorted(weighted) == sorted(path for path in paths if path in weighted)
    text = str(report)
    assert "layer1.0.conv2" in text and "bias + relu + residual" in text
    assert f"{report.fused_count} fused operations" in text


@pytest.mark.parametrize("family", [*FEW, "vit"])
def test_compiles_to_one_graph_and_exports(family):
    model, size = build(family)
    x = torch.randn(2, *size)
    fast = accelerate(model, x)
    with torch.no_grad():
        expected = model(x)
        assert relative_error(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), expected) < 1e-5
        exported = torch.export.export(fast, (x,))
        assert relative_error(exported.module()(x), expected) < 1e-5
    names = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert torch.ops.depthfuse.linear.default in names


@pytest.mark.parametrize("again", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
@pytest.mark.parametrize("tune", ["measure", "heuristic"])
def test_copies_run_what_the_original_runs(again, tune):
    model, size = build("mobilenet")
    x = torch.randn(1, *size)
    fast = accelerate(model, x, tune=tune)
    twin = again(fast)
    assert torch.equal(twin(x), fast(x))
    assert twin.report().executor == fast.report().executor
    names = [m.implementation() for m in fast.modules() if isinstance(m, FusedModule)]
    assert [m.implementation() for m in twin.modules() if isinstance(m, FusedModule)] == names
    assert tune == "measure" or set(names) != {"plain"}
    own = {t.data_ptr() for t in fast.state_dict().values()}
    assert all(t.data_ptr() not in own for t in twin.state_dict().values())


def test_state_dict_rebuilds_a_plan():
    model, size = build("resnet")
    x = torch.randn(1, *size)
    fast = accelerate(model, x, tune="heuristic")
    other = accelerate(randomise_norms(copy.deepcopy(model)), x, tune="heuristic")
    assert relative_error(other(x), fast(x)) > 1e-3
    other.load_state_dict(fast.state_dict())
    assert relative_error(other(x), fast(x)) < 1e-5


def test_several_threads_call_one_model():
    model, size = build("mobilenet")
    images = [torch.randn(1 + i % 3, *size) for i in range(12)]
    images[4][0, 0, 0, 0] = float("nan")
    fast = accelerate(model, images[0])
    expected = [fast(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for given, one in zip(pool.map(fast, images), expected, strict=True):
            assert torch.equal(given.nan_to_num(0), one.nan_to_num(0))
            assert torch.equal(given.isnan(), one.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision(dtype):
    model, size = build("resnet")
    x = torch.randn(2, *size)
    fast = accelerate(model, x, dtype=dtype)
    assert {p.dtype for p in fast.state_dict().values()} == {dtype}
    assert fast(x).dtype == dtype
    assert fast.report().dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("capability", "own", "chosen"),
    [
        ("gfx908", torch.bfloat16, torch.float16),
        ("gfx908:sramecc+:xnack-", torch.float32, torch.float16),
        ("gfx942", torch.bfloat16, torch.bfloat16),
        ("sm_90", torch.bfloat16, torch.bfloat16),
        ("sm_90", torch.float32, torch.float16),
    ],
)
def test_automatic_dtype_on_gpus(capability, own, chosen, monkeypatch):
    monkeypatch.setattr(api, "capability_of", lambda device: capability)
    assert api.fast_dtypes(own, torch.device("cuda")) == (chosen,)


@pytest.mark.parametrize(("bfloat16_ms", "chosen"), [(0.5, torch.bfloat16), (0.97, None), (2.0, None)])
def test_automatic_dtype_on_a_cpu_is_measured(bfloat16_ms, chosen, monkeypatch, tmp_path):
    """Whatever instructions the processor has: the times decide, and a gain within noise is not worth the digits."""
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(api, "onednn", SimpleNamespace(available=lambda dtype: True))
    timed = []

    def timings(runs, **_):
        timed.append([run().dtype for run in runs.values()])
        return {name: Timing((bfloat16_ms if "bfloat16" in name else 1.0,) * 3) for name in runs}

    monkeypatch.setattr(api, "time_interleaved", timings)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU()).eval()
    x = torch.randn(3, 6)
    for _ in range(2):  # the second time it is known
        fast = accelerate(model, x, dtype="auto")
        assert fast.dtype == fast(x).dtype == (chosen or torch.float32)
        assert fast.report().max_relative_error < (8e-2 if chosen else 1e-5)
    assert timed == [[torch.float32, torch.bfloat16]]
    for tune in ("off", "heuristic"):
        assert accelerate(model, x, dtype="auto", tune=tune).dtype == torch.float32
    assert accelerate(model.double(), x.double(), dtype="auto").dtype == torch.float64
    assert len(timed) == 1


class AsksItsChild(nn.Module):
    """Reads the weight of a child that it also calls, and cannot be traced, as its branch depends on a value."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Conv2d(3, 3, 1)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = self.scale(x) if x.sum() > -1e9 else x
        return self.conv(x.to(self.scale.weight.dtype) * self.scale.weight.mean())


def test_modules_can_read_the_weights_of_planned_children():
    model = nn.Sequential(AsksItsChild(), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()).eval()
    model[0].register_forward_hook(
        lambda *_: None
    )  # so that it is called as a whole, and its children planned
    x = torch.randn(2, 3, 8, 8)
    fast = accelerate(model, x, tune="heuristic")
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-6
    assert fast.report().fused_count == 3


class Amplifier(nn.Module):
    """A small difference of two large numbers: float32 keeps few digits of it, in whatever order it is computed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(256, 256), nn.Linear(256, 16)
        nn.init.constant_(self.first.bias, 1e4)
        with torch.no_grad():
            self.second.weight -= self.second.weight.mean(1, keepdim=True)
            self.second.bias.zero_()

    def forward(self, x):
        return self.second(self.first(x))


def test_rounding_that_the_model_amplifies_itself_is_no_mistake(monkeypatch):
    model, x = Amplifier().eval(), torch.randn(4, 256)
    monkeypatch.setitem(verify_module.TOLERANCE, torch.float32, 1e-9)  # whatever is left is beyond it
    fast = accelerate(model, x, tune="heuristic")
    assert fast.report().max_relative_error >= 0
    with torch.no_grad():
        fast.plan.get_submodule("fused_second").weight[0] *= 1.5
    with pytest.raises(AccelerationError, match="differs from the model"):
        verify_module.verify(fast.made, fast, model, Call.of((x,), {}))


def test_integer_inputs():
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 4)).eval()
    fast = accelerate(model, torch.zeros(2, 3, dtype=torch.int64))
    x = torch.randint(10, (3, 3))
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-6
    assert fast.report().fused_count == 1


@pytest.mark.parametrize("family", ["mobilenet", "vit"])
def test_a_plan_for_the_examples_sizes_alone(family):
    model, size = build(family)
    x = torch.randn(2, *size)
    fast = accelerate(model, x, tune="off", verify="blocks", dynamic=False)
    assert not fast.made.is_dynamic and accelerate(model, x, tune="off").made.is_dynamic
    assert all(entry.error is not None for entry in fast.report().entries if entry.fused)
    other = torch.randn(3, *size)
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-5
        assert torch.equal(
            fast(other), model(other)
        )  # the model itself, and from then on a plan for any batch
        assert relative_error(fast(other), model(other)) < 1e-5
        assert relative_error(fast(other[:1]), model(other[:1])) < 1e-5
    assert len(fast._others) == 1 and fast._others[0].plan.is_dynamic
