"""Gates learn which blocks the net needs, and prune as many as the budget asks for."""

import pytest
import torch
from nets import build

from depthfuse import Supernet
from depthfuse.config import SearchConfig
from depthfuse.errors import BudgetError
from depthfuse.rivals.gates import FoldingObjective, GatedNet, TopGatesObjective
from depthfuse.searching.space import SearchSpace


@pytest.fixture(params=["resnet", "mobilenet", "convnext", "vit"])
def gated(request):
    model, size = build(request.param)
    supernet = Supernet(model)
    candidates = {path: names[0] for path, names in supernet.options().items()}
    return GatedNet(supernet, candidates), size


def space_of(net, blocks):
    options = {path: [name] for path, name in net.candidates.items()}
    return SearchSpace(options, SearchConfig(blocks=blocks))


def test_the_lowest_gates_are_pruned(gated):
    net, _ = gated
    with torch.no_grad():
        net.gates.copy_(torch.arange(len(net.gates)).flip(0))
    paths = list(net.candidates)
    assert list(net.pruned(space_of(net, 2))) == paths[-2:]
    assert list(net.pruned(space_of(net, len(paths)))) == paths


@torch.no_grad()
def test_gates_of_one_and_zero_are_the_two_blocks(gated):
    net, size = gated
    net.eval().double()
    x = torch.randn(2, *size, dtype=torch.float64)
    net.supernet.set_choices({})
    whole = net.supernet(x)
    assert (net(x) - whole).abs().max() <= 1e-10 * whole.abs().max()
    net.gates.zero_()
    mixed = net(x)
    net.supernet.set_choices(net.candidates)
    pruned = net.supernet(x)
    assert (mixed - pruned).abs().max() <= 1e-10 * pruned.abs().max()


@pytest.mark.parametrize("make", [lambda net: TopGatesObjective(net, space_of(net, 1)), FoldingObjective])
def test_every_gate_learns(gated, make):
    net, size = gated
    objective = make(net).train()
    loss = objective(torch.randn(4, *size), torch.randint(0, 7, (4,)), 0.5)
    loss.backward()
    assert net.gates.grad.isfinite().all() and (net.gates.grad != 0).all()
    assert "lam" not in "".join(net.state_dict())


def test_the_penalty_of_folding_draws_gates_to_zero():
    model, size = build("resnet")
    supernet = Supernet(model)
    net = GatedNet(supernet, {"layer1.0": "compact"}, gate=0.5)
    objective = FoldingObjective(net, penalty=1e4)
    objective(torch.randn(4, *size), torch.randint(0, 7, (4,)), 0.5).backward()
    assert net.gates.grad[0] > 0  # a step against the gradient lowers the gate
    with torch.no_grad():
        net.gates.fill_(1.7)
    objective(torch.randn(4, *size), torch.randint(0, 7, (4,)), 0.5)
    assert net.gates.tolist() == [1.0]


def test_a_budget_that_the_gates_cannot_reach_is_refused():
    net = GatedNet(Supernet(build("resnet")[0]), {"layer1.0": "compact"})
    options = net.supernet.options()
    with pytest.raises(BudgetError, match="the budget is not met"):
        net.pruned(SearchSpace(options, SearchConfig(blocks=3)))
