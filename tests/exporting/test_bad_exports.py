"""What cannot be exported is named, and leaves no file; an earlier one stays as it was."""

import errno
import importlib.util
import os
from dataclasses import replace

import pytest
import torch
from exporting.test_export import Small, images, installed, small
from nets import build
from torch import nn

from depthfuse import Supernet, accelerate, export
from depthfuse.errors import ExportError
from depthfuse.exporting import RUNTIMES, runtimes
from depthfuse.exporting.checking import compare, other_calls
from depthfuse.exporting.subject import subject_of


@pytest.fixture
def kept(tmp_path):
    """An earlier file; nothing else is there after the test."""
    path = tmp_path / "net.pt2"
    path.write_text("an earlier one")
    yield path
    assert path.read_text() == "an earlier one" and list(tmp_path.iterdir()) == [path]


def patched(monkeypatch, **changes):
    monkeypatch.setitem(RUNTIMES, "torch", replace(RUNTIMES["torch"], **changes))


@pytest.fixture(scope="module")
def subject():
    return subject_of(small(), images(), None, "batch", on_cpu=True)


def compared(subject, run):
    with torch.no_grad():
        calls = other_calls(subject, None)
        return compare(subject, lambda path: run, None, calls, 20, "It")


WRONG = {
    "value": (lambda y: [y * 1.0001], "it is off by 1.0e-04 of the largest output, where rounding explains"),
    "inf": (lambda y: [y / 0], "gives something else than Small on .*: it is off by inf"),
    "nan": (lambda y: [torch.full_like(y, torch.nan)], "is off by inf"),
    "dtype": (lambda y: [y.double()], "gives .*float64.* where Small gives .*float32"),
    "shape": (lambda y: [y[:1]], "gives .* where Small gives"),
    "number": (lambda y: [y, y], "gives .* where Small gives"),
    "raises": (lambda y: y.no_such, "It cannot run the file on .*'no_such'; with check=False"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_differs_is_named(kind, subject):
    wrong, said = WRONG[kind]
    with pytest.raises(ExportError, match=said):
        compared(subject, lambda x: wrong(subject.model(x)))


def test_a_right_one_passes(subject):
    """With as much rounding as a model of twenty operations may show."""
    assert 5e-7 < compared(subject, lambda x: [subject.model(x) * (1 + 1e-6)]).error < 2e-6


def test_a_file_that_differs_is_not_left(kept, monkeypatch):
    model = small()
    patched(monkeypatch, run=lambda path: lambda x: [model(x) * 1.0001])
    with torch.no_grad(), pytest.raises(ExportError, match="torch.export gives something else"):
        export(model, images(), kept, "torch")


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cut_short(program, subject, facts, path):
    path.write_bytes(b"half of it")
    return full()


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_full_disk(failing, kept, monkeypatch):
    if failing == "write":
        patched(monkeypatch, write=cut_short)
    else:
        monkeypatch.setattr(os, failing, full)
    with pytest.raises(ExportError, match=f"cannot write {kept}: No space left on device"):
        export(small(), images(), kept, "torch")


def test_two_files_come_together_or_not_at_all(tmp_path, monkeypatch):
    """The first of several is never beside one of another export."""

    def write(program, subject, facts, path):
        for part in (path, path.with_suffix(".bin")):
            part.write_text(f"{part.suffix} {subject.call.shapes()[0][0]}")
        return [path, path.with_suffix(".bin")]

    patched(monkeypatch, write=write)
    path = tmp_path / "net.pt2"
    for batch in (2, 3):
        export(small(), images(batch), path, "torch", check=False)
        assert sorted(each.read_text() for each in tmp_path.iterdir()) == [f".bin {batch}", f".pt2 {batch}"]
    moved, move = [], os.replace

    def stops(source, target):
        moved.append(target)
        if len(moved) == 2:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", stops)
    with pytest.raises(KeyboardInterrupt):
        export(small(), images(4), path, "torch", check=False)
    assert [each.name for each in tmp_path.iterdir()] == ["net.bin"]


def test_stopped_by_hand(kept, monkeypatch):
    def stopped(path):
        raise KeyboardInterrupt

    patched(monkeypatch, run=stopped)
    with pytest.raises(KeyboardInterrupt):
        export(small(), images(), kept, "torch")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("onnx", 'pip install "depthfuse[onnx]"'),
        ("openvino", 'pip install "depthfuse[openvino]"'),
        ("executorch", 'pip install "depthfuse[executorch]"'),
        ("tensorrt", 'pip install "depthfuse[onnx]"'),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(name, command, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ExportError) as caught:
        export(small(), images(), tmp_path / f"net{RUNTIMES[name].suffix}", name)
    assert command in str(caught.value) and not list(tmp_path.iterdir())


def test_a_missing_compiler_is_named(kept, monkeypatch):
    monkeypatch.setattr(runtimes.shutil, "which", lambda name: None)
    with pytest.raises(ExportError, match="neither g\\+\\+ nor clang"):
        export(small(), images(), kept, "aoti")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"to": "tflite"}, "to is 'tflite', expected one of 'onnx', 'openvino'"),
        ({"to": "onnx"}, "does not end in .onnx"),
        ({"dynamic": True}, "dynamic is True, expected one of 'batch', 'sizes', 'none'"),
        ({"largest_batch": 1}, "largest_batch is 1, expected 2 or more"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings, said, kept):
    with pytest.raises(ValueError, match=said):
        export(small(), images(), **{"path": kept, "to": "torch", **settings})


class Fixed(Small):
    """Two images, no more and no fewer."""

    def forward(self, image):
        return super().forward(image.reshape(2, 3, 13, 13))


class Numbers(Small):
    def forward(self, image):
        return super().forward(image), image.shape[0]


def test_models_that_cannot_be_exported(kept):
    def fails(model, said, x=None, **settings):
        with pytest.raises(ExportError, match=said):
            export(model, images(2) if x is None else x, kept, "torch", **settings)

    fails(small().train(), "in training mode .*: call model.eval")
    fails(Supernet(build("resnet")[0]).eval(), "export depthfuse.merge")
    fails(nn.ReLU().eval(), "ReLU has no weights")
    fails(Fixed().eval(), "Fixed does not take .*float32.3, 3, 13, 13.* dynamic='none'")
    fails(
        small(),
        "the example has 3 images, and the largest batch is 2: give fewer",
        x=images(3),
        largest_batch=2,
    )
    fails(Numbers().eval(), "returns a .* as output_1, and files give tensors alone")
    fails(small(), "does not take the example", x=(images(), images()))
    fails(small(), "mean has 1 entries, and the model has 3 channels", mean=(0.5,))
    fails(small(), "classes has 2 entries, and the model has 5 outputs", classes=("a", "b"))
    with pytest.raises(ExportError, match="Small has no pretrained_cfg"):
        export(small(), None, kept, "torch")
    vit, size = build("vit")
    fails(vit, "takes a height of 24 only .* dynamic='batch'", x=torch.randn(2, *size), dynamic="sizes")
    fast = accelerate(small(), images(2), tune="off", dynamic=False)
    fast.save(kept.with_name("fast.safetensors"))
    fails(kept.with_name("fast.safetensors"), "takes a batch of 2 only", x=images(2))
    kept.with_name("fast.safetensors").unlink()


class Odd(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3), function

    def forward(self, x):
        return self.function(self.conv(x))


def test_operators_that_a_runtime_does_not_know(tmp_path):
    installed("onnx")

    def fails(function, name, said, **settings):
        with pytest.raises(ExportError, match=said):
            export(Odd(function).eval(), images(), tmp_path / "net.onnx", name, **settings)
        assert not list(tmp_path.iterdir())

    fails(torch.special.airy_ai, "onnx", "ONNX Runtime does not take Odd: .*airy_ai")
    fails(torch.det, "tensorrt", "TensorRT does not read the operator Det")
    fails(nn.functional.mish, "migraphx", "MIGraphX does not read")


def test_a_dynamic_axis_that_a_runtime_cannot_take(tmp_path):
    installed("onnx")
    model, size = build("vit")
    path = tmp_path / "net.onnx"
    with pytest.raises(ExportError, match="MIGraphX does not read Expand .*: export with dynamic='none'"):
        export(model, torch.randn(1, *size), path, "migraphx")
    assert not list(tmp_path.iterdir())
    assert export(model, torch.randn(1, *size), path, "migraphx", dynamic="none").comparison is not None
