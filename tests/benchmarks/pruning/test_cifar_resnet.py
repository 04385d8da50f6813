"""CIFAR's ResNets: depths and sizes of the paper, and published weights under the names that they have here."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.pruning import cifar_resnet
from depthfuse import Supernet
from depthfuse.errors import CheckpointError


@pytest.mark.parametrize(
    "make, layers, parameters", [(cifar_resnet.resnet20, 20, 269_722), (cifar_resnet.resnet56, 56, 853_018)]
)
def test_depth_and_size_are_the_papers(make, layers, parameters):
    net = make()
    weighty = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighty) == layers
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_a_shortcut_keeps_every_second_pixel_between_zeros():
    block = cifar_resnet.BasicBlock(16, 32, 2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 7, 6)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_all_blocks_can_be_pruned():
    options = Supernet(cifar_resnet.resnet20()).options()
    assert sorted(options) == [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]


def published(net):
    """As files of 2018 hold it: trained on several GPUs, and without counts of batches."""
    state = {f"module.{k}": v for k, v in net.state_dict().items() if "num_batches" not in k}
    return {"state_dict": state, "best_prec1": 91.7}


def test_published_weights_are_read(tmp_path, monkeypatch):
    net = cifar_resnet.resnet20()
    torch.save(published(net), tmp_path / "there.th")
    monkeypatch.setattr(
        "sys.argv", ["x", str(tmp_path / "there.th"), "--out", str(tmp_path / "w.safetensors")]
    )
    cifar_resnet.main()
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())


def test_other_files_are_refused(tmp_path, monkeypatch):
    state = published(cifar_resnet.resnet20())["state_dict"]
    with pytest.raises(CheckpointError, match=r"linear\.bias"):
        cifar_resnet.renamed({k: v for k, v in state.items() if "linear.bias" not in k})
    with pytest.raises(CheckpointError, match=r"linear\.weight is \[100, 64\], expected \[10, 64\]"):
        cifar_resnet.renamed(state | {"module.linear.weight": torch.zeros(100, 64)})
    (tmp_path / "page.th").write_text("<html>")
    monkeypatch.setattr(
        "sys.argv", ["x", str(tmp_path / "page.th"), "--out", str(tmp_path / "w.safetensors")]
    )
    with pytest.raises(CheckpointError, match=r"page\.th is no file with a state_dict"):
        cifar_resnet.main()
    assert not (tmp_path / "w.safetensors").exists()
