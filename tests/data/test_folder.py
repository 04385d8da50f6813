"""Folders of images: what is read, that it repeats, and that each fault is named."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from depthfuse.data import DataConfig, DataError, open_data

SMALL = {"img_size": 24, "batch_size": 4, "val_batch_size": 4}


def batches_equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, second, strict=True)
    )


def open_folder(root, num_classes=3, **kwargs):
    return open_data(DataConfig(data=str(root), **(SMALL | kwargs)), num_classes=num_classes)


def test_format_comes_from_the_model(folder):
    model_cfg = {
        "input_size": (3, 48, 48),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.2, 0.2),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    bundle = open_data(DataConfig(data=str(folder), batch_size=4), num_classes=3, model_cfg=model_cfg)
    assert bundle.class_names == ["ant", "bee", "cat"] and bundle.num_classes == 3
    assert (bundle.img_size, bundle.mean, bundle.std) == (48, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    images, labels = next(iter(bundle.val_loader()))
    assert images.shape == (6, 3, 48, 48) and labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_evaluation_shows_the_pixels_themselves(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (24, 24, 3), dtype=np.uint8)
    for split in ("train", "val"):
        for name in ("one", "other"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / split / name / "image.png")
    bundle = open_folder(tmp_path, num_classes=2, augment="none", crop_pct=1.0, batch_size=2)
    expected = torch.from_numpy(pixels).permute(2, 0, 1).double() / 255
    expected = (expected - torch.tensor(bundle.mean).view(3, 1, 1)) / torch.tensor(bundle.std).view(3, 1, 1)
    for loader in (bundle.val_loader(), bundle.train_loader(seed=0, epoch=0), bundle.calibration_loader(1)):
        ((images, _),) = list(loader)
        assert torch.allclose(images.double(), expected.expand(2, 3, 24, 24)[: len(images)], atol=1e-6)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    "augment",
    [
        {"augment": "none"},
        {"augment": "light"},
        {"augment": "imagenet", "auto_augment": "rand-m9-mstd0.5", "reprob": 0.5},
    ],
)
def test_epoch_does_not_depend_on_workers_or_on_the_caller(folder, augment, in_chans):
    runs = []
    for workers in (0, 2):
        config = DataConfig(data=str(folder), workers=workers, **SMALL, **augment)
        bundle = open_data(config, num_classes=3, in_chans=in_chans)
        torch.manual_seed(workers)
        state = torch.get_rng_state()
        runs.append(list(bundle.train_loader(seed=1, epoch=2)))
        assert torch.equal(torch.get_rng_state(), state)
    assert batches_equal(*runs)
    assert runs[0][0][0].shape == (4, in_chans, 24, 24)
    assert batches_equal(list(bundle.train_loader(seed=1, epoch=2, start_batch=3)), runs[0][3:])
    assert not batches_equal(list(bundle.train_loader(seed=1, epoch=3)), runs[0])


def test_resuming_decodes_only_what_is_left(folder, monkeypatch):
    bundle = open_folder(folder)
    decoded = []
    read = type(bundle._train.images).__getitem__
    monkeypatch.setattr(
        type(bundle._train.images), "__getitem__", lambda self, i: decoded.append(i) or read(self, i)
    )
    assert bundle.train_batches() == 5
    list(bundle.train_loader(seed=0, epoch=0, start_batch=4))
    assert len(decoded) == 4


def test_holdout_is_stratified_and_disjoint(folder):
    bundle = open_folder(folder, holdout=0.25)
    labels = bundle._train.images.labels()
    assert torch.bincount(labels[bundle.holdout_positions]).tolist() == [3, 2, 1]
    assert not set(bundle.holdout_positions.tolist()) & set(bundle.train_positions.tolist())
    assert sum(len(batch) for _, batch in bundle.holdout_loader()) == 6


def test_holdout_split_is_used_whole(make_folder):
    root = make_folder(
        {"train": {"ant": 4, "bee": 4}, "val": {"ant": 1, "bee": 1}, "extra": {"ant": 2, "bee": 3}}
    )
    bundle = open_folder(root, num_classes=2, holdout_split="extra")
    assert len(bundle.train_positions) == 8
    assert sum(len(labels) for _, labels in bundle.holdout_loader()) == 5


def test_max_train_images_is_balanced(folder):
    bundle = open_folder(folder, max_train_images=12, holdout=0.0)
    labels = bundle._train.images.labels()
    assert torch.bincount(labels[bundle.train_positions]).tolist() == [4, 4, 4]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_usual_names_of_the_validation_folder_are_found(make_folder, name):
    root = make_folder({"train": {"ant": 4, "bee": 4}, name: {"ant": 1, "bee": 1}})
    assert len(open_folder(root, num_classes=2).val_positions) == 2


def test_torchvision_data_set_by_name(tmp_path):
    """timm's "torch/image_folder": a torchvision class, which has no timm reader."""
    for split in ("train", "validation"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("L", (20, 20), number * 50).save(tmp_path / split / name / f"{number}.png")
    config = DataConfig(data="torch/image_folder", data_dir=str(tmp_path), **SMALL)
    bundle = open_data(config, num_classes=2)
    assert bundle.class_names == ["ant", "bee"]
    assert [labels.tolist() for _, labels in bundle.val_loader()] == [[0, 0, 0, 1], [1, 1]]


# What is wrong, and the message that says so.


def test_missing_path(tmp_path):
    with pytest.raises(DataError, match=f"the folder {tmp_path / 'nowhere'} does not exist"):
        open_folder(tmp_path / "nowhere")


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"x")
    with pytest.raises(DataError, match="data.zip is a file"):
        open_folder(tmp_path / "data.zip")


@pytest.mark.parametrize("name", ["imagenette", "torch/no_such_set"])
def test_unknown_name(name):
    with pytest.raises(DataError, match=name):
        open_data(DataConfig(data=name), num_classes=10)


def test_named_set_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=rf"torch/cifar10 \(data_dir {tmp_path}\).*not found"):
        open_data(DataConfig(data="torch/cifar10", data_dir=str(tmp_path)), num_classes=10)


def test_missing_split(make_folder):
    root = make_folder({"train": {"ant": 4, "bee": 4}, "other": {"ant": 2}})
    with pytest.raises(DataError, match="no folder for the split 'validation'.*found other, train"):
        open_folder(root)


def test_empty_class_folder(folder):
    (folder / "train" / "dog").mkdir()
    with pytest.raises(DataError, match=f"class folder {folder / 'train' / 'dog'} holds no image"):
        open_folder(folder)


def test_class_folder_without_images(folder):
    (folder / "val" / "dog").mkdir()
    (folder / "val" / "dog" / "notes.txt").write_text("none yet")
    with pytest.raises(DataError, match=f"class folder {folder / 'val' / 'dog'} holds no image"):
        open_folder(folder)


def test_empty_split(folder):
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    with pytest.raises(DataError, match=f"{folder / 'val'} is empty"):
        open_folder(folder)


def test_images_outside_class_folders(folder):
    Image.new("RGB", (8, 8)).save(folder / "train" / "stray.png")
    with pytest.raises(DataError, match=f"images lie directly in {folder / 'train'}"):
        open_folder(folder)


def test_classes_of_the_splits_differ(folder):
    (folder / "val" / "cat").rename(folder / "val" / "dog")
    with pytest.raises(DataError, match="only in train: cat; only in validation: dog"):
        open_folder(folder)


def test_model_with_another_number_of_classes(folder):
    with pytest.raises(DataError, match=r"the model has 10 classes, but .* has 3 \(ant, bee, cat\)"):
        open_folder(folder, num_classes=10)
    with pytest.raises(DataError, match="the model has 1000 classes, but fashion-mnist has 10"):
        open_data(DataConfig(), num_classes=1000)


def test_model_with_other_channels():
    with pytest.raises(DataError, match="the model takes 4"):
        open_data(DataConfig(), num_classes=10, in_chans=4)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_unreadable_image_is_named(folder, damage, workers):
    path = folder / "train" / "bee" / "3.jpg"
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"no image"}[damage])
    bundle = open_folder(folder, workers=workers, holdout=0.0)
    with pytest.raises(DataError, match=f"cannot read image {path}"):
        list(bundle.train_loader(seed=0, epoch=0))


def test_fewer_images_than_a_batch(folder):
    with pytest.raises(DataError, match="23 training images .* do not fill one batch of 64"):
        open_folder(folder, batch_size=64)
    with pytest.raises(DataError, match=r"one batch of 12 on 2 process\(es\)"):
        open_folder(folder, batch_size=12).train_batches(world_size=2)


def test_nothing_held_out(folder):
    with pytest.raises(DataError, match="holdout is 0.0"):
        open_folder(folder, holdout=0.0).holdout_loader()


def test_unknown_auto_augment(folder):
    with pytest.raises(DataError, match="nonsense"):
        open_folder(folder, augment="imagenet", auto_augment="nonsense")


def test_in_memory_gives_the_same_images_and_decodes_each_once(folder):
    cfg = {"crop_pct": 0.8, "augment": "none"}
    decoded = open_folder(folder, **cfg)
    kept = open_folder(folder, in_memory=True, **cfg)
    for name in ("val_loader", "holdout_loader"):
        (first, second) = (list(getattr(bundle, name)()) for bundle in (decoded, kept))
        assert len(first) == len(second) > 0
        for (a, c), (b, d) in zip(first, second, strict=True):
            assert torch.equal(c, d)
            assert torch.allclose(a, b, atol=1e-5)
    again = list(kept.val_loader())
    shutil.rmtree(folder / "val")
    assert batches_equal(again, list(kept.val_loader()))


def test_in_memory_augmentation_is_a_function_of_seed_and_epoch(folder):
    bundle = open_folder(folder, in_memory=True)
    first = list(bundle.train_loader(seed=0, epoch=0))
    assert batches_equal(first, list(open_folder(folder, in_memory=True).train_loader(seed=0, epoch=0)))
    assert batches_equal(first[2:], list(bundle.train_loader(seed=0, epoch=0, start_batch=2)))
    assert not batches_equal(first, list(bundle.train_loader(seed=0, epoch=1)))


def test_in_memory_refuses_what_it_cannot_do(folder):
    with pytest.raises(DataError, match="choose one"):
        open_folder(folder, in_memory=True, augment="imagenet")
    with pytest.raises(DataError, match="is a stream"):
        open_data(DataConfig(data="wds/x", data_dir=str(folder), in_memory=True), num_classes=3)
