"""Files in 8 bits: what they lose is measured and bounded; layers that lose too much stay in float, or none is left."""

import importlib
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from exporting.test_export import READ, Small, images, installed
from nets import build
from torch import nn

from depthfuse import export
from depthfuse.data import DataConfig, bundle_of_tensors
from depthfuse.errors import ExportError
from depthfuse.exporting import RUNTIMES, quantising
from depthfuse.exporting.calibration import samples_of
from depthfuse.exporting.quantising import LARGEST, PACKAGES, RANGES, quantise
from depthfuse.exporting.runtimes import absent
from depthfuse.exporting.sensitivity import layers_of, sensitivities
from depthfuse.exporting.subject import subject_of
from depthfuse.measuring.accuracy import relative_error

TAKE_8_BITS = [name for name, runtime in RUNTIMES.items() if runtime.save is not None]


def needs_int8(name="onnx"):
    installed(name)
    missing = absent(*PACKAGES)
    if missing:
        pytest.skip(f"{' and '.join(missing)} is not installed")


class Plain(nn.Module):
    """Three convolutions, the last depthwise, with ReLU and a classifier: 15x15 images to 5 classes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(9, 11, 3, stride=2)
        self.third, self.head = nn.Conv2d(11, 11, 3, padding=1, groups=11), nn.Linear(11, 5)

    def features(self, image):
        x = self.first(image).relu()
        return self.third(self.second(x).relu()).relu().mean((2, 3))

    def forward(self, image):
        return self.head(self.features(image))


def some_images(count=160, seed=2):
    """One of five colours each, with noise."""
    colours = 2 * torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    return colours[torch.arange(count) % 5] + 0.2 * torch.randn(count, 3, 15, 15, generator=generator)


def net(planted=1.0):
    """It knows the colours. planted: by how much one channel is larger between the first two layers."""
    torch.manual_seed(0)
    model = Plain().eval()
    with torch.no_grad():
        x = model.features(some_images())
        scale, centre = x.std(), x.mean(0)
        wanted = torch.eye(5)[torch.arange(len(x)) % 5]
        # ridge regression
        gram = (x - centre).T @ (x - centre) / scale**2 + 0.1 * torch.eye(x.shape[1])
        weight = torch.linalg.solve(gram, (x - centre).T @ wanted / scale) / scale
        model.head.weight.copy_(weight.T)
        model.head.bias.copy_(wanted.mean(0) - centre @ weight)
        model.first.weight[4] *= planted
        model.first.bias[4] *= planted
        model.second.weight[:, 4] /= planted
        assert (model(some_images()).argmax(1) == torch.arange(160) % 5).all()
    return model


def labelled(model, count=160):
    x = some_images(count)
    with torch.no_grad():
        return x, model(x).argmax(1)


def written(model, path, name="onnx", **settings):
    given = {"calibration": some_images(), "calibration_images": 60, "points": 8.0, **settings}
    with torch.no_grad():
        return export(model, some_images(2), path, name, precision="int8", **given)


@pytest.mark.parametrize("name", TAKE_8_BITS)
def test_a_file_in_8_bits_computes_nearly_the_same(name, tmp_path):
    needs_int8(name)
    model, path = net(), tmp_path / f"net{RUNTIMES[name].suffix}"
    result = written(model, path, name)
    assert sorted(result.files) == sorted(tmp_path.iterdir())
    told = result.quantisation
    assert (told.metric, told.images, told.in_float, told.equalised) == (
        "agreement with the model",
        100,
        (),
        0,
    )
    # NNCF's default cuts off what single colours reach, and scores 92 %
    assert told.ranges == LARGEST
    assert told.float_score == 100.0 and told.score >= 97.0 and told.lost == told.float_score - told.score
    assert set(told.layers) == {"first", "second", "third", "head"}
    assert result.comparison.error <= result.comparison.allowed < 1e-4  # in float
    facts = json.loads(READ[name](path))
    assert facts == result.facts and facts["precision"] == "int8"
    assert facts["quantisation"] == json.loads(json.dumps(told.document()))
    x = some_images(30, seed=5)
    (given,) = RUNTIMES[name].run(path)(x)
    with torch.no_grad():
        exact = model(x)
    off = (given - exact).abs().max() / exact.abs().max()
    assert 1e-4 < off < 0.1
    assert "8 bits: agreement with the model 100.00 ->" in str(result) and "8 points allowed" in str(result)


def test_weights_lie_in_8_bits_and_biases_as_integers(tmp_path):
    needs_int8()
    onnx = importlib.import_module("onnx")
    written(net(), tmp_path / "net.onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    kinds = {each.name: each.data_type for each in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(products) == 4
    for node in products:
        _, weight, bias = (made_by.get(name) for name in node.input)
        assert kinds[weight.input[0]] == onnx.TensorProto.INT8
        assert bias is not None and kinds[bias.input[0]] == onnx.TensorProto.INT32
        scale = next(each for each in graph.initializer if each.name == weight.input[1])
        assert list(scale.dims) == list(
            next(e for e in graph.initializer if e.name == weight.input[0]).dims[:1]
        )


def test_onnx_runtime_multiplies_integers(tmp_path):
    """It takes no convolution as one of integers that is written in another form."""
    needs_int8()
    onnx, onnxruntime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    written(net(), tmp_path / "net.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    options.log_severity_level = 3  # of a file for this machine alone
    onnxruntime.InferenceSession(tmp_path / "net.onnx", options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "seen.onnx").graph.node)
    assert (kinds["QLinearConv"], kinds["QGemm"], kinds["Conv"], kinds["Gemm"]) == (3, 1, 0, 0)


def test_a_transformer(tmp_path):
    needs_int8()
    model, size = build("vit")
    x = torch.randn(40, *size, generator=torch.Generator().manual_seed(3))
    settings = {"calibration": x, "calibration_images": 30, "points": 100.0}
    result = export(model, x[:2], tmp_path / "net.onnx", "onnx", precision="int8", **settings)
    assert {"patch_embed.proj", "blocks.1.mlp.fc1", "head"} <= set(result.quantisation.layers)
    with torch.no_grad():
        off = relative_error(*RUNTIMES["onnx"].run(tmp_path / "net.onnx")(x), model(x))
    assert 1e-4 < off < 0.2


@pytest.mark.parametrize("name", TAKE_8_BITS)
def test_a_layer_that_loses_too_much_stays_in_float(name, tmp_path):
    """One channel is 1000 times larger than the others, which 8 bits for all of them cannot tell from zero."""
    needs_int8(name)
    model, path = net(planted=1000.0), tmp_path / f"net{RUNTIMES[name].suffix}"
    result = written(model, path, name)
    told = result.quantisation
    assert told.in_float == ("second",) and next(iter(told.layers)) == "second"
    assert told.lost <= 8.0 and told.layers["second"] > 100 * told.layers["third"]
    assert "left in float, for what they alone do to the outputs: second (" in str(result)
    assert json.loads(READ[name](path))["quantisation"]["in_float"] == ["second"]


def test_equalising_spares_the_planted_layer(tmp_path):
    needs_int8()
    told = written(net(planted=1000.0), tmp_path / "net.onnx", equalise=True).quantisation
    assert told.in_float == () and told.equalised == 3 and told.lost <= 8.0


def test_what_cannot_reach_the_budget_is_refused(tmp_path):
    """Every layer is bad: half of them in float are not enough."""
    needs_int8()
    model = net(planted=1000.0)
    with torch.no_grad():
        model.second.weight[2] *= 1000
        model.second.bias[2] *= 1000
        model.third.weight[2] /= 1000
        model.third.weight[3] *= 1000
        model.third.bias[3] *= 1000
        model.head.weight[:, 3] /= 1000
    path = tmp_path / "net.onnx"
    path.write_text("an earlier one")
    said = (
        r"Plain in 8 bits loses .* points \(agreement .* and .* of its 4 layers in float, where 1 are allowed"
    )
    with pytest.raises(ExportError, match=said):
        written(model, path, points=1.0)
    assert path.read_text() == "an earlier one" and list(tmp_path.iterdir()) == [path]


def test_targets_and_bundles_are_scored_by_the_task(tmp_path):
    needs_int8()
    model = net()
    x, y = labelled(model)
    batches = list(zip(x.split(40), y.split(40), strict=True))
    told = written(model, tmp_path / "net.onnx", calibration=iter(batches)).quantisation
    assert (told.metric, told.images) == ("top-1", 100) and told.float_score == 100.0
    config = DataConfig(batch_size=8, holdout=0.25, img_size=15)
    pixels = ((x / 14 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
    bundle = bundle_of_tensors(config, list("abcde"), (pixels, y), (pixels[:8], y[:8]), std=1 / 14)
    told = written(model, tmp_path / "net.onnx", calibration=bundle).quantisation
    assert told.metric == "top-1" and 30 <= told.images <= 50


@pytest.mark.parametrize("better", RANGES)
def test_where_scores_are_equal_the_outputs_decide(better, monkeypatch):
    """300 images hardly tell apart what differs by half a point on 3,000."""
    monkeypatch.setattr(quantising, "rounded", lambda *args, ranges, **settings: ranges.encode())
    monkeypatch.setattr(quantising, "_RANKED_BY", 2)
    model = net()

    def load(name):
        off = 1e-3 if name.decode() == better else 2e-3
        return lambda x: (model(x) * (1 + off),)

    with torch.no_grad():
        subject = subject_of(model, some_images(2), None, "batch", True)
        samples = samples_of(some_images(), subject, 60, None, None)
        chosen, told = quantise(b"", lambda x: (model(x),), subject, samples, load, 0, False)
    assert (chosen.decode(), told.ranges) == (better, better)
    assert told.score == told.float_score == 100.0


def test_of_several_files_one_that_loses_too_much_is_not_kept(monkeypatch):
    """Though its outputs err less: the budget is in points."""
    monkeypatch.setattr(quantising, "rounded", lambda *args, ranges, **settings: ranges.encode())
    model = net()

    def load(name):
        if name.decode() == LARGEST:  # all outputs far off, and all answers right
            return lambda x: (model(x) * 3,)
        return lambda x: (model(x).roll(1, 1),)

    with torch.no_grad():
        subject = subject_of(model, some_images(2), None, "batch", True)
        samples = samples_of(some_images(), subject, 60, None, None)
        errors = [samples.compare(load(each.encode()), lambda x: (model(x),)) for each in RANGES]
        _, told = quantise(b"", lambda x: (model(x),), subject, samples, load, 0, False)
    assert [score for score, _ in errors] == [100.0, 0.0] and errors[0][1] > errors[1][1]
    assert told.ranges == LARGEST


def test_outputs_that_are_no_numbers_err_without_end():
    model = net()
    with torch.no_grad():
        subject = subject_of(model, some_images(2), None, "batch", True)
        samples = samples_of(some_images(), subject, 60, None, None)
        for wrong in (float("nan"), float("inf")):
            _, error = samples.compare(lambda x, by=wrong: (model(x) * by,), lambda x: (model(x),))
            assert error == float("inf")
        assert samples.compare(lambda x: (model(x),), lambda x: (model(x),)) == (100.0, 0.0)


def test_a_fixed_batch(tmp_path):
    needs_int8()
    path = tmp_path / "net.onnx"
    with torch.no_grad():
        settings = {
            "calibration": some_images(163),
            "calibration_images": 60,
            "points": 8.0,
            "dynamic": "none",
        }
        result = export(net(), some_images(7), path, "onnx", precision="int8", **settings)
    assert result.quantisation.images == 161 - 56
    (given,) = RUNTIMES["onnx"].run(path)(some_images(7))
    assert given.shape == (7, 5)


def test_the_most_sensitive_layer_is_the_planted_one():
    """And rounding nothing away costs next to nothing."""
    x = some_images(20)
    with torch.no_grad():
        plain, planted = (
            sensitivities(subject_of(net(by), x, None, "batch", True).plan.module, x) for by in (1.0, 1000.0)
        )
    assert len(plain) == 4 and all(0 < error < 1e-2 for error in plain.values())
    assert list(planted.values()) == sorted(planted.values(), reverse=True)
    worst, error = next(iter(planted.items()))
    assert error > 100 * plain[worst] and all(
        planted[k] == pytest.approx(plain[k], rel=0.5) for k in plain if k != worst
    )


def test_sensitivities_leave_the_weights_as_they_were():
    x = some_images(4)
    with torch.no_grad():
        plan = subject_of(net(), x, None, "batch", True).plan.module
        before = [layer.weight.clone() for layer in layers_of(plan).values()]
        exact = plan(x)
        sensitivities(plan, x)
        assert torch.equal(plan(x), exact)
    assert all(map(torch.equal, before, (layer.weight for layer in layers_of(plan).values())))


def bad(value):
    x = some_images()
    x[7, 1, 3, 3] = value
    return x


WRONG = {
    "none": (None, "8 bits need images to take ranges from: give calibration="),
    "few": (some_images(12), "9 images are too few to take ranges from: give 16 at least"),
    "few to judge by": (some_images(24), "cannot be seen on 6 images: .* 13 are needed"),
    "nan": (bad(float("nan")), "1 of the images .* hold NaN or infinity, first number 7"),
    "infinity": (bad(float("inf")), "hold NaN or infinity"),
    "other size": (some_images()[..., :9], r"images \[3, 15, 9\] are given .* exported for \[3, 15, 15\]"),
    "other dtype": (some_images().double(), "images of torch.float64 .* expected torch.float32"),
    "no images": (["cat.jpg"], "calibration gives a str, expected images"),
    "empty": ([], "calibration gives no images"),
    "some targets": ([(some_images(9), torch.zeros(9)), some_images(9)], "targets with some of its batches"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_images_that_do_not_calibrate(kind):
    given, said = WRONG[kind]
    with torch.no_grad():
        subject = subject_of(net(), some_images(2), None, "batch", on_cpu=True)
        with pytest.raises(ExportError, match=said):
            samples_of(given, subject, 60, 8.0, None)


class Maps(Plain):
    def forward(self, image):
        return self.third(self.second(self.first(image)))


class Two(Plain):
    def forward(self, image, mask):
        return super().forward(image * mask)


def test_models_that_8_bits_are_not_for():
    with torch.no_grad():
        maps = subject_of(Maps().eval(), some_images(2), None, "batch", on_cpu=True)
        with pytest.raises(
            ExportError, match="names no class .* give .images, targets. to calibrate by, and task="
        ):
            samples_of(some_images(), maps, 60, 8.0, None)
        two = subject_of(Two().eval(), (some_images(2), some_images(2)), None, "batch", on_cpu=True)
        with pytest.raises(ExportError, match="one float32 tensor of images, and Two takes float32"):
            samples_of(some_images(), two, 60, 8.0, None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "int4"}, "precision is 'int4', expected one of 'float', 'int8'"),
        ({"points": 1.0}, "are settings of precision='int8'"),
        ({"calibration": images()}, "are settings of precision='int8'"),
        ({"equalise": True}, "are settings of precision='int8'"),
        ({"precision": "int8"}, "8 bits are written for 'onnx' and 'openvino', not for 'torch'"),
        ({"precision": "int8", "to": "onnx", "points": 0.0}, "points is 0.0, expected a loss"),
        (
            {"precision": "int8", "to": "onnx", "calibration_images": 3},
            "calibration_images is 3, expected 16",
        ),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings, said, tmp_path):
    given = {"to": "torch", **settings}
    with pytest.raises(ValueError, match=said):
        export(Small().eval(), images(), tmp_path / f"net{RUNTIMES[given['to']].suffix}", **given)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    present = ("onnx", "onnxscript", "onnxruntime", "openvino")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "nncf" else n if n in present else find(n)
    )
    for name in TAKE_8_BITS:
        with pytest.raises(ExportError, match=f'int8 needs nncf: pip install "depthfuse.{name},int8."'):
            written(net(), tmp_path / f"net{RUNTIMES[name].suffix}", name)
    assert not list(tmp_path.iterdir())


def test_what_nncf_does_not_take_is_named(tmp_path, monkeypatch):
    needs_int8()
    nncf = importlib.import_module("nncf")

    def fails(*args, **kwargs):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(nncf, "quantize", fails)
    with pytest.raises(
        ExportError, match="NNCF does not take this model: RuntimeError: no such operator; export it"
    ):
        written(net(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_fails_on_the_file_in_8_bits_leaves_nothing(tmp_path, monkeypatch):
    needs_int8()
    runtime, loads = RUNTIMES["onnx"], []

    def breaks(path):
        loads.append(path)
        if len(loads) > 2:  # the file in float, compared, and scored
            raise RuntimeError("not these integers")
        return runtime.run(path)

    monkeypatch.setitem(RUNTIMES, "onnx", replace(runtime, run=breaks))
    with pytest.raises(
        ExportError, match="ONNX Runtime cannot run Plain in 8 bits: RuntimeError: not these integers"
    ):
        written(net(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
