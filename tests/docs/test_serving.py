"""The examples of docs/serving: Triton's configuration against the ONNX file, the server against the model."""

import importlib.util
import io
import re
import sys

import pytest
import torch
from documents import DOCS
from PIL import Image

import depthfuse
from depthfuse import ModelSource
from depthfuse.data.config import DataConfig
from depthfuse.data.decoding import to_mode
from depthfuse.data.transforms import InputFormat, build

SERVING = DOCS / "serving"
CLASSES = ["daisy", "tulip", "rose"]
MEAN, STD = [0.25, 0.5, 0.75], [0.5, 0.25, 0.125]


def example(name):
    """A script of the folder, as a module."""
    spec = importlib.util.spec_from_file_location(name, SERVING / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # FastAPI looks its annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f'{package} is not installed: pip install "depthfuse[onnx]"')
    torch.manual_seed(0)
    source = ModelSource.make("resnet18", channels=(8, 8, 12, 16), layers=(1, 1, 1, 1), num_classes=3)
    model = source.build().eval()
    folder = tmp_path_factory.mktemp("exported")
    for name, dynamic in (("open", "batch"), ("fixed", "none"), ("sizes", "sizes")):
        x, path = torch.randn(2, 3, 32, 32), folder / f"{name}.onnx"
        given = {"classes": CLASSES, "mean": MEAN, "std": STD, "check": False}
        depthfuse.export(model, x, path, "onnx", dynamic=dynamic, **given)
    return model, folder


def parsed(text):
    """{field: [values]} of text protobuf without nesting deeper than one level, as config.pbtxt is."""
    tokens = re.findall(r'"[^"]*"|[\w.\-]+|[:\[\]{},]', text)

    def value(i):
        if tokens[i] == "{":
            return message(i + 1)
        if tokens[i] == "[":
            items, i = [], i + 1
            while tokens[i] != "]":
                item, i = value(i)
                items.append(item)
                i += tokens[i] == ","
            return items, i + 1
        word = tokens[i]
        return (word[1:-1] if word[0] == '"' else int(word) if re.fullmatch(r"-?\d+", word) else word), i + 1

    def message(i):
        fields = {}
        while i < len(tokens) and tokens[i] != "}":
            name, i = tokens[i], i + 1
            fields[name], i = value(i + (tokens[i] == ":"))
        return fields, i + 1

    return message(0)[0]


@pytest.mark.parametrize(
    ("name", "batch", "image"), [("open", 16, [3, 32, 32]), ("fixed", 0, [2, 3, 32, 32]), ("sizes", 16, [3, -1, -1])]
)  # fmt: skip
def test_triton_is_told_what_the_file_takes(exported, tmp_path, name, batch, image):
    import onnx

    _, folder = exported
    script = example("triton_repository")
    arguments = [str(folder / f"{name}.onnx"), "--repository", str(tmp_path), "--name", "photos"]
    assert script.main([*arguments, "--largest-batch", "16"]) == 0
    made = tmp_path / "photos"
    assert {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()} == {
        "config.pbtxt", "labels.txt", "1/model.onnx",
    }  # fmt: skip
    assert (made / "1" / "model.onnx").read_bytes() == (folder / f"{name}.onnx").read_bytes()
    assert (made / "labels.txt").read_text().split() == CLASSES
    config = parsed((made / "config.pbtxt").read_text())
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("photos", "onnxruntime", batch)
    assert ("dynamic_batching" in config) == (batch > 0)
    graph = onnx.load(folder / f"{name}.onnx").graph
    for told, values in ((config["input"], graph.input), (config["output"], graph.output)):
        assert [each["name"] for each in told] == [value.name for value in values]
        assert [each["data_type"] for each in told] == ["TYPE_FP32"]
        assert values[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        shape = [d.dim_value if d.HasField("dim_value") else -1 for d in values[0].type.tensor_type.shape.dim]
        assert told[0]["dims"] == shape[1 if batch else 0 :]
    assert config["input"][0]["dims"] == image and config["output"][0]["label_filename"] == "labels.txt"


def test_a_second_version_stands_beside_the_first(exported, tmp_path):
    _, folder = exported
    script = example("triton_repository")
    for version in ("1", "2"):
        assert (
            script.main([str(folder / "open.onnx"), "--repository", str(tmp_path), "--version", version]) == 0
        )
    assert (tmp_path / "open" / "1" / "model.onnx").exists() and (
        tmp_path / "open" / "2" / "model.onnx"
    ).exists()
    for wrong in ([str(folder / "none.onnx")], [str(folder / "open.onnx"), "--version", "0"]):
        with pytest.raises(SystemExit):
            script.main([*wrong, "--repository", str(tmp_path)])


@pytest.fixture
def client(exported, monkeypatch):
    for package in ("fastapi", "httpx"):
        pytest.importorskip(package, reason=f"{package} is not installed, which the example needs")
    from fastapi.testclient import TestClient

    monkeypatch.setenv("MODEL", str(exported[1] / "open.onnx"))
    monkeypatch.setenv("THREADS", "1")
    monkeypatch.setenv("CROP_PCT", "0.875")
    server = example("server")
    with TestClient(server.app) as client:
        yield server, client


def photo(width, height, mode="RGB"):
    pixels = torch.randint(256, (height, width, len(mode)), dtype=torch.uint8)
    return Image.fromarray(pixels.squeeze(-1).numpy(), mode if len(mode) > 1 else None)


def posted(client, image, kind="PNG"):
    data = io.BytesIO()
    image.save(data, kind)
    return client.post("/classify", content=data.getvalue())


@pytest.mark.parametrize(("width", "height", "mode"), [(61, 47, "RGB"), (40, 90, "L"), (32, 32, "RGBA")])
def test_the_server_answers_as_the_model(exported, client, width, height, mode):
    server, http = client
    image = photo(width, height, mode)
    ours = server.app.state.classifier.prepared(image)
    wanted = InputFormat(3, 32, tuple(MEAN), tuple(STD), "bicubic", 0.875, "center")
    _, evaluation = build(DataConfig(), wanted)
    assert torch.allclose(torch.from_numpy(ours)[0], evaluation(to_mode(image, "RGB")), atol=1e-5)
    answer = posted(http, image)
    assert answer.status_code == 200
    with torch.no_grad():
        shares = exported[0](torch.from_numpy(ours)).softmax(1)[0]
    assert answer.json() == pytest.approx(
        {name: float(shares[i]) for i, name in enumerate(CLASSES)}, abs=1e-5
    )
    assert list(answer.json().values()) == sorted(answer.json().values(), reverse=True)


def test_the_server_refuses_what_is_no_photo(client):
    server, http = client
    assert http.get("/health").json() == {"ready": True}
    assert http.post("/classify", content=b"no image").status_code == 400
    assert http.post("/classify", content=b"\0" * (server.MAX_BYTES + 1)).status_code == 413
