"""The training loop: it learns, resumes to the same bits from any checkpoint, and stops where numbers go bad."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from nets import build
from torch import nn

from depthfuse import DataConfig, SubnetSpec, Supernet, open_data
from depthfuse.checkpoint import load_state
from depthfuse.config import TrainConfig
from depthfuse.errors import CheckpointError, ConfigError, DataError, TrainingDiverged
from depthfuse.spec import ModelSource
from depthfuse.training.evaluation import top1
from depthfuse.training.loop import fit, history_csv, make_accelerator, within_chance
from depthfuse.training.objectives import Objective, ProgressiveObjective, SandwichObjective

CONFIG = TrainConfig(epochs=2, lr=2e-3, warmup_epochs=0.5, clip_grad=1.0)


@pytest.fixture(scope="module")
def data():
    return open_data(
        DataConfig(max_train_images=600, batch_size=64, holdout=0.1, mixup=0.2), num_classes=None, in_chans=1
    )


@pytest.fixture(scope="module")
def accelerator():
    return make_accelerator(cpu=True)


def net():
    torch.manual_seed(3)
    return ModelSource.make(
        "resnet18", channels=(8, 12, 16, 24), layers=(1, 1, 1, 1), in_chans=1, num_classes=10
    ).build()


def objective(kind):
    if kind == "plain":
        return Objective(net(), 0.1)
    supernet = Supernet(net())
    if kind == "sandwich":
        return SandwichObjective(supernet, label_smoothing=0.1)
    spec = SubnetSpec.from_mapping(supernet.source, {"layer1.0": "compact", "layer3.0": "dense"})
    teacher = net()
    return ProgressiveObjective(supernet.subnet(spec), teacher=teacher, share=0.7)


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


class Killed(BaseException):
    """Not an error that anything would catch."""


def die_at(objective, iteration):
    """Let an objective raise in its n-th forward pass."""
    forward, count = objective.forward, [0]

    def dying(*args):
        if count[0] == iteration:
            raise Killed
        count[0] += 1
        return forward(*args)

    objective.forward = dying
    return objective


@pytest.mark.parametrize(
    ("kind", "killed_at", "ema"),
    [
        ("plain", 3, 0.0),
        ("plain", 8, 0.0),  # between two epochs, before the evaluation
        ("sandwich", 3, 0.0),
        ("sandwich", 13, 0.0),
        ("progressive", 8, 0.0),
        ("progressive", 13, 0.9),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(kind, killed_at, ema, data, accelerator, tmp_path):
    config = TrainConfig(epochs=2, lr=2e-3, warmup_epochs=0.5, ema_decay=ema)
    whole = objective(kind)
    wanted = fit(whole, data, config, accelerator)
    path = tmp_path / "stage.state"
    with pytest.raises(Killed):
        fit(
            die_at(objective(kind), killed_at),
            data,
            config,
            accelerator,
            checkpoint=path,
            checkpoint_seconds=0.0,
        )
    state = load_state(path)
    assert state["iteration"] == killed_at
    if kind == "progressive":
        assert state["lambda"] == pytest.approx(whole.lam(killed_at / 16))
    torch.manual_seed(999)  # nothing may hang on the state of the process
    resumed = objective(kind)
    got = fit(resumed, data, config, accelerator, checkpoint=path)
    assert same(resumed.net, whole.net)
    assert got.history == wanted.history
    assert got.top1 == wanted.top1


def test_it_learns(accelerator):
    data = open_data(
        DataConfig(max_train_images=2000, batch_size=50, augment="none"), num_classes=None, in_chans=1
    )
    trained = Objective(net())
    before = top1(trained.net, data.val_loader())
    fit(trained, data, TrainConfig(epochs=3, lr=4e-3), accelerator)
    assert before < 25.0
    assert top1(trained.net, data.val_loader()) > 60.0


def test_it_may_end_with_weights_at_lambda_zero_only(data, accelerator):
    progressive = objective("progressive")
    result = fit(progressive, data, TrainConfig(epochs=4, lr=1e-3), accelerator)
    mixed = [row for row in result.history if "top1_mixed" in row]
    final = [row for row in result.history if "top1" in row]
    assert len(mixed) == 2 and len(final) == 2  # lambda is 0 from 70 % of four epochs on
    assert result.top1 in [row["top1"] for row in final]
    lams = [row["lambda"] for row in result.history if "lambda" in row]
    assert lams[0] > 0.9 and lams[-1] == 0.0 and sorted(lams, reverse=True) == lams


class Scripted(Objective):
    """Is told its scores, and remembers its weights at each of them."""

    def __init__(self, scores):
        super().__init__(net())
        self.scores, self.seen = scores, []

    def evaluate(self, net, progress, score, calibrate):
        score(net)
        self.seen.append({name: value.clone() for name, value in net.state_dict().items()})
        return {"top1": self.scores[len(self.seen) - 1]}


NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "ends_with"),
    [  # of 60 held-out images two standard errors are 7.7 points at 90 %
        ([90.0, 86.0, 83.0], 2),  # within chance of the best: the last, whose learning rate has come down
        ([90.0, 83.0, 82.0], 1),
        ([90.0, 50.0, 40.0], 0),  # beyond chance: wrecked since
        ([90.0, 50.0, 84.0], 2),
        ([80.0, 70.5, 95.0], 2),
        ([100.0, 99.0, 98.0], 0),  # no doubt at all
        ([NAN, 50.0, NAN], 1),
        ([NAN, NAN, NAN], 2),
    ],
)
def test_it_ends_with_the_latest_weights_that_may_be_the_best(scores, ends_with, accelerator, tmp_path):
    plain = open_data(
        DataConfig(max_train_images=300, batch_size=64, holdout=0.2), num_classes=None, in_chans=1
    )
    config = TrainConfig(epochs=3, lr=2e-3)
    scripted, path = Scripted(scores), tmp_path / "stage.state"
    result = fit(scripted, plain, config, accelerator, checkpoint=path)
    ended = scripted.net.state_dict()
    assert [all(torch.equal(ended[k], seen[k]) for k in ended) for seen in scripted.seen] == [
        index == ends_with for index in range(3)
    ]
    assert result.top1 == (None if math.isnan(scores[ends_with]) else scores[ends_with])
    again = Scripted(scores)  # killed between the last checkpoint and what comes after training
    assert fit(again, plain, config, accelerator, checkpoint=path).top1 == result.top1
    assert same(again.net, scripted.net)


@pytest.mark.parametrize(
    ("best", "images", "margin"), [(50.0, 100, 10.0), (90.0, 900, 2.0), (0.0, 7, 0.0), (100.0, 7, 0.0)]
)
def test_chance_is_two_standard_errors_of_a_share(best, images, margin):
    assert within_chance(best - margin + 1e-9, best, images)
    assert not within_chance(best - margin - 1e-9, best, images)


def test_a_nan_stops_training_and_names_iteration_and_layer(data, accelerator, tmp_path):
    poisoned = Objective(net())
    forward, count = poisoned.forward, [0]

    def poisoning(*args):
        count[0] += 1
        if count[0] == 5:
            with torch.no_grad():
                poisoned.net.layer2[0].conv1.weight[0, 0, 0, 0] = float("nan")
        return forward(*args)

    poisoned.forward = poisoning
    path = tmp_path / "s.state"
    with pytest.raises(
        TrainingDiverged, match=r"loss is nan at iteration 4; first layer .*: layer2\.0\.conv1"
    ):
        fit(poisoned, data, CONFIG, accelerator, checkpoint=path, checkpoint_seconds=0.0)
    assert all(t.isfinite().all() for t in load_state(path)["net"].values() if t.is_floating_point())


def test_an_infinite_gradient_is_named(data, accelerator):
    class Cliff(Objective):
        def forward(self, images, targets, progress):
            loss = super().forward(images, targets, progress)
            return loss + (self.net.fc.bias * 0).sum().sqrt()  # 0, with an infinite slope

    with pytest.raises(
        TrainingDiverged, match=r"gradient is not finite at iteration 0; first layer .*fc\.bias"
    ):
        fit(Cliff(net()), data, CONFIG, accelerator)


def test_a_checkpoint_of_another_run_is_refused(data, accelerator, tmp_path):
    path = tmp_path / "s.state"
    fit(Objective(net()), data, TrainConfig(epochs=1), accelerator, checkpoint=path)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        fit(Objective(net()), data, TrainConfig(epochs=1), accelerator, checkpoint=path, seed=1)


def test_distillation_leaves_the_teacher_alone(data, accelerator):
    progressive = objective("progressive")
    teacher = progressive._teacher[0]
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    fit(progressive, data, TrainConfig(epochs=1), accelerator)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(k.startswith("_teacher") for k in progressive.state_dict())


def test_sandwich_teaches_the_full_net_by_labels_alone():
    """The soft labels carry no gradient back into the full net: with the subnets' losses gone, nothing changes."""
    model, size = build("resnet")
    sandwich = SandwichObjective(Supernet(model), random_subnets=0).eval()
    x, y = torch.randn(2, *size), torch.tensor([0, 1])
    sandwich(x, y, 0.0).backward()
    off_path = sandwich.net.blocks["layer1.0"].block.bn1.weight.grad.clone()
    sandwich.zero_grad()
    sandwich.net.set_choices({})
    (nn.functional.cross_entropy(sandwich.net(x), y) / 2).backward()
    torch.testing.assert_close(off_path, sandwich.net.blocks["layer1.0"].block.bn1.weight.grad)


def test_top1_counts(data):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), 3), 10).float() + 0 * self.weight

    assert top1(Constant(), data.val_loader()) == 10.0  # balanced classes
    with pytest.raises(ValueError, match="no images"):
        top1(Constant(), [])


def test_history_csv():
    assert history_csv([{"a": 1, "b": 2}, {"a": 3, "c": 4}]) == "a,b,c\n1,2,\n3,,4\n"


def test_a_stage_may_have_batches_of_its_own(data, accelerator):
    seen = []

    class Watched(type(objective("plain"))):
        def forward(self, images, targets, progress):
            seen.append(len(images))
            return super().forward(images, targets, progress)

    config = TrainConfig(epochs=2, batch_size=data.config.batch_size // 2)
    fit(Watched(objective("plain").net), data, config, accelerator)
    images = data.train_batches() * data.config.batch_size
    assert set(seen) == {config.batch_size} and sum(seen) >= 2 * images
    with pytest.raises(DataError, match="do not fill one batch of 100000"):
        fit(objective("plain"), data, dataclasses.replace(config, batch_size=100_000), accelerator)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, not 0"):
        dataclasses.replace(config, batch_size=0)


def test_the_learning_rate_warms_up_holds_and_falls(data, accelerator):
    config = TrainConfig(epochs=4, lr=2e-3, warmup_epochs=1.0, hold_share=0.5)
    rows = [r for r in fit(objective("plain"), data, config, accelerator).history if "lr" in r]
    total = rows[-1]["iteration"]
    rates = {row["iteration"] / total: row["lr"] for row in rows}
    assert all(rate < config.lr for share, rate in rates.items() if share < 0.25)
    assert all(rate == config.lr for share, rate in rates.items() if 0.26 < share < 0.75)
    falling = [rate for share, rate in sorted(rates.items()) if share > 0.76]
    assert len(falling) > 3 and all(a > b for a, b in itertools.pairwise(falling))
    with pytest.raises(ConfigError, match=r"hold_share .* not 1\.5"):
        dataclasses.replace(config, hold_share=1.5)


def test_fully_pruned_means_the_family_s_own_merge_first():
    supernet = Supernet(net())
    allowed = {path: list(reversed(names)) for path, names in supernet.options().items()}
    sandwich = SandwichObjective(supernet, allowed)
    assert sandwich.fully_pruned() == {path: names[0] for path, names in supernet.options().items()}
    few = {"layer1.0": ["identity", "dense"]}
    assert SandwichObjective(supernet, few).fully_pruned() == {"layer1.0": "dense"}
    drawn = {SandwichObjective(supernet, few).fully_pruned(random.Random(i))["layer1.0"] for i in range(20)}
    assert drawn == {"identity", "dense"}
