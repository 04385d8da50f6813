"""The embedded subset and the batches made of it in memory."""

import gzip

import numpy as np
import pytest
import torch

from benchmarks.tools import cut_fashion_mnist
from depthfuse.data import DataConfig, DataError, embedded, open_data
from depthfuse.data.pixels import PixelSource


def collect(loader):
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_subset_is_small_balanced_and_real():
    assert embedded.SUBSET_PATH.stat().st_size < 5_000_000
    for split, per_class in (("train", 1000), ("test", 200)):
        images, labels = embedded.load(split)
        assert images.shape == (10 * per_class, 1, 28, 28) and images.dtype == torch.uint8
        assert torch.bincount(labels).tolist() == [per_class] * 10
    train, test = embedded.load("train")[0], embedded.load("test")[0]
    assert len(train.flatten(1).unique(dim=0)) > 9990
    # Some Fashion-MNIST pictures occur twice in the originals, but no more than a handful.
    both = torch.cat([train, test]).flatten(1)
    assert len(both) - len(both.unique(dim=0)) < 10
    assert abs(train.double().mean() / 255 - 0.2863) < 5e-5
    assert abs(train.double().std() / 255 - 0.3526) < 5e-5


def test_cut_is_reproducible_balanced_and_ordered(tmp_path, monkeypatch):
    def write_idx(path, array):
        sizes = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
        path.write_bytes(gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()))

    rng = np.random.RandomState(0)
    for image_file, label_file in cut_fashion_mnist.FILES.values():
        labels = np.repeat(np.arange(10), 5).astype(np.uint8)
        rng.shuffle(labels)
        write_idx(tmp_path / label_file, labels)
        write_idx(tmp_path / image_file, np.broadcast_to(labels[:, None, None], (50, 28, 28)).copy())
    for module in (cut_fashion_mnist, embedded):
        monkeypatch.setattr(module, "IMAGES_PER_CLASS", {"train": 3, "test": 2})
    data = cut_fashion_mnist.cut(tmp_path)
    assert data == cut_fashion_mnist.cut(tmp_path)
    monkeypatch.setattr(embedded, "SUBSET_PATH", tmp_path / "subset.xz")
    embedded.SUBSET_PATH.write_bytes(data)
    splits = embedded._load_all.__wrapped__()
    for split, per_class in (("train", 3), ("test", 2)):
        images, labels = splits[split]
        assert torch.bincount(labels).tolist() == [per_class] * 10
        assert torch.equal(images[:, 0, 0, 0].long(), labels)  # pixels and labels belong together


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("img_size", [None, 24, 32, 56])
def test_shapes_and_normalisation(in_chans, img_size):
    config = DataConfig(img_size=img_size, max_train_images=300)
    bundle = open_data(config, num_classes=10, in_chans=in_chans)
    size = img_size or 28
    assert (bundle.in_chans, bundle.img_size) == (in_chans, size)
    assert len(bundle.mean) == len(bundle.std) == in_chans
    images, labels = next(iter(bundle.train_loader(seed=0, epoch=0)))
    assert images.shape == (128, in_chans, size, size) and images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(images, images[:, :1].expand_as(images))
    images, labels = collect(bundle.val_loader())
    assert torch.equal(labels, embedded.load("test")[1])
    if size in (28, 32):  # the original pixels, in the middle of zeros
        pixels = images[:, :1].double() * bundle.std[0] + bundle.mean[0]
        inner = pixels[:, :, (size - 28) // 2 :, (size - 28) // 2 :][:, :, :28, :28]
        assert torch.equal((inner * 255).round().byte(), embedded.load("test")[0])
        assert torch.allclose(pixels.sum(), inner.sum())


def test_light_augmentation_is_a_shifted_and_mirrored_crop():
    images = torch.randint(1, 256, (64, 3, 9, 9), dtype=torch.uint8)
    source = PixelSource(
        images, torch.arange(64), img_size=9, in_chans=3, mean=0.0, std=1.0, augment=True, padding=2
    )
    positions = torch.randperm(64)
    ((batch, labels),) = source.train_batches([positions], seed=3, epoch=4)
    assert torch.equal(labels, positions)
    got = (batch * 255).round().byte()
    padded = torch.nn.functional.pad(images, (2,) * 4)
    seen = set()
    for image, position in zip(got, positions, strict=True):
        matches = [
            (row, column, mirrored)
            for row in range(5)
            for column in range(5)
            for mirrored in (False, True)
            for crop in [padded[position, :, row : row + 9, column : column + 9]]
            if torch.equal(image, crop.flip(2) if mirrored else crop)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 25  # of 50
    assert {mirrored for _, _, mirrored in seen} == {False, True}


@pytest.mark.parametrize("augment", ["none", "light"])
def test_epoch_is_a_function_of_seed_and_epoch(augment):
    bundle = open_data(DataConfig(augment=augment, max_train_images=1000), num_classes=10)
    state = torch.get_rng_state()
    images, labels = collect(bundle.train_loader(seed=1, epoch=2))
    again = open_data(DataConfig(augment=augment, max_train_images=1000), num_classes=10)
    torch.rand(3)
    torch.set_rng_state(state)
    same, same_labels = collect(again.train_loader(seed=1, epoch=2))
    assert torch.equal(images, same) and torch.equal(labels, same_labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(images, collect(bundle.train_loader(seed=1, epoch=3))[0])
    assert not torch.equal(images, collect(bundle.train_loader(seed=2, epoch=2))[0])


def test_resume_continues_bit_for_bit():
    bundle = open_data(DataConfig(max_train_images=1500), num_classes=10)
    whole = list(bundle.train_loader(seed=5, epoch=1))
    assert len(whole) == bundle.train_batches() == len(bundle.train_loader(seed=5, epoch=1))
    for start in (0, 1, len(whole) - 1, len(whole)):
        rest = list(bundle.train_loader(seed=5, epoch=1, start_batch=start))
        assert len(rest) == len(whole) - start
        for (images, labels), (expected, expected_labels) in zip(rest, whole[start:], strict=True):
            assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_ranks_share_an_epoch_without_overlap():
    bundle = open_data(DataConfig(batch_size=32, augment="none", max_train_images=500), num_classes=10)
    alone, _ = collect(
        open_data(
            DataConfig(batch_size=64, augment="none", max_train_images=500), num_classes=10
        ).train_loader(seed=0, epoch=0)
    )
    ranks = [list(bundle.train_loader(seed=0, epoch=0, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [bundle.train_batches(2)] * 2
    together = torch.cat([images for pair in zip(*ranks, strict=True) for images, _ in pair])
    assert torch.equal(together, alone)


def test_holdout_and_calibration_come_from_training_only():
    bundle = open_data(DataConfig(), num_classes=10)
    assert torch.bincount(collect(bundle.holdout_loader())[1]).tolist() == [50] * 10
    assert not set(bundle.train_positions.tolist()) & set(bundle.holdout_positions.tolist())
    assert len(bundle.train_positions) + len(bundle.holdout_positions) == 10_000
    calibration = bundle.calibration_loader(1000)
    sizes = {len(labels) for _, labels in calibration}
    assert sizes == {250} and len(calibration) == 4
    assert torch.bincount(collect(calibration)[1]).tolist() == [100] * 10
    first, second = collect(calibration)[0], collect(bundle.calibration_loader(1000))[0]
    assert torch.equal(first, second)
    assert sum(len(labels) for _, labels in bundle.calibration_loader(10**6)) > 9000


def test_max_train_images_is_balanced_and_divided_after():
    bundle = open_data(DataConfig(max_train_images=205, holdout=0.25, batch_size=10), num_classes=10)
    labels = embedded.load("train")[1]
    pool = torch.cat([bundle.train_positions, bundle.holdout_positions])
    assert sorted(torch.bincount(labels[pool]).tolist()) == [20] * 5 + [21] * 5
    assert torch.bincount(labels[bundle.holdout_positions]).tolist() == [5] * 10


def test_mixup_depends_on_seed_and_iteration_alone():
    bundle = open_data(DataConfig(mixup=0.8, cutmix=1.0, batch_size=16), num_classes=10)
    mix = bundle.mixup(label_smoothing=0.1)
    images, labels = next(iter(bundle.train_loader(seed=0, epoch=0)))
    state = np.random.get_state()[1].copy()
    mixed, targets = mix(images.clone(), labels, seed=1, iteration=7)
    assert np.array_equal(np.random.get_state()[1], state)
    assert targets.shape == (16, 10) and torch.allclose(targets.sum(1), torch.ones(16))
    np.random.rand()
    again, same_targets = mix(images.clone(), labels, seed=1, iteration=7)
    assert torch.equal(mixed, again) and torch.equal(targets, same_targets)
    assert not torch.equal(mixed, mix(images.clone(), labels, seed=1, iteration=8)[0])
    assert open_data(DataConfig(), num_classes=10).mixup() is None


def test_imagenet_augmentation_of_embedded_images_is_reproducible():
    config = DataConfig(
        augment="imagenet", auto_augment="rand-m9-mstd0.5", reprob=0.5, max_train_images=60, batch_size=16
    )
    bundle = open_data(config, num_classes=10)
    images, labels = collect(bundle.train_loader(seed=0, epoch=0))
    again, same_labels = collect(open_data(config, num_classes=10).train_loader(seed=0, epoch=0))
    assert torch.equal(images, again) and torch.equal(labels, same_labels)
    assert images.shape[1:] == (3, 28, 28)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"holdout": 1.0}, r"holdout is a share.*not 1.0"),
        ({"augment": "heavy"}, "not 'heavy'"),
        ({"auto_augment": "rand-m9"}, 'need augment "imagenet"'),
        ({"mixup": 0.2, "batch_size": 7}, "7 is odd"),
        ({"img_size": 0}, "img_size must be positive"),
    ],
)
def test_config_refuses_nonsense(kwargs, message):
    with pytest.raises(DataError, match=message):
        DataConfig(**kwargs)


def test_other_batches_of_the_same_images():
    data = open_data(
        DataConfig(max_train_images=640, batch_size=64, mixup=0.2, holdout=0.0), num_classes=None
    )
    other = data.batched(32)
    assert (data.config.batch_size, other.config.batch_size) == (64, 32)
    assert other.train_batches() == 2 * data.train_batches()
    given, wanted = (collect(d.train_loader(seed=3, epoch=1)) for d in (other, data))
    assert torch.equal(given[1], wanted[1]) and {len(x) for x, _ in other.train_loader(seed=0, epoch=0)} == {
        32
    }
    assert data.batched(None) is data and data.batched(64) is data
    with pytest.raises(DataError, match="33 is odd"):
        data.batched(33)
    with pytest.raises(DataError, match="do not fill one batch of 1000"):
        data.batched(1000)
