"""Networks by a grammar: what is found in them merges exactly, what is not says why, and what must not be never is."""

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from nets import randomise_norms
from torch import nn

from depthfuse import Supernet, merge
from depthfuse.errors import SpecError
from depthfuse.merging.adapters import find_blocks

SIZE = (3, 12, 14)
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "leaky": lambda: nn.LeakyReLU(0.2)}

# {what stands in the way of merging a block: a word of the reason that must be given}
OBSTACLES = {"a hidden reader": "keeps a value", "a gate": "gate", "a layer called twice": "called twice"}


class Block(nn.Module):
    """skip(x) + scale * branch(x), the branch one to three convolutions; `rule` says which, see `rules`."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.seen = rule, None
        width, out, stride = rule["width"], rule["out"], rule["stride"]
        count = len(rule["kernels"])
        channels = [width, *[rule["inner"]] * (count - 1), out]
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, kernel in enumerate(rule["kernels"]):
            groups = (
                rule["groups"] if channels[i] % rule["groups"] == channels[i + 1] % rule["groups"] == 0 else 1
            )
            step = stride if i == 0 else 1
            self.convs.append(
                nn.Conv2d(
                    channels[i], channels[i + 1], kernel, step, kernel // 2, groups=groups, bias=rule["bias"]
                )
            )
            norm = nn.BatchNorm2d if rule["norms"] else lambda _: nn.Identity()
            self.norms.append(norm(channels[i] if rule["pre"] else channels[i + 1]))
        self.act = ACTIVATIONS[rule["act"]]()
        self.scale = nn.Parameter(torch.rand(out, 1, 1) + 0.5) if rule["scaled"] else None
        self.gate = nn.Linear(width, out) if rule["obstacle"] == "a gate" else None
        self.skip = nn.Conv2d(width, out, 1, stride) if stride > 1 or width != out else None

    def forward(self, x):
        h, last = x, len(self.convs) - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if self.rule["pre"]:
                h = conv(self.act(norm(h)))
            else:
                h = norm(conv(h))
                h = h if i == last else self.act(h)
            if i == 0 and self.rule["obstacle"] == "a hidden reader":
                self.seen = h
        if self.rule["obstacle"] == "a layer called twice":
            h = self.convs[last](self.act(h))
        if self.scale is not None:
            h = h * self.scale
        if self.gate is not None:
            h = h * self.gate(x.mean((2, 3)))[:, :, None, None].sigmoid()
        y = h + (x if self.skip is None else self.skip(x))
        return y if self.rule["pre"] else self.act(y)


@st.composite
def rules(draw, width):
    obstacle = draw(st.sampled_from(["none", "none", "none", *OBSTACLES]))
    kernels = draw(st.lists(st.sampled_from([1, 3, 3, 5]), min_size=2, max_size=3))
    out, inner = draw(st.sampled_from([width, width, 4, 6])), draw(st.sampled_from([4, 6, 8]))
    if obstacle == "a layer called twice":
        inner = out  # so that its output fits its input
    return {
        "width": width, "out": out, "inner": inner, "kernels": kernels, "obstacle": obstacle,
        "stride": draw(st.sampled_from([1, 1, 2])),
        "groups": draw(st.sampled_from([1, 1, 2])),
        "bias": draw(st.booleans()), "norms": draw(st.booleans()), "pre": draw(st.booleans()),
        "act": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "scaled": draw(st.sampled_from([False, False, True])),
    }  # fmt: skip


@st.composite
def networks(draw):
    """(rules of the blocks in a row, whether the last block is one that runs twice, a seed for the weights)."""
    rows, width = [], 6
    for _ in range(draw(st.integers(2, 3))):
        rows.append(draw(rules(width)))
        width = rows[-1]["out"]
    twice = draw(st.booleans()) and rows[-1]["width"] == width
    return rows, twice, draw(st.integers(0, 2**16))


def network(rows, twice, seed):
    torch.manual_seed(seed)
    blocks = [Block(rule) for rule in rows]
    blocks += [blocks[-1]] * twice
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(rows[-1]["out"], 3)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Sequential(*blocks), *head)
    return randomise_norms(model).eval()


@settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(networks())
@torch.no_grad()
def test_what_is_found_is_exact_and_what_is_not_says_why(drawn):
    rows = drawn[0]
    model = network(*drawn)
    infos = {info.path: info for info in find_blocks(model)}
    for i, rule in enumerate(rows):
        info = infos.get(f"1.{i}") or infos["1"]  # a row of which nothing can be merged is told of as a whole
        assert info.candidates or info.reason
        if rule["obstacle"] != "none":
            assert not info.candidates
            assert info.path == "1" or OBSTACLES[rule["obstacle"]] in info.reason or rule["scaled"]
        event(f"{rule['obstacle']}, {'merged' if info.candidates else info.reason}")
    prunable = {path for path, info in infos.items() if info.candidates}
    if not prunable:
        with pytest.raises(SpecError, match="no block that can be pruned"):
            Supernet(model)
        return
    supernet = Supernet(model).eval()
    assert set(supernet.blocks) == prunable
    options = supernet.options()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    for candidate in dict.fromkeys(name for names in options.values() for name in names):
        chosen = {path: candidate for path, names in options.items() if candidate in names}
        supernet.set_choices(chosen)
        randomise_norms(supernet)
        report = merge(supernet, SIZE).merge_report
        assert {block.path for block in report.blocks} == set(chosen)
        assert report.output < 1e-10
        # once more without the merge's own check, at another size
        own = supernet.double()
        wanted, got = own(x), merge(own, SIZE)(x)
        assert (got - wanted).abs().max() <= 1e-10 * wanted.abs().max()
        supernet.float()
