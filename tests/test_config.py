"""One definition for flags and YAML; what is wrong is named."""

from pathlib import Path

import pytest

from depthfuse.config import PruneConfig, from_dict, load_yaml, parse_model_kwargs, to_dict, to_yaml
from depthfuse.errors import ConfigError, SpecError
from depthfuse.spec import ModelSource


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
        ("finetune: {hold_share: 2}", "config.yaml.finetune: hold_share is a share of the training"),
        ("[1, 2]", "expected a mapping"),
        ("[]", "expected a mapping"),
        ("0", "expected a mapping"),
        ("false", "expected a mapping"),
        ("1: 2\nmodel: resnet18\nnull: 3", "unknown entries 1, None; known: model"),
        ("{[1]: 2}", "cannot read config"),
        ("seed: 2026-99-99", "cannot read config"),
        ("seed: 2026-01-01", "seed: expected int"),
        ("model: !!python/object/apply:os.getcwd []", "cannot read config"),
        ("model: !!binary aGVsbG8=", "model: expected str"),
        ("model: [resnet18]", "model: expected str"),
        ("finetune: {lr: .inf}", "cannot read config .*inf"),
        ("finetune: {lr: .nan}", "cannot read config .*nan"),
        ("seed: 0x" + "f" * 6000, "64 bits"),
        ("seed: " + "9" * 6000, "cannot read config"),
        ("baseline: 0x" + "f" * 6000, "64 bits"),
        ('out: "a\\0b"', "out: a NUL character"),
        ("seed: 1\nmodel: resnet18\nseed: 2", "an entry twice"),
        ("data: &d {img_size: 32}\nbaseline: *d", r"the alias \*d: write its value out"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]", "the alias"),
        ("model: " + "[" * 5000, "nested deeper than 16"),
        ("{a: " * 5000, "nested deeper than 16"),
        ("# " + "x" * 70_000, "too large"),
        ("--- {}\n--- {}", "cannot read config"),
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


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("model: resnet18".encode("utf-16"), "save it as UTF-8"),
        ("model: résnet".encode("latin-1"), "save it as UTF-8"),
        (b"model: res\0net", "cannot read config"),
        (b"\0" * 100, "cannot read config"),
        (b"\xff" * 100, "save it as UTF-8"),
    ],
)
def test_other_encodings_are_named(tmp_path, data, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        load_yaml(path)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xef\xbb\xbfmodel: resnet50")
    assert load_yaml(tmp_path / "config.yaml").model == "resnet50"


def test_a_resolved_config_has_to_be_complete(tmp_path):
    path = tmp_path / "config.yaml"
    text = to_yaml(PruneConfig())
    path.write_text(text)
    assert load_yaml(path, complete=True) == PruneConfig()
    for part, message in [
        (text[: text.index("seed:")], "config.yaml: lacks seed, amp, cpu, checkpoint_seconds"),
        (text.replace("  temperature: 2.0\n", ""), "config.yaml.finetune: lacks temperature"),
        (text.replace("  batch_size: 128\n", ""), "config.yaml.data: lacks batch_size"),
        ("", "lacks model"),
    ]:
        path.write_text(part)
        with pytest.raises(ConfigError, match=message):
            load_yaml(path, complete=True)


def test_entries_that_came_later_may_be_missing(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        to_yaml(PruneConfig()).replace("  batch_size: null\n", "").replace("  finalists: 1\n", "")
    )
    assert load_yaml(path, complete=True) == PruneConfig()


def test_a_model_argument_that_is_no_value_costs_no_time():
    for text in ("-" * 1900 + "1", "(" * 1900, "[" * 150 + "]" * 150):
        with pytest.raises((ConfigError, SpecError)):
            ModelSource.make("resnet18", **parse_model_kwargs([f"channels={text}"]))
    with pytest.raises(ConfigError, match="name=value"):
        parse_model_kwargs(["channels=" + "(" * 10_000])


def test_model_kwargs():
    assert parse_model_kwargs(["img_size=32", "channels=(1,2)", "act_layer=silu", "x=True"]) == {
        "img_size": 32,
        "channels": (1, 2),
        "act_layer": "silu",
        "x": True,
    }
    with pytest.raises(ConfigError, match="name=value, got 'img_size'"):
        parse_model_kwargs(["img_size"])
