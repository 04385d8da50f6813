"""A log that each test leaves as it was, and a finished run whose nets nobody has trained."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from nets import randomise_norms

from depthfuse import ModelSource, PruneConfig, SubnetSpec, Supernet, merge
from depthfuse.checkpoint import save_json, save_tensors
from depthfuse.config import SearchConfig, to_yaml
from depthfuse.costs.prediction import predict_latencies
from depthfuse.data import DataConfig

# The command line alone needs tyro. A machine that tests its GPU may have torch, triton, timm and pytest, and no more.
if importlib.util.find_spec("tyro") is None:
    collect_ignore_glob = ["test_*.py"]

SIZE = (1, 28, 28)
NETS = ("baseline", "baseline accelerated", "pruned", "merged", "merged accelerated")


@pytest.fixture(autouse=True)
def restored(restored_logger):
    """Commands set the log up."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run with all that its stages leave, from random weights: `dir`, `results` and the `config` file."""
    folder = tmp_path_factory.mktemp("cli")
    out, config = folder / "run", folder / "config.yaml"
    settings = PruneConfig(
        model="resnet18",
        model_kwargs=("channels=(8,8,12,16)", "layers=(2,1,1,1)", "in_chans=1"),
        out=out,
        data=DataConfig(max_train_images=100, batch_size=50, holdout=0.2),
        search=SearchConfig(blocks=1),
        cpu=True,
    )
    torch.manual_seed(0)
    arguments = {"channels": (8, 8, 12, 16), "layers": (2, 1, 1, 1), "in_chans": 1, "num_classes": 10}
    source = ModelSource.make("resnet18", **arguments)
    model = source.build()
    spec = SubnetSpec.from_mapping(source, {"layer1.0": "compact"})
    supernet = randomise_norms(Supernet(model)).eval()
    table = predict_latencies(supernet, SIZE, "mi100", torch.float16)
    subnet = supernet.subnet(spec, lam=0.0)
    nets = {"baseline": model, "supernet": supernet, "finetune": subnet, "merged": merge(subnet.eval(), SIZE)}
    for name, net in nets.items():
        save_tensors(out / f"{name}.safetensors", net.state_dict())
    spec.save(out / "subnet.json")
    table.save(out / "latency.json")
    row = {"top1": 10.0, "parameters": 5, "macs": 6e6, "latency_ms": 1.0, "latency_quartiles_ms": [1.0, 1.0]}
    results = {
        "model": "resnet18",
        "conditions": table.conditions,
        "rows": [{"net": name, "speedup": 1.0, **row} for name in NETS],
        "choices": spec.mapping(),
        "blocks": supernet.options(),
    }
    save_json(out / "results.json", results)
    (out / "config.yaml").write_text(to_yaml(settings))
    config.write_text(to_yaml(settings))
    return SimpleNamespace(dir=out, config=config, results=results)
