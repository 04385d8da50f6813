"""Verification: the error of every operation against float64, and the one that is wrong by name."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import build
from torch import nn

from depthfuse.acceleration import AccelerationError, accelerate, load_accelerated
from depthfuse.acceleration.checking.verify import compare_operations, verify
from depthfuse.acceleration.planning import elements
from depthfuse.acceleration.planning.build import build_plan
from depthfuse.acceleration.planning.graph import path_of
from depthfuse.acceleration.planning.program import Call
from depthfuse.measuring.accuracy import relative_error

FAMILIES = ("resnet_d", "mobilenet", "convnext", "vit_scaled", "vit")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_operation_is_compared(family):
    model, size = build(family)
    x = torch.randn(2, *size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = accelerate(model, x, verify="blocks", tune="heuristic").report()
    # Also those whose sum with a skip, or whose permutation, is no layer of the model.
    assert all(entry.error is not None for entry in report.entries if entry.fused)
    assert 0 < report.worst.error < 1e-4
    assert report.worst.error == max(entry.error for entry in report.entries if entry.error is not None)
    text = str(report)
    assert f"worst against float64: {report.worst.path}, relative error {report.worst.error:.1e}" in text
    assert text.splitlines()[0].split() == ["path", "op", "implementation", "error", "epilogue", "absorbed"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_errors_are_those_of_the_dtype():
    model, size = build("mobilenet")
    x = torch.randn(2, *size)
    worst = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        worst[dtype] = accelerate(model, x, dtype, verify="blocks", tune="off").report().worst.error
        # Rounding of one operation at least, of all that came before it at most, some times over.
        assert torch.finfo(dtype).eps / 16 < worst[dtype] < 300 * torch.finfo(dtype).eps


def test_the_last_operation_has_the_error_of_the_output():
    model, size = build("resnet")
    x = torch.randn(2, *size)
    fast = accelerate(model, x, verify="blocks", tune="heuristic")
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        assert fast.report().entries[-1].error == relative_error(fast(x), expected)


def test_the_wrong_operation_stands_out():
    model, size = build("convnext")
    x = torch.randn(1, *size)
    fast = accelerate(model, x, tune="off")
    by_path = {entry.path: entry for entry in fast.report().entries}
    path = "stages.2.blocks.0.mlp.fc2"  # followed by a permutation and the skip
    with torch.no_grad():
        fast.plan.get_submodule(by_path[path].module).bias[3] += 0.01
    errors = {
        e.path: e.error
        for e in compare_operations(fast.made, model, Call.of((x,), {}))
        if e.error is not None
    }
    paths = list(errors)
    at = paths.index(path)
    assert max(errors[p] for p in paths[:at]) < 1e-5
    assert min(errors[p] for p in paths[at:]) > 1e-5


def test_the_first_wrong_one_is_named_where_verification_fails(monkeypatch):
    model, size = build("mobilenet")
    right = elements.batch_norm

    def wrong(node):
        found = right(node)
        return (3 * found[0], found[1]) if found and path_of(node) == "blocks.3.1.bn2" else found

    monkeypatch.setattr(elements, "batch_norm", wrong)
    with pytest.raises(
        AccelerationError, match=r"first wrong operation: blocks\.3\.1\.conv_dw, relative error"
    ):
        accelerate(model, torch.randn(2, *size), tune="off")


class Partly(nn.Module):
    """Its own control flow depends on values, one child is called twice, one is a layer of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.twice = nn.Sequential(nn.Conv2d(6, 6, 1), nn.GELU())
        self.never = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        y = self.stem(x)
        y = self.twice(self.twice(y)) if y.mean() > -1e9 else self.never(y)
        return self.head(y.mean((2, 3)))


def test_plans_of_children_are_compared_part_by_part():
    model = Partly().eval()
    report = accelerate(model, torch.randn(2, 3, 5, 5), verify="blocks", tune="heuristic").report()
    errors = {entry.path: entry.error for entry in report.entries}
    assert errors.keys() == {"stem.0", "twice.0", "head"}
    assert all(0 < error < 1e-5 for error in errors.values())


def test_blocks_inside_a_watched_module_are_compared():
    model, size = build("resnet")
    model.layer2.register_forward_hook(lambda module, args, output: None)
    report = accelerate(model, torch.randn(1, *size), verify="blocks", tune="heuristic").report()
    errors = {entry.path: entry.error for entry in report.entries if entry.fused}
    assert any(path.startswith("layer2.") for path in errors)
    assert all(error is not None and error < 1e-5 for error in errors.values())


def test_unknown_ways_to_verify_are_refused():
    with pytest.raises(ValueError, match=r"verify is 'layers', expected True, False or 'blocks'"):
        accelerate(nn.Linear(2, 2).eval(), torch.randn(1, 2), verify="layers")


def test_relative_error():
    nan, inf = float("nan"), float("inf")
    one = torch.tensor([1.0, 2.0])
    assert relative_error(one * 1.5, one) == 0.5
    assert relative_error(one[:1], one) == inf
    assert relative_error(one[:0], one[:0]) == 0.0
    assert relative_error(torch.tensor([nan, 2.0]), torch.tensor([nan, 2.0])) == 0.0
    assert relative_error(torch.tensor([nan, 2.0]), one) == inf
    assert relative_error(torch.tensor([inf, 3.0]), torch.tensor([inf, 2.0])) == 0.5
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert math.isfinite(relative_error(one, torch.zeros(2))) and relative_error(one, torch.zeros(2)) > 1e100


def test_a_functional_model_is_compared_at_its_functions():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return F.relu(self.conv(x) + x).flatten(1)

    report = accelerate(Functional().eval(), torch.randn(2, 3, 5, 5), verify="blocks", tune="off").report()
    (entry,) = report.entries
    assert entry.nodes[0] == "conv2d" and len(entry.nodes) == 3
    assert 0 < entry.error < 1e-6


def test_relative_error_of_other_values():
    nan, inf = float("nan"), float("inf")
    signs = torch.tensor([inf, 1.0])
    assert relative_error(torch.tensor([-inf, 1.0]), signs) == inf
    assert relative_error(torch.tensor([nan, 1.0]), signs) == inf
    assert relative_error(signs, signs) == 0.0
    large = torch.tensor([2**60, 3])
    assert relative_error(large, large) == 0.0
    assert relative_error(large[:1] + 1, large[:1]) > 0.0  # float64 cannot tell these two apart
    assert relative_error(torch.tensor([True, False]), torch.tensor([True, True])) == 1.0
    turned = torch.tensor([1 + 1j, 2.0])
    assert relative_error(turned.conj(), turned) == 1.0
    assert relative_error(turned.real, turned) == inf


class Poisoned(nn.Module):
    """Gives NaN in every dtype; `healed` is what a plan must not be taken for."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("factor", torch.tensor(float("nan")))

    def forward(self, x):
        return self.layer(x) * self.factor


def test_finite_outputs_of_a_model_that_gives_nan_are_refused():
    model, x = Poisoned().eval(), torch.randn(2, 4)
    call = Call.of((x,), {})
    plan = build_plan(copy.deepcopy(model), model, call, "auto")
    assert verify(plan, plan.module, model, call) == 0.0  # NaN for NaN is right
    with pytest.raises(AccelerationError, match="differs from the model by inf"):
        verify(plan, torch.zeros_like, model, call)


@pytest.mark.parametrize("verified", [True, False])
def test_folding_beyond_the_range_of_a_dtype_is_refused(verified):
    """Whatever the example: zeros show nothing of the weights."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
    nn.init.constant_(model[0].weight, 400.0)
    model[1].running_var.fill_(1e-7)
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(
        AccelerationError, match=r"^0: .* its weight is beyond what torch.float16 holds \(65,504\)"
    ):
        accelerate(model, x, dtype=torch.float16, verify=verified, tune="off")
    for dtype in (torch.float32, torch.bfloat16):
        assert accelerate(model, x, dtype=dtype, verify=verified, tune="off")(x).isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_rounding_of_the_plans_dtype_is_no_mistake(seed):
    """Random nets of many layers amplify the rounding of bfloat16 to a tenth of the output, plan or not."""
    torch.manual_seed(seed)
    model = timm.create_model("mobilenetv2_050").eval()
    x = torch.randn(1, 3, 96, 96)
    fast = accelerate(model, x, dtype=torch.bfloat16, tune="heuristic")
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = exact(x.double())
        own = relative_error(copy.deepcopy(model).bfloat16()(x.bfloat16()), expected)
        assert relative_error(fast(x), expected) <= max(8e-2, 4 * own)


def test_a_watched_container_without_weights():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.Flatten())).eval()
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(1, 3, 4, 4)
    fast = accelerate(model, x, tune="heuristic")
    seen.clear()
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-6
    assert seen == [1, 1]


class DividesByZero(nn.Module):
    """Gives NaN for an image of zeros, which is as tame as an input can be."""

    def __init__(self, safe: bool):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.safe = safe

    def forward(self, x):
        largest = x.abs().amax((1, 2, 3), keepdim=True)
        return self.norm(self.conv(x / (largest + 1e-6 if self.safe else largest))).relu()


@pytest.mark.parametrize("tune", ["heuristic", "measure"])
def test_nan_that_arises_inside_comes_out(tune, tmp_path):
    model, x = DividesByZero(safe=False).eval(), torch.randn(2, 3, 8, 8)
    fast = accelerate(model, x, tune=tune)
    fast.save(tmp_path / "fast.safetensors")
    x[1] = 0
    for each in (fast, copy.deepcopy(fast), load_accelerated(tmp_path / "fast.safetensors")):
        given = each(x)
        assert given[1].isnan().all() and given[0].isfinite().all()
    assert fast.made.makes_nan
    assert not accelerate(DividesByZero(safe=True).eval(), torch.randn(2, 3, 8, 8), tune="off").made.makes_nan
