"""One definition for flags and YAML; what is wrong is named."""

from pathlib import Path

import pytest

from depthfuse.config import PruneConfig, from_dict, load_yaml, parse_model_kwargs, to_dict, to_yaml
from depthfuse.errors import ConfigError


def test_yaml_round_trip_is_exact(tmp_path):
    config = PruneConfig(
        model="resnet18", model_kwargs=("channels=(8,16)",), weights=Path("a/b.safetensors"), seed=3
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_yaml(path) == config
    assert from_dict(PruneConfig, to_dict(config)) == config


def test_entries_that_a_file_does_not_name_keep_their_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: deit_tiny_patch16_224\nfinetune: {epochs: 7, lr: 1}\n")
    config = load_yaml(path)
    assert config.finetune.epochs == 7 and config.finetune.lr == 1.0 and isinstance(config.finetune.lr, float)
    assert config.finetune.lambda_share == PruneConfig().finetune.lambda_share


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: resnet18", "unknown entries modle"),
        ("finetune: {epoch: 1}", r"finetune: unknown entries epoch; known: epochs"),
        ("finetune: {epochs: many}", r"finetune.epochs: expected int, got 'many'"),
        ("finetune: {epochs: true}", r"finetune.epochs: expected int, got True"),
        ("finetune: {lambda_schedule: square}", r"expected 'linear' or 'cosine' or 'none', got 'square'"),
        ("search: {blocks: 1.5}", r"search.blocks: expected int, got 1.5"),
        ("[1, 2]", "expected a mapping"),
        ("a: [", "cannot read config"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_yaml(path)
    with pytest.raises(ConfigError, match="cannot read config"):
        load_yaml(tmp_path / "missing.yaml")


def test_model_kwargs():
    assert parse_model_kwargs(["img_size=32", "channels=(1,2)", "act_layer=silu", "x=True"]) == {
        "img_size": 32,
        "channels": (1, 2),
        "act_layer": "silu",
        "x": True,
    }
    with pytest.raises(ConfigError, match="name=value, got 'img_size'"):
        parse_model_kwargs(["img_size"])
