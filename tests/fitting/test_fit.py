"""Fitting of whole supernets: every family, one block after another, the same bits."""

import pytest
import torch
from fitting_nets import FAMILIES, images, net_of

from depthfuse import Supernet, merge
from depthfuse.errors import FitError, SpecError
from depthfuse.fitting.fit import fit_candidates, fit_chosen
from depthfuse.fitting.fitted import Fitted, with_fitted


def error_of(supernet, path, name, x):
    seen = {}

    def keep(_block, _args, output):
        seen["y"] = output[0] if isinstance(output, tuple) else output

    handle = supernet.blocks[path].register_forward_hook(keep)
    supernet.set_choices({})
    supernet(x)
    wanted = seen["y"]
    supernet.set_choices({path: name})
    supernet(x)
    handle.remove()
    return float((seen["y"] - wanted).square().sum() / (wanted - wanted.mean()).square().sum())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_candidate_comes_nearer_to_its_block(name):
    net, size = net_of(name)
    supernet = with_fitted(Supernet(net)).eval()
    (x,) = images(size, 1, seed=9)
    options = supernet.options()
    before = {
        (path, name): error_of(supernet, path, name, x) for path, names in options.items() for name in names
    }
    lost = fit_candidates(supernet, images(size))
    assert lost
    for path, names in options.items():
        for name in names:
            after = error_of(supernet, path, name, x)
            if name in lost[path]:
                assert after < 0.9 * before[path, name] + 1e-3, (path, name)
                assert after < 1.05 or name in ("compact", "identity"), (path, name)
            else:  # nothing to fit: dropped blocks
                assert after == before[path, name]


@pytest.mark.parametrize("name", ["mobilenetv2_035", "deit_tiny_patch16_224"])
@torch.no_grad()
def test_later_blocks_make_up_for_what_earlier_ones_lose(name):
    net, size = net_of(name)
    options = Supernet(net).options()
    choices = {path: next(n for n in names if n != "drop") for path, names in list(options.items())[1:4]}
    last = list(choices)[-1]

    def error(supernet):
        supernet.set_choices({})
        outputs = []
        handle = supernet.blocks[last].register_forward_hook(lambda _m, _a, y: outputs.append(y))
        for choice in ({}, choices):
            supernet.set_choices(choice)
            supernet(x)
        handle.remove()
        return float((outputs[1] - outputs[0]).square().mean())

    x = torch.cat(images(size))
    alone, after = (with_fitted(Supernet(net)).eval() for _ in range(2))
    fit_candidates(alone, images(size))
    after.set_choices(choices)
    lost = fit_chosen(after, images(size))
    assert list(lost) == list(choices)
    assert after.choices() == alone.choices() | choices
    assert error(after) < error(alone)


@torch.no_grad()
def test_the_same_bits_and_an_exact_merge():
    net, size = net_of("mobilenetv2_035")
    states = []
    for _ in range(2):
        supernet = with_fitted(Supernet(net))
        fit_candidates(supernet, images(size), {"blocks.2.1": ["compact", "drop"]})
        states.append(supernet.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    supernet.set_choices({"blocks.2.1": "compact"})
    merged = merge(supernet.eval(), (3, size, size))
    assert merged.merge_report.output < 1e-12
    assert not any(isinstance(m, Fitted) for m in merged.modules())


def test_the_original_net_is_left_alone():
    net, size = net_of("resnet18")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    supernet = with_fitted(Supernet(net))
    fit_candidates(supernet, images(size), {"layer2.1": ["compact"]})
    x = images(size, 1)[0]
    supernet.set_choices({})
    with torch.no_grad():
        assert torch.equal(supernet(x), net(x))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_at_lambda_one_a_fitted_block_is_the_original():
    net, size = net_of("resnet18")
    supernet = with_fitted(Supernet(net)).eval()
    x = images(size, 1)[0]
    with torch.no_grad():
        wanted = net(x)
        supernet.set_choices({"layer2.1": "compact"}, lam=1.0)
        assert torch.equal(supernet(x), wanted)
        supernet.set_lambda(0.5)
        half = supernet(x)
        supernet.set_lambda(0.0)
        assert not torch.equal(half, wanted) and not torch.equal(half, supernet(x))


def test_what_cannot_be_fitted_is_said(caplog):
    net, size = net_of("resnet18")
    supernet = Supernet(net)
    with pytest.raises(FitError, match="with_fitted"):
        fit_candidates(supernet, images(size))
    with_fitted(supernet)
    with pytest.raises(SpecError, match="fitted already"):
        with_fitted(supernet)
    broken = [x * float("nan") for x in images(size)]
    with pytest.raises(FitError, match=r"block layer1\.0: .*finite"):
        fit_candidates(supernet, broken)


def test_fitted_blocks_of_the_same_layers_are_of_one_form():
    net, _ = net_of("resnet18")
    supernet = Supernet(net)
    assert all(len(set(forms.values())) == len(forms) for forms in supernet.forms().values())
    forms = with_fitted(supernet).forms()["layer2.1"]
    assert list(forms) == ["compact", "dense", "identity", "drop"]
    assert forms["compact"] == forms["identity"]  # a 3x3 each; the other is a 5x5
    assert len(set(forms.values())) == 3


def test_what_is_too_large_to_be_fitted_is_of_a_form_of_its_own(monkeypatch):
    net, _ = net_of("resnet18")
    monkeypatch.setattr("depthfuse.fitting.blocks.LARGEST_FEATURES", 9 * 12)
    forms = with_fitted(Supernet(net)).forms()
    assert len(set(forms["layer1.0"].values())) == 3  # it reads the stem's 64 channels
    assert len(set(forms["layer2.1"].values())) == 3  # 12 channels; one of the four candidates is a twin
