"""lambda in loops that are not ours: a plain one that is killed, Hugging Face's Trainer, Lightning."""

import copy
import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from nets import build, random_subnet
from torch import nn

import depthfuse
from depthfuse import Schedule, Supernet, merge
from depthfuse.errors import ConfigError, MergeError, SpecError
from depthfuse.training.lambda_schedule import lambda_at

STEPS = 10


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def own_net():
    """A net as a user writes it, with no name by which it could be built again."""
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Residual(8), Residual(8), *head)


def own_subnet():
    supernet = Supernet(own_net())
    assert supernet.options() == {path: ["compact", "dense", "identity", "drop"] for path in ("1", "2")}
    supernet.set_choices({"1": "dense"})
    return supernet.subnet(supernet.spec())


def lambdas(subnet):
    return {block.lam for block in subnet.blocks.values() if block.choice != "keep"}


def images(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(8, 3, 12, 12, generator=generator), torch.randint(3, (8,), generator=generator)


def train(net, optimizer, schedule, first, last):
    """The plain loop; returns the lambda of each step."""
    net.train()
    seen = []
    for i in range(first, last):
        x, y = images(i)
        seen.append(lambdas(schedule.subnet))
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return seen


def test_a_subnet_without_a_search_and_without_an_origin():
    subnet = own_subnet()
    assert list(subnet.blocks) == ["1"] and subnet.choices() == {"1": "dense"}
    assert isinstance(subnet.model[2], Residual)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        subnet.set_lambda(1.0)
        assert torch.equal(subnet.eval()(x), own_net().eval()(x))


def test_the_same_for_torchvision():
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    supernet = Supernet(models.resnet18(num_classes=3))
    supernet.set_choices({"layer1.0": "dense"})
    subnet = supernet.subnet(supernet.spec()).eval()
    assert list(subnet.blocks) == ["layer1.0"]
    assert Schedule(subnet, 3).lam == 1.0
    subnet.set_lambda(0.0)
    assert merge(subnet, (3, 32, 32)).merge_report.output < 1e-10


@pytest.mark.parametrize("shape", ["cosine", "linear", "none"])
def test_a_plain_loop(shape):
    subnet = own_subnet()
    schedule = Schedule(subnet, steps=STEPS, shape=shape, share=0.5)
    optimizer = torch.optim.SGD(subnet.parameters(), lr=0.05)
    assert train(subnet, optimizer, schedule, 0, STEPS) == [
        {lambda_at(i / STEPS, shape, 0.5)} for i in range(STEPS)
    ]
    assert schedule.lam == 0.0 and lambdas(subnet) == {0.0}
    schedule.step()  # past the end
    assert schedule.lam == 0.0 and schedule.done == STEPS
    with pytest.raises(MergeError, match="training mode"):
        merge(subnet)
    report = merge(subnet.eval(), (3, 12, 12)).merge_report
    assert report.output < 1e-10 and len(report.blocks) == 1


@pytest.mark.parametrize(("steps", "share"), [(1, 0.4), (2, 0.99), (3, 0.999999), (1000, 1e-6), (7, 0.3)])
def test_the_end_is_exactly_zero(steps, share):
    schedule = Schedule(own_subnet(), steps, share=share)
    assert schedule.lam == 1.0
    for _ in range(steps):
        assert 0.0 <= schedule.lam <= 1.0
        schedule.step()
    assert schedule.lam == 0.0 and lambdas(schedule.subnet) == {0.0}


@pytest.mark.parametrize("killed", [0, 3, STEPS])
def test_a_loop_that_was_killed_ends_with_the_same_bits(killed):
    def parts():
        subnet = own_subnet()
        return subnet, torch.optim.SGD(subnet.parameters(), lr=0.05, momentum=0.9), Schedule(subnet, STEPS)

    whole, optimizer, schedule = parts()
    wanted = train(whole, optimizer, schedule, 0, STEPS)

    net, optimizer, schedule = parts()
    seen = train(net, optimizer, schedule, 0, killed)
    saved = copy.deepcopy([part.state_dict() for part in (net, optimizer, schedule)])

    net, optimizer, schedule = parts()
    for part, state in zip((net, optimizer, schedule), saved, strict=True):
        part.load_state_dict(state)
    assert schedule.lam == lambda_at(killed / STEPS)
    assert seen + train(net, optimizer, schedule, schedule.done, STEPS) == wanted
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in whole.state_dict().items())


def test_wrappers_share_the_subnet():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    subnet = own_subnet()
    schedule = Schedule(subnet, STEPS)
    optimizer = torch.optim.SGD(subnet.parameters(), lr=0.05)
    net, optimizer = accelerate.Accelerator(cpu=True).prepare(nn.Sequential(subnet), optimizer)
    assert train(net, optimizer, schedule, 0, STEPS)[0] == {1.0}
    assert merge(subnet.eval(), (3, 12, 12)).merge_report.output < 1e-10
    with pytest.raises(SpecError, match=r"not DataParallel: give it the subnet itself \(its .module\)"):
        Schedule(nn.DataParallel(subnet), 3)


def test_every_family_moves():
    for family in ("bottleneck_d", "lite", "convnext", "vit"):
        supernet = random_subnet(build(family)[0])
        schedule = Schedule(supernet.subnet(supernet.spec()), 2)
        assert lambdas(schedule.subnet) == {1.0}
        schedule.step()
        assert lambdas(schedule.subnet) == {0.0}


def test_mistakes_are_named():
    subnet = own_subnet()
    for steps in (0, -1, 2.5, True, "10"):
        with pytest.raises(ConfigError, match="steps must be a whole number .* at least 1"):
            Schedule(subnet, steps)
    for share in (0.0, 1.0, -1, float("nan")):
        with pytest.raises(ConfigError, match="share must lie between 0 and 1"):
            Schedule(subnet, 3, share=share)
    with pytest.raises(ConfigError, match="unknown shape 'square'; known: linear, cosine, none"):
        Schedule(subnet, 3, shape="square")
    with pytest.raises(SpecError, match="no block of the subnet is chosen.*set_choices"):
        Schedule(Supernet(own_net()), 3)
    with pytest.raises(SpecError, match=r"not Sequential: give it the subnet itself, which"):
        Schedule(own_net(), 3)
    assert lambdas(subnet) == {0.0}  # no mistake moved it
    with pytest.raises(ConfigError, match="steps=..."):
        Schedule(subnet).step()
    for method in ("for_trainer", "for_lightning"):
        with pytest.raises(ConfigError, match="leave steps=3 out"):
            getattr(Schedule(subnet, 3), method)()


def test_a_state_that_does_not_fit_is_refused():
    schedule = Schedule(own_subnet(), 4)
    schedule.step()
    kept = schedule.lam
    good = schedule.state_dict()
    for bad in (None, [], {}, {**good, "steps": 8}, {**good, "share": 0.5}, {**good, "shape": "linear"}):
        with pytest.raises(ConfigError, match="make it with the same"):
            schedule.load_state_dict(bad)
    for done in (None, -1, 5, 1.0, True):
        with pytest.raises(ConfigError, match="from 0 to 4"):
            schedule.load_state_dict({**good, "done": done})
    assert schedule.lam == kept and lambdas(schedule.subnet) == {kept} and schedule.done == 1


class Generated(torch.utils.data.Dataset):
    """Images of noise, as Hugging Face's Trainer wants them."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % 3}


@pytest.fixture
def trainer_of(tmp_path):
    """A Trainer on a tiny ViT of which one block is chosen, and what lambda each of its steps had."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Watch(transformers.TrainerCallback):
        def __init__(self, subnet):
            self.subnet, self.seen, self.evaluated = subnet, [], []

        def on_pre_optimizer_step(self, *_, **__):
            self.seen += lambdas(self.subnet)

        def on_evaluate(self, *_, **__):
            self.evaluated += lambdas(self.subnet)

    def make(**settings):
        options = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            image_size=32, patch_size=8, num_labels=3, num_hidden_layers=2, **options
        )
        supernet = Supernet(transformers.ViTForImageClassification(config))
        supernet.set_choices({next(iter(supernet.options())): "ffn"})
        subnet = supernet.subnet(supernet.spec())
        watch = Watch(subnet)
        args = {"num_train_epochs": 5, "save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
        trainer = transformers.Trainer(
            subnet.model,
            transformers.TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=8,
                use_cpu=True,
                disable_tqdm=True,
                dataloader_num_workers=0,
                **{**args, **settings},
            ),
            train_dataset=Generated(),
            eval_dataset=Generated(),
            callbacks=[Schedule(subnet).for_trainer(), watch],
        )
        return trainer, watch

    return make


def merges(subnet):
    assert lambdas(subnet) == {0.0}
    merged = merge(subnet.eval())
    assert merged.merge_report.output < 1e-10
    return merged


def test_hugging_face_trainer(trainer_of):
    trainer, watch = trainer_of()
    trainer.train()
    assert watch.seen == [lambda_at(i / 10) for i in range(10)]
    merged = merges(watch.subnet)
    assert merged(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 3)


def test_hugging_face_trainer_accumulates(trainer_of):
    trainer, watch = trainer_of(gradient_accumulation_steps=2, max_steps=4)
    trainer.train()
    assert watch.seen == [lambda_at(i / 4) for i in range(4)]
    merges(watch.subnet)


def test_hugging_face_trainer_goes_on_from_its_checkpoint(trainer_of, tmp_path):
    trainer, watch = trainer_of(save_strategy="steps", save_steps=3)
    trainer.train()
    again, watch_again = trainer_of()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert watch_again.seen == watch.seen[3:]
    for name, value in watch.subnet.state_dict().items():
        torch.testing.assert_close(watch_again.subnet.state_dict()[name], value)
    merges(watch_again.subnet)


def test_the_best_model_is_one_that_can_be_merged(trainer_of):
    """Labels of noise: what is trained longer scores worse on others, so the best would be an early one."""
    trainer, watch = trainer_of(
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer.compute_metrics = lambda _: {"score": -float(trainer.state.global_step)}
    trainer.train()
    assert watch.evaluated == [lambda_at(i / 10) for i in range(1, 11)]
    assert trainer.state.best_global_step == 4  # the first with lambda = 0
    merges(watch.subnet)


def lightning_double(monkeypatch, name):
    """A module of Lightning's name with the class that its callbacks inherit."""
    for other in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, other, None)
    for part in (name.partition(".")[0], name):  # what is returned is the last one
        module = ModuleType(part)
        module.Callback = type("Callback", (), {})
        monkeypatch.setitem(sys.modules, part, module)
    return module


def lightning_loop(subnet, callback, optimizer, first, last, accumulate=1):
    """The calls that Lightning's loop makes, in its order."""
    trainer = SimpleNamespace(global_step=first, estimated_stepping_batches=STEPS)
    module, seen = SimpleNamespace(net=subnet), []
    callback.on_train_start(trainer, module)
    for step in range(first, last):
        for part in range(accumulate):
            x, y = images(step)
            callback.on_train_batch_start(trainer, module, (x, y), part)
            F.cross_entropy(subnet.train()(x), y).backward()
            seen.append(lambdas(subnet))
            if part == accumulate - 1:
                optimizer.step()
                optimizer.zero_grad()
                trainer.global_step += 1
            callback.on_train_batch_end(trainer, module, None, (x, y), part)
    return seen


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_protocol(name, monkeypatch):
    double = lightning_double(monkeypatch, name)
    subnet = own_subnet()
    callback = Schedule(subnet, share=0.5).for_lightning()
    assert isinstance(callback, double.Callback)
    optimizer = torch.optim.SGD(subnet.parameters(), lr=0.05)
    seen = lightning_loop(subnet, callback, optimizer, 0, STEPS, accumulate=2)
    assert seen == [{lambda_at(i / STEPS, share=0.5)} for i in range(STEPS) for _ in range(2)]
    assert merge(subnet.eval(), (3, 12, 12)).merge_report.output < 1e-10

    again = own_subnet()
    callback = Schedule(again, share=0.5).for_lightning()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.05)
    assert lightning_loop(again, callback, optimizer, 3, STEPS) == seen[6::2]


@pytest.mark.parametrize("steps", [float("inf"), -1, 0])
def test_lightning_without_an_end(steps, monkeypatch):
    lightning_double(monkeypatch, "lightning.pytorch")
    callback = Schedule(own_subnet()).for_lightning()
    with pytest.raises(ConfigError, match="lambda needs an end: give it max_steps or max_epochs"):
        callback.on_train_start(SimpleNamespace(global_step=0, estimated_stepping_batches=steps), None)


def test_what_is_missing_is_named(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    schedule = Schedule(own_subnet())
    with pytest.raises(ConfigError, match="pip install lightning$"):
        schedule.for_lightning()
    with pytest.raises(ConfigError, match="pip install transformers$"):
        schedule.for_trainer()


def test_lightning(tmp_path):
    """The real one, where it is installed."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            lightning = importlib.import_module(name)
            break
        except ModuleNotFoundError:
            continue
    else:
        pytest.skip("neither lightning nor pytorch_lightning is installed")

    subnet, seen = own_subnet(), []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = subnet

        def training_step(self, batch, _):
            seen.append(lambdas(subnet))
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.05)

    loader = torch.utils.data.DataLoader([images(i) for i in range(5)], batch_size=None)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path, callbacks=[depthfuse.Schedule(subnet).for_lightning()],
    )  # fmt: skip
    trainer.fit(Module(), loader)
    assert seen == [{lambda_at(i / 10)} for i in range(10)]
    assert merge(subnet.eval(), (3, 12, 12)).merge_report.output < 1e-10
