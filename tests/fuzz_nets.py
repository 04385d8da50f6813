"""Small networks drawn from a grammar of layers, in-place operations, residuals, reshapes, branches and containers."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 8  # channels, always: so that any two values of one rank and side can be added
SIDE = 8

Pair = namedtuple("Pair", ["scores", "features"])


@dataclass
class Result:
    scores: Tensor
    features: Tensor | None = None


ACTIVATIONS = {
    "relu": F.relu,
    "relu_": torch.relu_,
    "relu6": F.relu6,
    "silu_": lambda x: F.silu(x, inplace=True),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "leaky_": lambda x: F.leaky_relu(x, 0.1, inplace=True),
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "x_sigmoid": lambda x: x * torch.sigmoid(x),
    "clamp_": lambda x: x.clamp_(-1, 2),
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
}

# Of one value [N, WIDTH, H, W] another.
IMAGE_STEPS = {
    "conv3": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
    "conv1": lambda: nn.Conv2d(WIDTH, WIDTH, 1, bias=False),
    "conv_same": lambda: nn.Conv2d(WIDTH, WIDTH, (3, 1), padding="same", dilation=2),
    "conv_reflect": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect"),
    "depthwise": lambda: nn.Conv2d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH),
    "grouped": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2),
    "norm": lambda: nn.BatchNorm2d(WIDTH),
    "norm_plain": lambda: nn.BatchNorm2d(WIDTH, affine=False, eps=1e-3),
    "group_norm": lambda: nn.GroupNorm(2, WIDTH),
    "instance_norm": lambda: nn.InstanceNorm2d(WIDTH, affine=True),
    "dropout": lambda: nn.Dropout(0.5),
    "max_pool": lambda: nn.MaxPool2d(3, 1, 1),
    "avg_pool": lambda: nn.AvgPool2d(3, 1, 1),
    "sequential": lambda: nn.Sequential(
        nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)
    ),
    "up_down": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 3, 2, 1)),
    "wide": lambda: nn.Sequential(nn.Conv2d(WIDTH, 20, 1), nn.ReLU6(), nn.Conv2d(20, WIDTH, 1)),
    "transposed": lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1),
}
# Of one value [N, T, WIDTH] another.
TOKEN_STEPS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "mlp": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH)),
    "attention": lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True),
    "qkv": lambda: nn.Linear(WIDTH, 3 * WIDTH),
    "apart": lambda: nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)]),
    "rows_norm": lambda: nn.BatchNorm1d(WIDTH),
    "conv1d": lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
}
# Without weights, of any value.
ANY_STEPS = (
    *(f"act:{name}" for name in ACTIVATIONS),
    *(
        "save",
        "add",
        "add_",
        "add_into_saved",
        "mul",
        "cat_halves",
        "scale",
        "scale_",
        "number",
        "alias_",
        "slice_",
    ),
    *("view_back", "if_many", "if_large", "again", "flip", "softmax", "detach_clone", "where", "to_double"),
)


class Drawn(nn.Module):
    """A stem, `steps` by name, and a head. The steps run in Python, as a user's would."""

    def __init__(self, image_steps: list[str], token_steps: list[str], container: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image_steps, self.token_steps, self.container = image_steps, token_steps, container
        self.stem = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.layers = nn.ModuleDict()
        for name in (*image_steps, *token_steps):
            make = IMAGE_STEPS.get(name) or TOKEN_STEPS.get(name)
            if make is not None and name not in self.layers:  # twice by name is twice the same layer
                self.layers[name] = make()
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.head = nn.Linear(WIDTH, 4)
        for layer in self.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
                layer.running_mean.normal_(std=0.3)
                layer.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor, sharp: bool = False):
        y = self.stem(x)
        saved = y
        for name in self.image_steps:
            y, saved = self._step(name, y, saved, -3)
        if self.token_steps:
            y = y.flatten(2).transpose(1, 2)
            saved = y
            for name in self.token_steps:
                y, saved = self._step(name, y, saved, -1)
            features = y.mean(1)
        else:
            features = y.mean((2, 3))
        scores = self.head(features)
        if sharp:
            scores = scores * 2
        return self._contain(scores, features)

    def _contain(self, scores: Tensor, features: Tensor):
        return {
            "tensor": scores,
            "tuple": (scores, features),
            "dict": {"scores": scores, "more": [features, None, 3]},
            "list": [scores, (features, scores)],
            "pair": Pair(scores, features),
            "result": Result(scores, features),
        }[self.container]

    def _step(self, name: str, y: Tensor, saved: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        gain = self.gain.view(-1, *[1] * (-axis - 1))
        if name in self.layers:
            return self._layer(name, y), saved
        if name.startswith("act:"):
            return ACTIVATIONS[name[4:]](y), saved
        if name == "save":
            return y, y
        if name == "add":
            return y + saved if y.shape == saved.shape else y, saved
        if name == "add_":
            y += saved
            return y, saved
        if name == "add_into_saved":
            saved = saved.clone()
            saved.add_(y, alpha=0.5)
            return saved, saved
        if name == "mul":
            return y * saved.sigmoid(), saved
        if name == "cat_halves":
            first, second = y.chunk(2, axis)
            return torch.cat([second, first], axis), saved
        if name == "scale":
            return gain * y, saved
        if name == "scale_":
            return y.mul_(gain), saved
        if name == "number":
            return 0.75 * y - 0.5, saved
        if name == "alias_":
            alias = y.transpose(0, 1)[1:]
            alias.mul_(0.5)
            return y, saved  # has changed
        if name == "slice_":
            y = y.clone()
            y[:, :2] += 1
            return y, saved
        if name == "view_back":
            return y.reshape(y.shape[0], -1).reshape(y.shape), saved
        if name == "if_many":
            return (y * 1.5 if y.shape[0] > 2 else y), saved
        if name == "if_large":
            return (y + 0.1 if y.shape[-1] >= WIDTH else y), saved
        if name == "again":
            return self.layers[next(iter(self.layers))](
                y
            ) if y.dim() == 4 and self._first_is_image() else y, saved
        if name == "flip":
            return y.flip(1), saved
        if name == "softmax":
            return y.softmax(axis), saved
        if name == "detach_clone":
            return y.detach().clone(), saved
        if name == "where":
            return torch.where(y > saved, y, saved), saved
        assert name == "to_double"
        return (y.double() * 1.25).to(y.dtype), saved

    def _first_is_image(self) -> bool:
        return next(iter(self.layers), "") in IMAGE_STEPS

    def _layer(self, name: str, y: Tensor) -> Tensor:
        layer = self.layers[name]
        if name == "attention":
            return layer(y, y, y, need_weights=False)[0]
        if name in ("qkv", "apart"):

            def split(t):
                return t.reshape(*t.shape[:2], 2, WIDTH // 2).transpose(1, 2)

            parts = layer(y).chunk(3, -1) if name == "qkv" else [each(y) for each in layer]
            return F.scaled_dot_product_attention(*map(split, parts)).transpose(1, 2).reshape(y.shape)
        if name == "rows_norm":
            return layer(y.reshape(-1, WIDTH)).view(y.shape)
        if name == "conv1d":
            return layer(y.transpose(1, 2)).transpose(1, 2)
        return layer(y)


@st.composite
def nets(draw) -> Drawn:
    """One net, in evaluation mode."""
    image_steps = draw(st.lists(st.sampled_from([*IMAGE_STEPS, *ANY_STEPS]), min_size=1, max_size=5))
    token_steps = draw(st.lists(st.sampled_from([*TOKEN_STEPS, *ANY_STEPS]), max_size=3))
    container = draw(st.sampled_from(["tensor", "tuple", "dict", "list", "pair", "result"]))
    return Drawn(image_steps, token_steps, container, draw(st.integers(0, 9))).eval()
