"""Nothing that a file says makes timm read another file: only plain arguments of a list pass, by whatever road."""

import json
import pickle
import re

import pytest
import timm
import torch

from depthfuse import ModelSource, load, load_accelerated
from depthfuse.acceleration.saving.saved import FORMAT
from depthfuse.architecture import _KEYWORDS, allow_keywords
from depthfuse.checkpoint import save_tensors
from depthfuse.cli import main
from depthfuse.errors import DepthfuseError, SpecError
from depthfuse.shapes import bytes_of_model
from depthfuse.spec import SubnetSpec


class Intruder:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def intruder(tmp_path):
    """(a pickle, the file that appears once it is unpickled)"""
    marker, path = tmp_path / "marker", tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"state_dict": Intruder(marker)}))
    pickle.loads(path.read_bytes())
    assert marker.exists()
    marker.unlink()
    return path, marker


def load_run(folder, arguments):
    """`depthfuse.load` of a folder whose spec names the arguments."""
    spec = {"format": "depthfuse.subnet/1", "model": "test_resnet", "model_kwargs": arguments, "choices": []}
    (folder / "subnet.json").write_text(json.dumps(spec))
    save_tensors(folder / "merged.safetensors", {"x": torch.zeros(1)})
    load(folder)


def load_plan(folder, arguments):
    """`load_accelerated` of a file whose source names the arguments."""
    document = {
        "dtype": "torch.float32",
        "in_channels": 3,
        "source": {"name": "test_resnet", "arguments": list(arguments.items())},
        "plan": {"source": "", "inside": {}},
    }
    save_tensors(folder / "fast.safetensors", {}, {"format": FORMAT, "document": json.dumps(document)})
    load_accelerated(folder / "fast.safetensors")


def prune_config(folder, arguments):
    """`depthfuse prune --config` of a file that names the arguments."""
    pairs = [f"{name}={value!r}" for name, value in arguments.items()]
    config = {"model": "test_resnet", "model_kwargs": pairs, "cpu": True, "out": str(folder / "out")}
    (folder / "config.yaml").write_text(json.dumps(config | {"search": {"blocks": 1}}))
    assert main(["prune", "--config", str(folder / "config.yaml")]) == 1
    raise SpecError("shown")  # as one line


ROADS = (load_run, load_plan, prune_config)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("keyword", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"])
def test_a_pickle_that_a_file_names_is_not_read(road, keyword, intruder, tmp_path, capsys):
    path, marker = intruder
    value = str(path) if keyword == "checkpoint_path" else {"file": str(path)}
    arguments = {keyword: value} if keyword == "checkpoint_path" else {keyword: value, "pretrained": True}
    with pytest.raises(DepthfuseError) as error:
        road(tmp_path, arguments)
    assert not marker.exists()
    assert f"'{keyword}' is refused" in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "keyword",
    [
        *("pretrained", "cache_dir", "device", "dtype", "scriptable", "exportable", "no_jit", "feature_cls"),
        *("pruned", "cfg", "block", "block_fn", "attn_layer", "lambda", "", "name", "cls", "self", "colour"),
        *(1, None, ("a",)),
    ],
)
def test_keywords_that_are_not_in_the_list_are_refused(keyword):
    assert keyword not in _KEYWORDS
    with pytest.raises(SpecError, match="is refused.*in_chans.*allow_keywords"):
        ModelSource.of_document("resnet18", {keyword: True})
    if keyword in ("pretrained", "cache_dir", "cfg", "lambda x", ""):
        with pytest.raises(SpecError, match="can never be allowed"):
            allow_keywords(keyword)


def test_further_keywords_are_allowed_by_code(monkeypatch):
    monkeypatch.setattr("depthfuse.architecture._KEYWORDS", dict(_KEYWORDS))
    with pytest.raises(SpecError, match="'block_args' is refused"):
        ModelSource.make("resnet18", block_args=True)
    allow_keywords("block_args", at_most=3)
    assert ModelSource.make("resnet18", block_args=3).kwargs == {"block_args": 3}
    with pytest.raises(SpecError, match="numbers up to 3"):
        ModelSource.make("resnet18", block_args=4)


@pytest.mark.parametrize(
    "name",
    [
        *("hf-hub:timm/resnet18", "local-dir:/tmp", "hf_hub:a/b", "/tmp/x", "a/b", "../resnet18", "", " "),
        *("resnet18\0", "resnet18\n", None, 3, ["resnet18"], "resnet18.a1_in1k.b"),
    ],
)
def test_only_names_of_known_forms_are_models(name):
    with pytest.raises(SpecError, match="names no model: expected a name of timm's own list"):
        ModelSource.of_document(name, {}).build()


def test_tags_of_weights_are_names_too():
    ModelSource.make("resnet18.a1_in1k", channels=(8, 8, 8, 8)).build()


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("embed_dim", 10**9),
        ("embed_dim", -(10**9)),
        ("depth", 10**7),
        ("depths", [200, 200, 200, 200]),
        ("channels", [float("nan")]),
        ("channels", [1e308] * 4),
        ("channels", [8] * 1000),
        ("channels", [[[[8]]]]),
        ("channels", {"a": 8}),
        ("channels", 10**400),
        ("act_layer", "os.system('true')"),
        ("act_layer", "a" * 65),
        ("act_layer", print),
        ("drop_rate", 2.0),
    ],
)
def test_values_are_plain_and_bounded(keyword, value):
    with pytest.raises(SpecError, match=f"the model argument {keyword}"):
        ModelSource.of_document("resnet18", {keyword: value})


def test_lists_become_tuples_at_every_depth():
    source = ModelSource.make("resnet18", layers=[1, [2, 3]], channels=(1, 2))
    assert source.kwargs == {"channels": (1, 2), "layers": (1, (2, 3))}
    assert source == SubnetSpec.from_json(SubnetSpec(source).to_json()).source
    assert len({source, ModelSource.make("resnet18", channels=(1, 2), layers=(1, (2, 3)))}) == 1


def test_a_model_larger_than_the_machine_is_weighed_and_not_built(monkeypatch):
    built = []
    real = timm.create_model

    def create(name, **arguments):
        model = real(name, **arguments)
        built.append(all(p.is_meta for p in model.parameters()))
        return model

    monkeypatch.setattr(timm, "create_model", create)
    source = ModelSource.make("vit_base_patch16_224", embed_dim=2**16, depth=120, num_heads=16)
    with pytest.raises(SpecError, match=r"takes [\d,]+ MB, where [\d,]+ MB are the most"):
        source.build()
    assert built == [True]


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet", "test_nfnet"]
)
def test_weighing_moves_no_random_state_and_is_right(name):
    source = ModelSource.make(name)
    state = torch.get_rng_state()
    size = bytes_of_model(source.build_shapes())
    assert torch.equal(state, torch.get_rng_state())
    assert size == bytes_of_model(source.build())


def test_what_timm_makes_of_bad_arguments_is_one_error():
    for name, arguments in [
        ("resnet18", {"layers": 3}),
        ("resnet18", {"act_layer": "nonsense"}),
        ("resnet18", {"channels": []}),
        ("vit_tiny_patch16_224", {"num_heads": 0}),
        ("vit_tiny_patch16_224", {"patch_size": "x"}),
        ("vit_tiny_patch16_224", {"global_pool": "nonsense"}),
        ("resnet18", {"output_stride": -1}),
        ("resnet18", {"in_chans": -3}),
    ]:
        with pytest.raises(SpecError, match=re.escape(f"for '{name}'")):
            ModelSource.make(name, **arguments).build()
