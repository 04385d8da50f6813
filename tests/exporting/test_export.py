"""Files for other runtimes: what they compute there, what they say of the model, and how clean their graphs are."""

import importlib
import json
import shutil
from collections import Counter

import pytest
import torch
from nets import build, randomise_norms
from on_request import LONG
from torch import nn

import depthfuse
from depthfuse import Supernet, accelerate, export, merge
from depthfuse.errors import ExportError
from depthfuse.exporting import RUNTIMES
from depthfuse.measuring.accuracy import relative_error


class Small(nn.Module):
    """A little of everything that nets are made of: 13x13 images to 5 classes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.SiLU())
        self.gate = nn.Conv2d(8, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        x = self.stem(image)
        x = x + self.depthwise(x)
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(nn.functional.gelu(self.norm(x.flatten(2).transpose(1, 2))).mean(1))


def small():
    torch.manual_seed(0)
    return randomise_norms(Small()).eval()


def images(batch=1, side=13, channels=3):
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def installed(name):
    """Skip the test, with the reason, unless a runtime is here."""
    missing = RUNTIMES[name].missing(running=True)
    if missing:
        pytest.skip(f"{' and '.join(missing)} is not installed")
    if name == "aoti" and not LONG:
        pytest.skip("g++ takes half a minute: DEPTHFUSE_LONG=1 runs it")
    if name == "aoti" and shutil.which("g++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")


def onnx_facts(path):
    onnx = importlib.import_module("onnx")
    return {each.key: each.value for each in onnx.load(path).metadata_props}["depthfuse"]


def torch_facts(path):
    files = {"depthfuse": ""}
    torch.export.load(path, extra_files=files)
    return files["depthfuse"]


def openvino_facts(path):
    model = importlib.import_module("openvino").Core().read_model(path)
    return model.get_rt_info(["depthfuse"]).astype(str)


def executorch_facts(path):
    program = importlib.import_module("executorch.runtime").Runtime.get().load_program(path)
    (text,) = program.load_method("depthfuse").execute([])
    return text


def aoti_facts(path):
    return torch._inductor.aoti_load_package(str(path)).get_metadata()["depthfuse"]


READ = {
    "onnx": onnx_facts,
    "tensorrt": onnx_facts,
    "migraphx": onnx_facts,
    "openvino": openvino_facts,
    "executorch": executorch_facts,
    "torch": torch_facts,
    "aoti": aoti_facts,
}


@pytest.mark.parametrize("name", RUNTIMES)
def test_each_runtime_computes_the_same_and_knows_the_model(name, tmp_path):
    installed(name)
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / f"net{RUNTIMES[name].suffix}"
    written = export(model, images(), path, name, classes=list("abcde"), mean=(0.5,) * 3, std=(0.25,) * 3)
    assert sorted(written.files) == sorted(tmp_path.iterdir())
    assert written.comparison.shapes == ((3, 3, 13, 13), (1, 3, 13, 13))
    assert written.comparison.error <= written.comparison.allowed < 1e-4
    facts = json.loads(READ[name](path))
    assert facts == written.facts
    assert (facts["classes"], facts["mean"], facts["std"]) == (list("abcde"), [0.5] * 3, [0.25] * 3)
    assert facts["inputs"] == [{"name": "image", "shape": ["batch", 3, 13, 13], "dtype": "float32"}]
    assert (facts["outputs"], facts["input_size"], facts["spec"]) == (["output"], [3, 13, 13], None)
    assert (facts["depthfuse"], facts["torch"]) == (depthfuse.__version__, torch.__version__)
    run, x = RUNTIMES[name].run(path), images(7)
    (given,) = run(x)
    with torch.no_grad():
        assert relative_error(given, model(x)) < 1e-5
    assert str(tmp_path) in str(written) and "allowed" in str(written)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def layers(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("family", ["resnet", "lite", "convnext", "vit"])
def test_a_merged_graph_is_clean(family, tmp_path):
    """One convolution or linear layer an operator, and no norm that could be folded."""
    model, size = build(family)
    supernet = randomise_norms(Supernet(model)).eval()
    options = {path: names for path, names in supernet.options().items() if names}
    supernet.set_choices({path: options[path][0] for path in list(options)[::2]})
    merged = merge(supernet, size)
    operations = export(merged, torch.randn(2, *size), tmp_path / "net.pt2", "torch").operations
    assert "batch_norm" not in str(operations)
    assert operations["conv2d"] + operations["linear"] == layers(merged, nn.Conv2d) + layers(
        merged, nn.Linear
    )
    idle = {"contiguous", "clone", "_to_copy", "as_strided", "dropout", "detach", "alias"}
    assert not idle & set(operations)


def test_the_onnx_file_reads_like_the_model(tmp_path):
    installed("onnx")
    model, size = build("resnet")
    supernet = Supernet(model).eval()
    supernet.set_choices({"layer1.0": "dense", "layer2.1": "compact"})
    merged = merge(supernet, size)
    path = tmp_path / "net.onnx"
    facts = export(merged, torch.randn(1, *size), path, "onnx").facts
    assert facts["spec"] == json.loads(supernet.spec().to_json()) and facts["model"] == "resnet18"
    data = path.read_bytes()
    graph = importlib.import_module("onnx").load_from_string(data).graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["Conv"] == layers(merged, nn.Conv2d) and counts["Gemm"] == 1
    assert set(counts) == {"Conv", "Relu", "Add", "Mul", "MaxPool", "ReduceMean", "Reshape", "Gemm"}
    assert counts["Mul"] == layers(merged, nn.BatchNorm2d)  # behind an activation and before a padded layer
    assert {"conv1.weight", "layer2.0.conv1.weight", "fc.bias"} <= {each.name for each in graph.initializer}
    assert {"layer2.0.conv1/Conv", "fc/Gemm"} <= {node.name for node in graph.node}
    (x,), (y,) = graph.input, graph.output
    shapes = [[dim.dim_param or dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in (x, y)]
    assert shapes == [["batch", 3, 45, 45], ["batch", 7]] and (x.name, y.name) == ("x", "output")
    assert b".py" not in data  # no path of this machine


class Many(nn.Module):
    """Two inputs, and several outputs by name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image, mask=None, *, scale=1.0):
        y = self.conv(image * mask) * scale
        return {"maps": y, "scores": (y.mean((2, 3)), y.amax((2, 3)))}


def test_inputs_and_outputs_have_the_models_names(tmp_path):
    example = {"image": images(2), "mask": torch.rand(2, 1, 13, 13), "scale": 0.5}
    written = export(Many().eval(), None, tmp_path / "net.pt2", "torch", example_kwargs=example)
    assert [each["name"] for each in written.facts["inputs"]] == ["image", "mask"]
    assert written.facts["outputs"] == ["maps", "scores_0", "scores_1"]
    assert [each["shape"][0] for each in written.facts["inputs"]] == ["batch", "batch"]


def test_sizes_may_be_open_too_or_nothing(tmp_path):
    model = small()
    written = export(model, images(), tmp_path / "net.pt2", "torch", dynamic="sizes")
    assert written.facts["inputs"][0]["shape"] == ["batch", 3, "height", "width"]
    assert written.comparison.shapes == ((3, 3, 13, 13), (1, 3, 13, 13), (3, 3, 45, 77))
    written = export(model, images(4), tmp_path / "net.pt2", "torch", dynamic="none")
    assert written.facts["inputs"][0]["shape"] == [4, 3, 13, 13] and written.comparison.shapes == (
        (4, 3, 13, 13),
    )
    with pytest.raises(RuntimeError, match="shape"):
        RUNTIMES["torch"].run(tmp_path / "net.pt2")(images(5))


def test_what_was_accelerated(tmp_path):
    """Exported is what it was made from; out of a file, which does not hold that, its plan."""
    model = small()
    fast = accelerate(model, images(), tune="heuristic")
    written = export(fast, None, tmp_path / "a.pt2", "torch")
    assert written.facts["inputs"][0]["shape"] == ["batch", 3, 13, 13]
    fast.save(tmp_path / "fast.safetensors")
    again = export(tmp_path / "fast.safetensors", None, tmp_path / "b.pt2", "torch")
    assert (again.facts, again.operations) == (written.facts, written.operations)
    with torch.no_grad():
        for name in "ab":
            (given,) = RUNTIMES["torch"].run(tmp_path / f"{name}.pt2")(images(3))
            assert relative_error(given, model(images(3))) < 1e-5
    half = accelerate(model, images(), torch.bfloat16, tune="off")
    assert export(half, None, tmp_path / "c.pt2", "torch").facts["inputs"][0]["dtype"] == "bfloat16"


class InParts(nn.Module):
    """A branch on values: accelerated part by part."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        y = self.layers(x)
        return y if y.sum() > 0 else -y


def test_what_is_no_single_graph_is_refused(tmp_path):
    model = InParts().eval()
    fast = accelerate(model, images(), tune="off")
    for each in (model, fast):
        with pytest.raises(ExportError, match="InParts cannot be exported: it does not become one graph"):
            export(each, images(), tmp_path / "net.pt2", "torch")
    fast.load_state_dict(fast.state_dict())  # other weights: what it was made from is none of it any more
    with pytest.raises(ExportError, match="in parts.*: export the model that it was made from"):
        export(fast, None, tmp_path / "net.pt2", "torch")
    assert not (tmp_path / "net.pt2").exists()
