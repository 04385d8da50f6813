"""Streamed data, as WebDataset shards: order, resuming, and its own errors."""

import io
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from shards import CLASSES, IMAGES, numbers, write_shards
from shards import shard_config as config

from depthfuse.data import DataConfig, DataError, open_data
from depthfuse.data.stream import StreamBundle
from depthfuse.data.transforms import InputFormat

pytest.importorskip("webdataset", reason="WebDataset is an optional dependency (extra: data)")


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_epoch_repeats_and_resumes(shards, workers):
    bundle = open_data(config(shards, workers=workers), num_classes=CLASSES)
    assert bundle.train_batches() == 4
    whole = list(bundle.train_loader(seed=1, epoch=2))
    torch.rand(3)
    again = list(
        open_data(config(shards, workers=workers), num_classes=CLASSES).train_loader(seed=1, epoch=2)
    )
    rest = list(bundle.train_loader(seed=1, epoch=2, start_batch=3))
    assert (len(whole), len(rest)) == (4, 1)
    for (a, b), (c, d) in [*zip(whole, again, strict=True), (whole[3], rest[0])]:
        assert torch.equal(a, c) and torch.equal(b, d)
    other = list(bundle.train_loader(seed=1, epoch=3))
    assert not all(torch.equal(a, c) for (a, _), (c, _) in zip(whole, other, strict=True))


def test_each_process_trains_on_its_own_share_and_resumes(shards):
    bundle = open_data(config(shards, augment="none"), num_classes=CLASSES)
    assert bundle.train_batches(2) == 2

    def epoch(rank, start_batch=0):
        loader = bundle.train_loader(seed=1, epoch=2, rank=rank, world_size=2, start_batch=start_batch)
        return [numbers(bundle, images).tolist() for images, _ in loader]

    shares = [epoch(rank) for rank in range(2)]
    assert [[len(batch) for batch in share] for share in shares] == [[5, 5], [5, 5]]
    first, second = ({number for batch in share for number in batch} for share in shares)
    assert len(first) == len(second) == 10 and not first & second
    assert [epoch(rank, start_batch=1) for rank in range(2)] == [share[1:] for share in shares]
    with pytest.raises(DataError, match="2 shards .* 3 processes .* 1 worker"):
        bundle.train_loader(seed=1, epoch=2, rank=2, world_size=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_other_batches_of_the_same_shards(shards, workers):
    data = open_data(config(shards, workers=workers), num_classes=CLASSES)
    other = data.batched(data.config.batch_size // 2)
    loader = other.train_loader(seed=1, epoch=0)
    assert len(loader) >= 2 * data.train_batches()
    assert [len(images) for images, _ in loader] == [other.config.batch_size] * len(loader)


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_evaluation_shows_every_image_once(shards, workers):
    bundle = open_data(config(shards, workers=workers), num_classes=CLASSES)
    batches = [numbers(bundle, images) for images, _ in bundle.val_loader()]
    assert [len(batch) for batch in batches] == [10, 10, 4]
    assert sorted(torch.cat(batches).tolist()) == list(range(IMAGES))
    assert [len(labels) for _, labels in bundle.calibration_loader(IMAGES)] == [8, 8, 8]


def test_evaluation_without_workers_is_in_order(shards):
    bundle = open_data(config(shards), num_classes=CLASSES)
    batches = list(bundle.val_loader())
    assert len(batches) == len(bundle.val_loader()) == 3
    assert torch.cat([numbers(bundle, images) for images, _ in batches]).tolist() == list(range(IMAGES))
    assert torch.cat([labels for _, labels in batches]).tolist() == [n % 3 for n in range(IMAGES)]
    assert [len(labels) for _, labels in bundle.calibration_loader(15)] == [7, 7]


def test_holdout_needs_a_split_of_its_own(shards):
    with pytest.raises(DataError, match="name a holdout_split"):
        open_data(config(shards), num_classes=CLASSES).holdout_loader()
    bundle = open_data(config(shards, holdout_split="val-1.tar|12"), num_classes=CLASSES)
    images = torch.cat([images for images, _ in bundle.holdout_loader()])
    assert numbers(bundle, images).tolist() == list(range(12, 24))


def test_errors_name_the_fault(shards):
    with pytest.raises(DataError, match="max_train_images"):
        open_data(config(shards, max_train_images=5), num_classes=CLASSES)
    with pytest.raises(DataError, match="how many"):
        open_data(config(shards), num_classes=None)
    with pytest.raises(DataError, match="does not say how many images its split 'train-0.tar'"):
        open_data(config(shards, train_split="train-0.tar"), num_classes=CLASSES)
    with pytest.raises(DataError, match="24 training images .* batch of 64"):
        open_data(config(shards, batch_size=64), num_classes=CLASSES)
    bundle = open_data(config(shards), num_classes=2)
    with pytest.raises(DataError, match="an image of class 2, but has 2"):
        list(bundle.val_loader())


class Reader:
    """What timm's readers have in common."""

    num_samples = 8
    dist_rank, dist_num_replicas = 0, 1


def bundle_of(reader, config):
    """A stream of timm that nobody can open here."""
    format = InputFormat(3, 16, (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0, "center")
    images = SimpleNamespace(reader=reader)
    return StreamBundle(
        config,
        ["a", "b"],
        format,
        open_split=lambda *_: images,
        train_transform=None,
        eval_transform=None,
    )


def test_streams_that_cannot_be_divided_are_refused():
    config = DataConfig(data="tfds/some", batch_size=2)
    bundle = bundle_of(Reader(), config)
    bundle.train_loader(seed=0, epoch=0)
    with pytest.raises(DataError, match="set workers to 1 or more"):
        bundle.train_loader(seed=0, epoch=0, world_size=2)
    with pytest.raises(DataError, match="cannot be told which share of tfds/some"):
        bundle_of(SimpleNamespace(num_samples=8), config)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_pixels_are_those_that_a_folder_gives(tmp_path, in_chans):
    """16 bits, transparency and EXIF turns, which timm's own conversion would lose."""
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    alpha = Image.fromarray(np.stack([deep // 257] * 3 + [255 - deep // 257], -1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {"deep": (Image.fromarray(deep), {}), "clear": (alpha, {}), "turned": (alpha, {"exif": exif})}
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for number, (name, (image, options)) in enumerate(files.items()):
            for split in ("train", "val"):  # one image a class
                path = tmp_path / "folder" / split / str(number) / f"{name}.png"
                path.parent.mkdir(parents=True)
                image.save(path, **options)
            for suffix, data in (("png", path.read_bytes()), ("cls", b"%d" % number)):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (tmp_path / "other.tar").write_bytes((tmp_path / "all.tar").read_bytes())
    common = {"img_size": 16, "batch_size": 1, "crop_pct": 1.0}
    stream = DataConfig(
        data="wds/x", data_dir=str(tmp_path), train_split="other.tar|3", val_split="all.tar|3", **common
    )
    folder = DataConfig(data=str(tmp_path / "folder"), **common)
    (given, labels), (expected, expected_labels) = (
        next(iter(open_data(config, num_classes=3, in_chans=in_chans).val_loader()))
        for config in (stream, folder)
    )
    assert torch.equal(labels, expected_labels) and torch.equal(given, expected)


@pytest.mark.parametrize("split", ["val_split", "holdout_split"])
def test_training_images_are_not_measured_on(shards, split):
    same = config(shards).train_split
    with pytest.raises(DataError, match="is trained on and measured on: name another split"):
        open_data(config(shards, **{split: same}), num_classes=CLASSES)
