"""The README's code for training loops that are not ours, run as it stands there, on small nets and few images, and the
flags of all its commands.
"""

import ast
import json
from types import SimpleNamespace

import pytest
import torch
from documents import README, ROOT, Block, blocks_of, check_flags, names
from nets import build
from torch import nn

import depthfuse
import depthfuse.training.schedule

PLAIN, TRAINER, LIGHTNING = blocks_of(README, "python", "Train it in your own loop")


def run(block: Block, **given: object) -> dict:
    left = {**names(), **given}
    block.run(left)
    return left


def batches(count: int, classes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(4, 3, 45, 45), torch.randint(classes, (4,))) for _ in range(count)]


def test_every_block_is_python():
    blocks = blocks_of(README, "python")
    assert len(blocks) > 4
    for block in blocks:
        ast.parse(block.code)


def test_every_command_is_understood(tmp_path, monkeypatch, restored_logger):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    commands = [command for block in blocks_of(README, "sh") for command in block.commands()]
    ours = [command for command in commands if command.startswith("depthfuse ")]
    assert len(ours) > 6
    for command in ours:
        check_flags(command, monkeypatch)


def test_export(tmp_path, monkeypatch):
    (block,) = blocks_of(README, "python", "Export")
    monkeypatch.chdir(tmp_path)
    model = build("resnet")[0]
    left = run(block, merged=model, x=torch.randn(1, 3, 224, 224))
    assert json.loads(left["facts"]["depthfuse"])["model"] == "resnet18" and left["logits"].shape == (5, 7)
    assert left["written"].comparison.error < 1e-5


def test_a_plain_loop(capsys):
    left = run(PLAIN, model=build("resnet")[0], loader=batches(3, 7), epochs=2)
    assert "layer1.0" in capsys.readouterr().out
    assert left["schedule"].done == 6 and left["schedule"].lam == 0.0
    report = left["merged"].merge_report
    assert [block.path for block in report.blocks] == ["layer1.0", "layer2.1"] and report.output < 1e-10


def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    options = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 3}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=3, **options)
    images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, use_cpu=True, disable_tqdm=True,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    left = run(TRAINER, transformers=transformers, model=model, images=images, training_arguments=arguments)
    assert left["trainer"].state.global_step == 4 and left["schedule"].lam == 0.0
    report = left["merged"].merge_report
    assert len(report.blocks) == 2 and report.output < 1e-10


class OwnTrainer:
    """The calls of Lightning's Trainer that the README's code needs; the real one is in training/test_schedule.py."""

    def __init__(self, max_epochs: int, callbacks: list):
        self.max_epochs, self.callbacks, self.global_step = max_epochs, callbacks, 0

    def fit(self, module: nn.Module, loader: list) -> None:
        self.estimated_stepping_batches = self.max_epochs * len(loader)
        optimizer = module.configure_optimizers()
        for callback in self.callbacks:
            callback.on_train_start(self, module)
        for batch in loader * self.max_epochs:
            for callback in self.callbacks:
                callback.on_train_batch_start(self, module, batch, 0)
            module.train().training_step(batch, 0).backward()
            optimizer.step()
            optimizer.zero_grad()
            self.global_step += 1
            for callback in self.callbacks:
                callback.on_train_batch_end(self, module, None, batch, 0)


def test_lightning(monkeypatch):
    double = SimpleNamespace(LightningModule=nn.Module, Trainer=OwnTrainer, Callback=object)
    monkeypatch.setattr(depthfuse.training.schedule, "_first_there", lambda *_: double)
    supernet = depthfuse.Supernet(build("resnet")[0])
    supernet.set_choices({"layer1.0": "dense"})
    subnet = supernet.subnet(supernet.spec())
    left = run(LIGHTNING, lightning=double, subnet=subnet, loader=batches(3, 7), epochs=2)
    assert left["schedule"].lam == 0.0 and left["merged"].merge_report.output < 1e-10
