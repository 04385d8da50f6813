"""Named data sets: splits, labels and class names that do not mean what was asked for are refused."""

import pickle

import numpy as np
import pytest
from PIL import Image

from depthfuse.data import DataConfig, DataError, open_data
from depthfuse.data.images import DecodedImages


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """CIFAR-10 as torchvision reads it, of 10 images a file; returns a function: its config."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for number, (file, _) in enumerate([*CIFAR10.train_list, *CIFAR10.test_list]):
        data = np.full((10, 3072), number * 20, np.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": data, "labels": list(range(10))}))
    names = [f"class {number}" for number in range(10)]
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)

    def config(**kwargs):
        sizes = {"img_size": 8, "batch_size": 2}
        return DataConfig(data="torch/cifar10", data_dir=str(tmp_path), **(sizes | kwargs))

    return config


def test_usual_splits_of_torchvision_are_read(cifar10):
    for train in ("train", "training"):
        for val in ("validation", "val", "test"):
            bundle = open_data(cifar10(train_split=train, val_split=val, holdout=0.0), num_classes=10)
            assert (len(bundle.train_positions), len(bundle.val_positions)) == (50, 10)
            assert bundle.class_names == [f"class {number}" for number in range(10)]


@pytest.mark.parametrize(
    "splits", [{"train_split": "trian"}, {"val_split": "vla"}, {"holdout_split": "train2"}]
)
def test_unknown_splits_of_torchvision_are_refused(cifar10, splits):
    (name,) = splits.values()
    with pytest.raises(DataError, match=f"torch/cifar10 has the splits train and test, but not '{name}'"):
        open_data(cifar10(**splits), num_classes=10)


@pytest.mark.parametrize(
    "splits",
    [{"val_split": "train"}, {"val_split": "training"}, {"train_split": "test"}, {"holdout_split": "train"}],
)
def test_training_images_are_not_measured_on(cifar10, splits):
    with pytest.raises(DataError, match="of torch/cifar10 holds images of the split"):
        open_data(cifar10(**splits), num_classes=10)


class Named:
    """A data set of images in memory with given labels."""

    def __init__(self, labels, class_to_idx=None):
        self.targets = labels
        self.class_to_idx = class_to_idx

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Image.new("L", (8, 8)), self.targets[index]


def open_named(monkeypatch, train, val):
    sets = {"train": train, "validation": val}
    monkeypatch.setattr("timm.data.create_dataset", lambda *_, split, **__: sets[split])
    return open_data(DataConfig(data="hfds/some", img_size=8, batch_size=2), num_classes=None)


@pytest.mark.parametrize("labels", [["ant", "bee"], [0.0, 1.5], [None, 1], [[0, 1], [1, 0]]])
def test_labels_that_are_no_numbers_are_refused(monkeypatch, labels):
    with pytest.raises(DataError, match="labels of the split 'train' of hfds/some .* class number"):
        open_named(monkeypatch, Named(labels * 4), Named([0, 1]))


@pytest.mark.parametrize(("labels", "message"), [([0, -1], "from -1 to 0"), ([1, 2], "from 1 to 2")])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_that_are_no_class_are_refused(monkeypatch, labels, message, split):
    sets = {
        "train": Named([0, 1] * 4, {"ant": 0, "bee": 1}),
        "validation": Named([0, 1], {"ant": 0, "bee": 1}),
    }
    sets[split].targets = labels * 4
    with pytest.raises(DataError, match=f"the split '{split}' of hfds/some has labels {message}"):
        open_named(monkeypatch, sets["train"], sets["validation"])


@pytest.mark.parametrize("names", [{"ant": 0}, None])
def test_single_class_of_a_named_set_is_refused(monkeypatch, names):
    with pytest.raises(DataError, match="hfds/some has one single class"):
        open_named(monkeypatch, Named([0] * 8, names), Named([0] * 2, names))


def test_synonyms_are_one_class():
    """torchvision's ImageNet has several names for a class."""
    images = DecodedImages(Named([0, 1], {"tench": 0, "Tinca tinca": 0, "goldfish": 1}), "RGB")
    assert images.class_names() == ["tench", "goldfish"]
