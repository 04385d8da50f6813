"""Saved accelerated models: the same bits after loading, no model needed, nothing executed, every refusal."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import build, randomise_norms
from torch import nn

from depthfuse import ModelSource, Supernet, load_accelerated, merge
from depthfuse.acceleration import AccelerationError, accelerate, api
from depthfuse.acceleration.planning import build as planning
from depthfuse.acceleration.planning.program import CaptureError
from depthfuse.acceleration.running import choose as executor
from depthfuse.acceleration.running import implementations as tune
from depthfuse.acceleration.saving.describe import DescriptionError, describe, rebuild
from depthfuse.acceleration.saving.functions import FUNCTIONS
from depthfuse.acceleration.saving.saved import read_plan
from depthfuse.checkpoint import load_tensors, save_tensors
from depthfuse.errors import CheckpointError
from depthfuse.fused.layers import FusedModule
from depthfuse.measuring.accuracy import relative_error
from depthfuse.measuring.timing import Timing

FAMILIES = ("resnet", "mobilenet", "convnext", "vit_scaled")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "fast.safetensors"


def subnet(family):
    model, size = build(family)
    supernet = Supernet(model).eval()
    chosen = {path: next(iter(b.candidates)) for path, b in supernet.blocks.items() if b.candidates}
    supernet.set_choices(dict(list(chosen.items())[::2]))
    return merge(randomise_norms(supernet), size).eval(), size


@pytest.mark.parametrize("make", [build, subnet])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_without_the_model(family, make, file, monkeypatch):
    model, size = make(family)
    x = torch.randn(2, *size)
    fast = accelerate(model, x, tune="heuristic")
    fast.save(file)

    def refuse(self, pretrained=False):
        raise AssertionError("a model was built")

    monkeypatch.setattr(ModelSource, "build", refuse)
    loaded = load_accelerated(file)
    assert loaded.report() == fast.report()
    # Where layers ask whether they are given anything at all, a plan is not for empty batches.
    for batch in (2, 1, 0) if make is build else (2, 1):
        assert torch.equal(loaded(x[:batch]), fast(x[:batch]))
    assert {name: t.dtype for name, t in loaded.state_dict().items()} == {
        name: t.dtype for name, t in fast.state_dict().items()
    }
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(AccelerationError, match=r"no plan for a call like \(float32\[2, 2, .*not at hand"):
        loaded(x[:, :2])
    again = file.with_name("again.safetensors")
    loaded.save(again)
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_models_compile_to_one_graph_and_export(family, file):
    model, size = build(family)
    x = torch.randn(2, *size)
    accelerate(model, x, tune="heuristic").save(file)
    loaded = load_accelerated(file)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        assert relative_error(torch.compile(loaded, fullgraph=True, backend="eager")(x), expected) < 1e-5
        assert relative_error(torch.export.export(loaded, (x,)).module()(x), expected) < 1e-5


def test_in_a_fresh_process(file):
    model, size = build("vit")
    x = torch.randn(1, *size)
    fast = accelerate(model, x, dtype=torch.bfloat16, tune="heuristic")
    fast.save(file)
    save_tensors(file.with_name("x.safetensors"), {"x": x, "y": fast(x)})
    code = f"""
import torch, depthfuse
from depthfuse.checkpoint import load_tensors
torch.set_num_threads({torch.get_num_threads()})
tensors, _ = load_tensors({str(file.with_name("x.safetensors"))!r})
assert torch.equal(depthfuse.load_accelerated({str(file)!r})(tensors["x"]), tensors["y"])
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def refuse_to_measure(*args, **kwargs):
    raise AssertionError("something was measured")


@pytest.mark.parametrize("eager_ms", [2.0, 0.5])
def test_what_was_measured_is_kept(file, tmp_path, monkeypatch, eager_ms):
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path / "cache"))

    def timings(runs, *args, **kwargs):
        return {name: Timing((1.0 if name == executor.ACCELERATED else eager_ms,)) for name in runs}

    monkeypatch.setattr(executor, "time_interleaved", timings)
    model, size = build("mobilenet")
    x = torch.randn(3, *size)
    fast = accelerate(model, x)
    fast.save(file)
    for module in (tune, executor):
        monkeypatch.setattr(module, "time_interleaved", refuse_to_measure)
    loaded = load_accelerated(file)
    chosen = [
        {name: m.implementation() for name, m in each.named_modules() if isinstance(m, FusedModule)}
        for each in (fast, loaded)
    ]
    assert chosen[0] == chosen[1]
    assert loaded.report().latency_ms == fast.report().latency_ms
    assert loaded.report().executor.startswith("eager") is False  # the model itself is not saved
    assert relative_error(loaded(x), fast(x)) < 1e-5


def test_another_environment_tunes_anew(file, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path / "cache"))
    model, size = build("mobilenet")
    x = torch.randn(1, *size)
    accelerate(model, x, tune="off").save(file)
    plain = {"plain"}
    assert {
        m.implementation() for m in load_accelerated(file).modules() if isinstance(m, FusedModule)
    } == plain
    here = api.environment
    monkeypatch.setattr(api, "environment", lambda device: {**here(device), "threads": 99})
    for level in ("off", "heuristic", "measure"):
        loaded = load_accelerated(file, tune=level)
        found = {m.implementation() for m in loaded.modules() if isinstance(m, FusedModule)}
        assert (found == plain) == (level == "off")
        assert not loaded.report().latency_ms  # there is no model to compare with
        with torch.no_grad():
            assert relative_error(loaded(x), model(x)) < 1e-5


@pytest.fixture
def in_parts(monkeypatch):
    """Models of timm's and of PyTorch's are planned child by child, as those are that cannot be captured as a whole."""

    def refuse_containers(model, call, dynamic):
        if isinstance(model, timm.models.NormFreeNet | nn.Sequential):
            raise CaptureError("it is a container")
        return captured(model, call, dynamic)

    captured = planning.capture_watched
    monkeypatch.setattr(planning, "capture_watched", refuse_containers)


def test_what_only_timm_can_build_is_built_by_timm(file, in_parts):
    model = randomise_norms(ModelSource.make("test_nfnet", num_classes=7, in_chans=1).build().eval())
    nn.init.normal_(model.head.fc.weight)
    x = torch.randn(1, 1, 64, 64)
    fast = accelerate(model, x, tune="heuristic")
    assert type(fast.plan) is type(model)
    fast.save(file)
    assert read_plan(file).plan.source == ModelSource.make("test_nfnet", num_classes=7, in_chans=1)
    loaded = load_accelerated(file)
    assert torch.equal(loaded(x), fast(x))
    assert fast(x).any()


class Branching(nn.Module):
    """Its control flow depends on values, so that only its own code can run it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())

    def forward(self, x):
        return self.stem(x) if x.mean() > -1e9 else x


def test_what_nobody_else_can_build_is_refused_and_named(file, in_parts):
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), Branching()).eval()
    x = torch.randn(1, 3, 8, 8)
    for model, named in ((Branching().eval(), "the model as a whole"), (inner, "the model as a whole")):
        fast = accelerate(model, x, tune="off")
        with pytest.raises(AccelerationError, match=rf"cannot save this model: {named} .*ModelSource"):
            fast.save(file)
    # timm would build another one than this: its arguments are not known
    model = ModelSource.make("test_nfnet").build().eval()
    del model.depthfuse_source
    model.stages[1].append(nn.Identity().eval())
    nn.init.normal_(model.head.fc.weight)
    with pytest.raises(AccelerationError, match=r"the model as a whole.*timm builds it otherwise"):
        accelerate(model, torch.randn(1, 3, 64, 64), tune="off").save(file)
    assert not file.exists()


def test_hooks_are_refused(file):
    model, size = build("resnet")
    model.layer2.register_forward_hook(lambda *args: None)
    with pytest.raises(AccelerationError, match=r"layer2 has hooks or parametrizations"):
        accelerate(model, torch.randn(1, *size), tune="off").save(file)


def test_functions_that_are_not_listed_are_refused_and_named(file):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return torch.special.bessel_j0(self.conv(x))

    with pytest.raises(AccelerationError, match=r"its plan holds the function .*bessel_j0"):
        accelerate(Odd().eval(), torch.randn(1, 3, 4, 4), tune="off").save(file)


def edited(file, change):
    """The file with its document changed, and a right checksum over that."""
    tensors, metadata = load_tensors(file)
    document = json.loads(metadata["document"])
    change(document)
    save_tensors(file, tensors, {**metadata, "document": json.dumps(document)})


def node(document, op):
    return next(node for node in document["plan"]["nodes"] if node["op"] == op)


@pytest.fixture(scope="module")
def saved_vit(tmp_path_factory):
    """The bytes of a file."""
    model, size = build("vit")
    path = tmp_path_factory.mktemp("saved") / "vit.safetensors"
    accelerate(model, torch.randn(1, *size), tune="off").save(path)
    return path.read_bytes()


EVIL = "x):\n    import os; os.abort()\n    return (x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: node(d, "call_function").update(target="os.system"), "unknown function 'os.system'"),
        (lambda d: node(d, "call_function").update(target="torch.load"), "unknown function"),
        (
            lambda d: node(d, "call_function").update(
                target="getattr", args=[{"node": "tensors_0"}, "__class__"]
            ),
            "unknown function 'getattr'",
        ),
        (
            lambda d: node(d, "call_function").update(target="aten.set_data"),
            "unknown function 'aten.set_data'",
        ),
        (lambda d: node(d, "call_function").update(target=EVIL), "unknown function"),
        (lambda d: node(d, "call_module").update(op="call_method", target="backward"), "unknown operation"),
        (lambda d: node(d, "get_attr").update(target=EVIL), "is no name"),
        (lambda d: node(d, "call_module").update(target=EVIL), "is no name"),
        (lambda d: node(d, "call_module").update(target="nothing"), "nothing"),
        (lambda d: node(d, "placeholder").update(target=EVIL), "is no name"),
        (lambda d: node(d, "placeholder").update(name=EVIL), "is no name for a node"),
        (lambda d: node(d, "call_module").update(name="tensors_0"), "names two"),
        (lambda d: node(d, "call_module").update(op="call_python"), "unknown operation"),
        (lambda d: node(d, "call_module").update(args=[{"node": "later"}]), "later"),
        (lambda d: node(d, "call_module").update(args=[{"pickle": "gASV"}]), "unknown kind of value"),
        (lambda d: node(d, "call_function").update(kwargs={EVIL: 1}), "is no name of an argument"),
        (lambda d: node(d, "output").update(args=[{"dtype": "load"}]), "unknown kind of value"),
        (lambda d: next(iter(d["plan"]["modules"].values())).update(fused="Evil"), "Evil"),
        (lambda d: next(iter(d["plan"]["modules"].values()))["config"].update(evil=1), "evil"),
        (
            lambda d: d["plan"]["modules"].update({EVIL: next(iter(d["plan"]["modules"].values()))}),
            "is no path",
        ),
        (
            lambda d: d["plan"]["modules"].update(norm={"layer": "Popen", "arguments": {}}),
            "KeyError 'source'",
        ),
        (lambda d: d["plan"]["modules"].update(norm={"source": "norm", "inside": {}}), "no timm model"),
        (lambda d: d.pop("plan"), "plan"),
        (lambda d: d.update(dtype="torch.load"), "no dtype"),
        (lambda d: d["tuned"].update(implementations={}), "fused"),
        (
            lambda d: d["tuned"]["implementations"].update(fused_head="magic"),
            "unknown implementation 'magic'",
        ),
        (lambda d: d["tuned"]["execution"].update(chunk=0), "says not how a plan runs"),
        (lambda d: d["tuned"]["execution"].update(chunk=-1), "says not how a plan runs"),
        (lambda d: d["tuned"].update(environment=3), "is no environment"),
        (lambda d: d.update(example=[[[1, -3, 24, 24], "torch.float32"]]), "is no shape"),
        (lambda d: d["report"].update(evil=1), "evil"),
    ],
)
def test_nothing_in_a_file_is_executed(file, saved_vit, change, message):
    file.write_bytes(saved_vit)
    edited(file, change)
    with pytest.raises(CheckpointError, match=rf"holds no plan that this version understands.*{message}"):
        load_accelerated(file)


def test_damaged_and_foreign_files(file):
    model, size = build("resnet")
    accelerate(model, torch.randn(1, *size), tune="off").save(file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        load_accelerated(file)
    file.write_bytes(data[:1000])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_accelerated(file)
    save_tensors(file, {"x": torch.zeros(1)}, {"model": "resnet18"})
    with pytest.raises(CheckpointError, match=r"format None, expected 'depthfuse.accelerated/4'"):
        load_accelerated(file)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_accelerated(file.with_name("nothing"))


def test_a_write_that_fails_leaves_the_old_file(file, monkeypatch):
    model, size = build("resnet")
    fast = accelerate(model, torch.randn(1, *size), tune="off")
    fast.save(file)
    before = file.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        fast.double().save(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


class Arguments(nn.Module):
    """Operators with arguments of all kinds."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale=2.0):
        y = self.linear(x)[..., :2, None].to(torch.float64, memory_format=torch.contiguous_format)
        y = torch.clamp(y, min=-float("inf"), max=float("inf"))
        y = (
            F.pad(y, [0, 0, 1, 1], value=-1.5)
            + torch.arange(4, device=x.device, dtype=torch.float64)[:, None]
        )
        y = torch.cat([y, y], dim=-1).reshape(x.shape[0], -1)
        return {"sum": y.sum((0, 1), keepdim=True), "parts": [y, (scale, None, True, "name")]}


def test_arguments_of_all_kinds_come_back(file):
    x = torch.randn(3, 4)
    fast = accelerate(Arguments().eval(), x, tune="off")
    description = json.loads(json.dumps(describe(fast.plan)))
    twin = rebuild(description, fast.plan.state_dict(), None)
    assert str(twin.graph) == str(fast.plan.graph)
    fast.save(file)
    ours, theirs = fast(x), load_accelerated(file)(x)
    assert torch.equal(ours["sum"], theirs["sum"]) and torch.equal(ours["parts"][0], theirs["parts"][0])
    assert theirs["parts"][1] == (2.0, None, True, "name")
    with pytest.raises(DescriptionError, match="the plan: KeyError"):
        rebuild({"layer": "Nothing", "arguments": {}}, {}, None)


def _is_switched(function):
    """Draws random numbers only where an argument asks for it; a plan is of a model in evaluation mode."""
    return any(word in str(function._schema) for word in ("dropout", "bool train"))


def test_the_list_holds_nothing_that_reaches_outside():
    names = {part for name in FUNCTIONS for part in name.split(".")[:2]}
    assert not names & {
        "load",
        "save",
        "from_file",
        "eval",
        "exec",
        "compile",
        "open",
        "system",
        "set_",
        "resize_",
    }
    for name, function in FUNCTIONS.items():
        if name.startswith("aten."):
            assert isinstance(function, torch._ops.OpOverload) and function.namespace == "aten"
            assert name.startswith("aten.copy_.") or not function._schema.is_mutable
            assert torch.Tag.nondeterministic_seeded not in function.tags or _is_switched(function)
        else:
            assert (function.__module__ or "").partition(".")[0] in ("_operator", "math", "builtins", "torch")
    assert [name for name, f in FUNCTIONS.items() if f.__module__ == "builtins"] == ["round"]


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory. Tried to allocate 20.00 MiB.", "DefaultCPUAllocator: not enough memory: you tried"],
)
@pytest.mark.parametrize("where", ["restore", "choose"])
def test_a_full_memory_is_not_the_files_fault(file, monkeypatch, message, where):
    model, size = build("resnet")
    accelerate(model, torch.randn(1, *size), tune="off").save(file)
    if where == "choose":
        monkeypatch.setattr(api, "environment", lambda device: {"device": "another"})

    def fail(*args, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(api, where, fail)
    with pytest.raises(RuntimeError, match=message[:20]):
        load_accelerated(file, tune="off")
    monkeypatch.undo()
    assert load_accelerated(file, tune="off").report().fused_count > 0
