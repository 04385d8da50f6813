"""Models whose parameters lie on two devices, or have no values."""

import pytest
import torch
from nets import build
from torch import nn

from depthfuse import Supernet, accelerate, merge
from depthfuse.errors import AccelerationError, MergeError, SpecError
from depthfuse.merging.model_inputs import check_one_device
from depthfuse.shapes import ShapesOnly


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()


X = torch.zeros(1, 3, 8, 8)


def test_one_device_is_enough():
    model = net()
    model.gate = nn.Parameter(torch.ones((), device="meta"))  # as one on the CPU beside a GPU's
    for good in (model, net().to("meta"), nn.ReLU()):
        check_one_device(good)
    check_one_device(model, MergeError, needs_values=True)


@pytest.mark.parametrize("moved", ["0", "3"])
def test_two_devices_are_named(moved):
    model = net()
    model.get_submodule(moved).to("meta")
    names = {"0": "0.weight on meta and 3.weight on cpu", "3": "0.weight on cpu and 3.weight on meta"}[moved]
    for error in (SpecError, MergeError, AccelerationError):
        with pytest.raises(
            error, match=f"Sequential lies on more than one device, {names}: .*load its weights"
        ):
            check_one_device(model, error)
    before = {name: value.device for name, value in model.state_dict().items()}
    with pytest.raises(AccelerationError, match=names):
        accelerate(model, X)
    assert {name: value.device for name, value in model.state_dict().items()} == before


def test_no_values_are_none():
    model = net().to("meta")
    for x in (X, X.to("meta")):
        with pytest.raises(AccelerationError, match="Sequential lies on meta: what is on meta has no values"):
            accelerate(model, x)


def test_two_of_several_devices(monkeypatch):
    """Devices that a machine without GPUs does not have."""
    model = net()
    for layer, device in ((model[0], "cuda:0"), (model[3], "cuda:1")):
        for parameter in layer.parameters():
            monkeypatch.setattr(parameter, "__class__", type("Placed", (nn.Parameter,), {"device": device}))
    with pytest.raises(SpecError, match=r"0.weight on cuda:0 and 3.weight on cuda:1: move all of it to one"):
        check_one_device(model)


def test_models_of_shapes_pass():
    with ShapesOnly():
        model = net()
        model.table = nn.Parameter(torch.linspace(0, 1, 3))  # with values, which timm's reads back
        check_one_device(model, needs_values=True)
    with pytest.raises(SpecError, match="more than one device"):
        check_one_device(model)


def test_supernets_and_merges_name_two_devices():
    model, size = build("resnet")
    supernet = Supernet(model).eval()
    supernet.set_choices({"layer1.0": "dense"})
    supernet.model.fc.to("meta")
    with pytest.raises(MergeError, match="conv1.weight on cpu and model.fc.weight on meta"):
        merge(supernet, size)
    for path in ("layer1.0.conv2", "fc"):
        model, _ = build("resnet")
        model.get_submodule(path).to("meta")
        with pytest.raises(SpecError, match=f"conv1.weight on cpu and {path}.weight on meta"):
            Supernet(model)
    supernet = Supernet(build("resnet")[0].to("meta")).eval()  # of shapes, to be loaded later
    with pytest.raises(MergeError, match="no values"):
        merge(supernet, size)
