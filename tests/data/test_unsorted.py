"""Images without classes: opened where the number of classes is known, divided in a fixed way, and answered for."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from depthfuse.data import DataConfig, DataError, has_no_classes, open_data

CLASSES = 5


@pytest.fixture
def flat(tmp_path):
    """Returns a function that writes images directly into folders: {folder: number of images} -> root."""

    def make(folders):
        root, rng = tmp_path / "images", np.random.RandomState(0)
        for name, count in folders.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = rng.randint(0, 256, (30, 34, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / f"{number}.png")
        return root

    return make


def opened(root, **settings):
    given = {"batch_size": 4, "img_size": 16, "holdout": 0.25, **settings}
    return open_data(DataConfig(data=str(root), **given), num_classes=CLASSES)


def images_of(loader):
    return torch.cat([images for images, _ in loader])


def answers_of(bundle):
    """A made-up answer of each image, by its pixels."""
    parts = {name: images_of(batches) for name, batches in bundle.questions().items()}
    return {name: (1000 * images.abs().sum((1, 2, 3))).long() % CLASSES for name, images in parts.items()}


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_answers_become_the_targets(flat, in_memory, workers):
    if in_memory and workers:
        pytest.skip("nothing is left to workers")
    bundle = opened(flat({"train": 16, "val": 6}), in_memory=in_memory, workers=workers)
    assert not bundle.labelled and bundle.class_names == ["0", "1", "2", "3", "4"]
    assert all(bool((labels == -1).all()) for _, labels in bundle.val_loader())
    answers = answers_of(bundle)
    assert {name: len(given) for name, given in answers.items()} == {"train": 12, "holdout": 4, "val": 6}
    known = bundle.answered(answers, "there")
    assert known.labelled and not bundle.labelled
    for name, loader in (("val", known.val_loader()), ("holdout", known.holdout_loader())):
        assert torch.equal(torch.cat([labels for _, labels in loader]), answers[name])
    by_position = dict(zip(known.train_positions.tolist(), answers["train"].tolist(), strict=True))
    for loader in (known.train_loader(seed=1, epoch=2), known.train_loader(seed=1, epoch=2, start_batch=1)):
        assert all(len(labels) == 4 and int(labels.min()) >= 0 for _, labels in loader)
    # an image keeps its answer, whatever becomes of it in an epoch
    from depthfuse.data import order

    shuffled = order.epoch_order(known.train_positions, 1, 2).tolist()
    labels = torch.cat([labels for _, labels in known.train_loader(seed=1, epoch=2)]).tolist()
    assert labels == [by_position[position] for position in shuffled]
    calibration = [label for _, labels in known.calibration_loader(12) for label in labels.tolist()]
    assert sorted(calibration) == sorted(answers["train"].tolist())


def test_one_folder_without_splits_is_divided_in_a_fixed_way(flat):
    root = flat({"": 40})
    bundle, again = opened(root), opened(root, batch_size=2)
    parts = [bundle.train_positions, bundle.holdout_positions, bundle.val_positions]
    assert [len(part) for part in parts] == [27, 9, 4]
    assert torch.cat(parts).sort().values.tolist() == list(range(40))
    assert torch.equal(bundle.val_positions, again.val_positions)
    known = bundle.answered(answers_of(bundle), "there")
    assert all(int(labels.min()) >= 0 for _, labels in known.val_loader())


def test_what_has_no_classes(flat, tmp_path):
    assert has_no_classes(DataConfig(data=str(flat({"train": 1, "val": 1}))))
    assert not has_no_classes(DataConfig()) and not has_no_classes(DataConfig(data=str(tmp_path / "nowhere")))


def test_class_folders_have_classes(folder):
    assert not has_no_classes(DataConfig(data=str(folder)))


@pytest.mark.parametrize(
    ("folders", "settings", "message"),
    [
        (
            {"train": 8, "val": 2, "train/ant": 1},
            {},
            "images lie directly in .*train: .* no sub-folder in any split",
        ),
        (
            {"train": 8, "val/ant": 2},
            {},
            "val holds the folder ant, where images without classes are expected",
        ),
        ({"train/ant": 8, "train/bee": 8, "val": 2}, {}, "images lie directly in .*val"),
        ({"": 3}, {}, "holds 3 images, too few"),
        ({"": 40}, {"holdout_split": "kept"}, "has no splits, and so no 'kept'"),
        ({"train": 8}, {}, "has no folder for the split 'validation'"),
    ],
)
def test_what_cannot_be_opened_is_named(flat, folders, settings, message):
    with pytest.raises(DataError, match=message):
        opened(flat(folders), **settings)


def test_without_a_number_of_classes_it_says_what_to_give(flat):
    config = DataConfig(data=str(flat({"train": 8, "val": 2})), batch_size=4, img_size=16)
    with pytest.raises(
        DataError, match="images lie directly in .*train: sort them .* or say how many classes"
    ):
        open_data(config, num_classes=None)


def test_links_and_other_files_are_treated_as_in_class_folders(flat, tmp_path, caplog):
    root = flat({"train": 8, "val": 3})
    (root / "train" / "notes.txt").write_text("no image")
    os.symlink(root / "train" / "0.png", root / "train" / "again.png")
    bundle = opened(root, holdout=0.0)
    assert len(bundle.train_positions) == 8
    assert "left out 1 files that are no images" in caplog.text and "links to what is counted" in caplog.text
    os.symlink(root / "train" / "1.png", root / "val" / "1b.png")
    with pytest.raises(DataError, match="holds images of the split 'train'"):
        opened(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("val"), "none for the 6 of val"),
        (lambda a: a.update(train=a["train"][1:]), r"\[11\] torch.int64 for the 12 of train"),
        (lambda a: a.update(val=a["val"] + CLASSES), "classes of val that are not 0 to 4"),
    ],
)
def test_answers_for_other_images_are_refused(flat, change, message):
    bundle = opened(flat({"train": 16, "val": 6}))
    answers = answers_of(bundle)
    change(answers)
    with pytest.raises(DataError, match=f"answers.safetensors .*{message}"):
        bundle.answered(answers, "answers.safetensors")
