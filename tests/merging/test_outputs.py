"""Models that return more than logits: whatever holds the tensors is looked through, or refused by name."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from nets import build, random_subnet
from torch import nn

from depthfuse import Supernet, merge
from depthfuse.errors import MergeError
from depthfuse.merging.outputs import tensors_of

Pair = namedtuple("Pair", ["logits", "probabilities"])


@dataclass
class Result:
    logits: torch.Tensor
    hidden: tuple | None = None


class ModelOutput(OrderedDict):
    """As in transformers: a dictionary and a dataclass at once, without its entries that are None."""


class Unknown:
    def __init__(self, logits):
        self.logits = logits


class Returns(nn.Module):
    """A model inside another one."""

    def __init__(self, model, form):
        super().__init__()
        self.model, self.form = model, form

    def forward(self, x):
        return self.form(self.model(x))


FORMS = {
    "dictionary": lambda y: {"logits": y, "loss": None, "classes": y.argmax(-1)},
    "tuple": lambda y: (y, 3, "a name"),
    "list": lambda y: [y, y.softmax(-1)],
    "named tuple": lambda y: Pair(y, y.softmax(-1)),
    "dataclass": lambda y: Result(y, (y[:, :1], {"deep": [y > 0]})),
    "model output": lambda y: ModelOutput(logits=y),
    "number": lambda y: {"loss": float(y.sum()), "logits": y},
    "empty and infinite": lambda y: (y[:0], y.masked_fill(y > 0, float("-inf")), y.new_zeros(())),
    "rounded": lambda y: y.float(),
    "complex": lambda y: torch.fft.fft(y),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["mobilenet", "vit"])
@torch.no_grad()
def test_every_form_merges(family, form):
    model, size = build(family)
    model = Returns(model, FORMS[form]).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subnet = random_subnet(model).double()
    merged = merge(subnet, size)
    assert type(merged) is Returns
    x = torch.randn(2, *size, dtype=torch.float64)
    got, wanted = merged(x), subnet(x)
    assert type(got) is type(wanted)
    got, wanted = tensors_of(got), tensors_of(wanted)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (Unknown, r"the model returns a .*Unknown, in which .* expected tensors.* wrap the model"),
        (lambda y: {"all": [Unknown(y)]}, r"Unknown at \['all'\]\[0\]"),
        (lambda y: None, "returns a builtins.NoneType without a tensor"),
        (lambda y: {}, "returns a builtins.dict without a tensor"),
    ],
)
def test_others_are_refused_by_name(form, words):
    model, size = build("mobilenet")
    model = Returns(model, form).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subnet = random_subnet(model)
    kept = {name: value.clone() for name, value in subnet.state_dict().items()}
    with pytest.raises(MergeError, match=words):
        merge(subnet, size)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(kept[name], value) for name, value in subnet.state_dict().items())


def test_integers_that_change_are_a_change():
    """A difference of one class in a thousand is no small relative error."""
    model, size = build("resnet")

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            norms = sum(isinstance(m, nn.BatchNorm2d) for m in self.modules())
            return self.model(x), torch.tensor([10**12 + norms])

    subnet = random_subnet(Counts().eval())
    with pytest.raises(MergeError, match=r"merging changed the model by inf .* the model's output \[1\]"):
        merge(subnet, size)


def test_outputs_that_depend_on_what_blocks_are_made_of_are_refused():
    model, size = build("resnet")

    class Reads(nn.Module):
        def __init__(self, read):
            super().__init__()
            self.model, self.read = model, read

        def forward(self, x):
            return self.read(self.model, self.model(x))

    def raises(model, y):
        return y + (model.layer1[0].choice == "keep")

    def returns(model, y):
        return {f"of {type(model.layer1[0]).__name__}": y}

    for read, words in ((raises, "the merged model cannot run"), (returns, r"returns \['of MergedConv'\]")):
        supernet = Supernet(Reads(read)).eval()
        supernet.set_choices({"model.layer1.0": "compact"})
        with pytest.raises(MergeError, match=words):
            merge(supernet, size)
