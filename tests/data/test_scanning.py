"""Folders as people have them: what counts as an image and of which class, and what is refused by name."""

import logging
import os
import socket

import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from torchvision.datasets import ImageFolder

from depthfuse.data import DataConfig, DataError, open_data, scanning

KINDS = ["folder", "torch/image_folder"]


def save(path, grey=0, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (grey,) * 3).save(path, **kwargs)


def open_root(root, kind="folder", num_classes=None, **kwargs):
    where = {"data": str(root)} if kind == "folder" else {"data": kind, "data_dir": str(root)}
    config = DataConfig(**where, **({"img_size": 8, "batch_size": 2, "crop_pct": 1.0} | kwargs))
    return open_data(config, num_classes=num_classes)


def samples(bundle):
    """[(path, class name)] of all training images."""
    return [(path, bundle.class_names[number]) for path, number in bundle._train.images.items.samples]


@pytest.fixture
def tiny(tmp_path):
    """The layout of Tiny-ImageNet; the grey level of a validation image is 50 times its class number."""
    lines = []
    for number, name in enumerate(("n01", "n02", "n10")):
        for image in range(4):
            save(tmp_path / "train" / name / "images" / f"{name}_{image}.JPEG")
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
        for file in (f"val_{7 - number}.JPEG", f"val_{10 + number}.JPEG"):
            save(tmp_path / "val" / "images" / file, 50 * number)
            lines.append(f"{file}\t{name}\t0\t32\t44\t62\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    save(tmp_path / "test" / "images" / "test_0.JPEG")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_imagenet_is_read_as_it_lies(tiny, kind):
    bundle = open_root(tiny, kind, num_classes=3)
    assert bundle.class_names == ["n01", "n02", "n10"]
    assert len(samples(bundle)) == 12
    assert all(os.sep + name + os.sep in path for path, name in samples(bundle))
    ((images, labels),) = list(bundle.val_loader())
    grey = (images[:, 0, 4, 4] * bundle.std[0] + bundle.mean[0]) * 255
    assert (grey / 50).round().long().tolist() == labels.tolist()
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("val_7.JPEG\t", "val_8.JPEG\t"), "line 6 .*'val_8.JPEG"),
        (lambda text: text.replace("val_7.JPEG\t", "val_6.JPEG\t"), "line 6 .*'val_6.JPEG"),
        (lambda text: text[: text.rindex("val_")], "no class to 1 images, such as .*val_7.JPEG"),
        (lambda text: text.replace("\t", " "), "line 1 .*a tab and a class are expected"),
        (lambda text: "", "no class to 6 images"),
        (lambda text: text.replace("n10", "n03"), "only in train: n10; only in validation: n03"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(tiny, change, message):
    path = tiny / "val" / "val_annotations.txt"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        open_root(tiny)


def test_images_without_classes_are_refused(tiny):
    (tiny / "val" / "val_annotations.txt").unlink()
    with pytest.raises(
        DataError, match="one single class, 'images'.*name their classes in val_annotations.txt"
    ):
        open_root(tiny)


def test_class_is_the_first_folder_whatever_lies_below(tmp_path):
    for split in ("train", "val"):
        for file in ("ant/0.jpg", "ant/red/1.jpg", "ant/red/small/2.jpg", "bee/red/0.jpg", "bee/blue/0.jpg"):
            save(tmp_path / split / file)
    bundle = open_root(tmp_path)
    assert bundle.class_names == ["ant", "bee"]
    assert [name for _, name in samples(bundle)] == ["ant"] * 3 + ["bee"] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_single_class_is_refused(make_folder, kind):
    root = make_folder({"train": {"ant": 4}, "val": {"ant": 2}})
    with pytest.raises(DataError, match="train has one single class, 'ant'"):
        open_root(root, kind)


def test_classes_a_level_too_deep_are_refused_and_can_be_named(tmp_path):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            save(tmp_path / split / "images" / name / "0.jpg")
    with pytest.raises(DataError, match="if ant, bee are the classes, name train/images as the split"):
        open_root(tmp_path)
    bundle = open_root(tmp_path, train_split="train/images", val_split="val/images")
    assert bundle.class_names == ["ant", "bee"]


def test_order_is_that_of_timm_and_of_torchvision(tmp_path):
    for name in ("c10", "c9", "B", "a"):
        for file in ("10.jpg", "9.png", "b_2.JPEG", "A_11.jpg", "a_1.jpeg"):
            save(tmp_path / name / file)
    found = scanning.scan(tmp_path)
    assert (found.samples, found.class_to_idx) == find_images_and_targets(str(tmp_path))
    found, expected = scanning.scan(tmp_path, natural=False), ImageFolder(str(tmp_path))
    assert (found.samples, found.class_to_idx) == (expected.samples, expected.class_to_idx)


def test_order_of_names_alike_but_for_case_or_zeros_is_fixed(tmp_path):
    for name in ("ant", "Ant", "ANT", "7", "07", "2²"):
        for file in ("1.png", "01.png", "A.png", "a.png"):
            save(tmp_path / name / file)
    found = scanning.scan(tmp_path)
    assert list(found.class_to_idx) == ["2²", "07", "7", "ANT", "Ant", "ant"]
    files = [os.path.basename(path) for path, number in found.samples if number == 0]
    assert files == ["01.png", "1.png", "A.png", "a.png"]


# Links.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_loop_does_not_multiply_images(folder, caplog, kind, target):
    (folder / "train" / "ant" / "again").symlink_to(target)
    bundle = open_root(folder, kind)
    assert len(samples(bundle)) == 24
    assert f"left out 1 links to what is counted already, such as {folder}/train/ant/again" in caplog.text


@pytest.mark.parametrize("target", [".", ".."])
def test_loop_is_no_class(folder, target):
    (folder / "train" / "again").symlink_to(target)
    assert open_root(folder).class_names == ["ant", "bee", "cat"]


@pytest.mark.parametrize("kind", KINDS)
def test_linked_classes_splits_and_images_are_read(folder, tmp_path, kind):
    (folder / "train" / "ant").rename(tmp_path / "elsewhere")
    (folder / "train" / "ant").symlink_to(tmp_path / "elsewhere")
    (folder / "train" / "bee" / "0.jpg").rename(tmp_path / "blob")  # as in the cache of Hugging Face
    (folder / "train" / "bee" / "0.jpg").symlink_to("../../../blob")
    (folder / "val").rename(tmp_path / "other")
    (folder / "val").symlink_to(tmp_path / "other")
    bundle = open_root(folder, kind)
    assert [name for _, name in samples(bundle)] == ["ant"] * 12 + ["bee"] * 8 + ["cat"] * 4
    assert len(bundle.val_positions) == 6
    assert len(list(bundle.train_loader(seed=0, epoch=0))) == 11  # all can be opened


def test_several_links_to_the_same_count_once(folder, tmp_path, caplog):
    ant = folder / "train" / "ant"
    save(tmp_path / "elsewhere" / "x.png")
    (ant / "first").symlink_to(tmp_path / "elsewhere")
    (ant / "second").symlink_to(tmp_path / "elsewhere")
    (ant / "copy.jpg").symlink_to("0.jpg")
    (ant / "copy.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    save(tmp_path / "y.png")
    (ant / "y.png").symlink_to(tmp_path / "y.png")
    (ant / "z.png").symlink_to(tmp_path / "y.png")
    os.link(ant / "0.jpg", ant / "hard.jpg")  # a file like any other
    bundle = open_root(folder)
    assert [name for _, name in samples(bundle)].count("ant") == 12 + 1 + 1 + 1
    assert "left out 4 links" in caplog.text


@pytest.mark.parametrize(
    ("link", "target"),
    [("ant/more", "../bee"), ("dog", "bee"), ("ant/0.png", "../bee/0.jpg"), ("cat/0.png", "../ant/0.jpg")],
)
def test_images_of_two_classes_are_refused(folder, link, target):
    (folder / "train" / link).symlink_to(target)
    with pytest.raises(DataError, match="the same images are of the classes"):
        open_root(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holdout", [False, True])
@pytest.mark.parametrize("what", ["split", "class", "class of train", "image", "both images"])
def test_training_images_in_another_split_are_refused(folder, tmp_path, kind, what, holdout):
    other = folder / "val"
    splits = {}
    if holdout:
        other = other.rename(folder / "extra")
        for name in ("ant", "bee", "cat"):
            save(folder / "val" / name / "fresh.png")
        splits = {"holdout_split": "extra"}
    if what == "split":
        for name in ("ant", "bee", "cat"):
            for image in (other / name).iterdir():
                image.unlink()
            (other / name).rmdir()
        other.rmdir()
        other.symlink_to("train")
    elif what == "class":
        (other / "ant" / "more").symlink_to(folder / "train" / "ant")
    elif what == "class of train":
        (folder / "train" / "ant" / "more").symlink_to(other / "ant")
    elif what == "image":
        (other / "ant" / "more.jpg").symlink_to(folder / "train" / "ant" / "3.jpg")
    else:
        save(tmp_path / "apart.png")
        for split in (folder / "train", other):
            (split / "ant" / "more.png").symlink_to(tmp_path / "apart.png")
    message = "'extra'" if holdout else "'validation'"
    with pytest.raises(DataError, match=f"the split {message} .* holds images of the split 'train'"):
        open_root(folder, kind, **splits)


def test_one_split_named_twice_is_refused(folder):
    with pytest.raises(DataError, match="holds images of the split 'train'"):
        open_root(folder, val_split="train")


# What is no image.

# Extensions that Pillow saves as something else, or not at all.
SAVED_AS = {".j2c": "JPEG2000", ".pbm": "PPM", ".pfm": "PPM", ".ras": "PNG", ".avif": "PNG"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_usual_extension_is_read(folder, kind):
    names = []
    for extension in sorted(scanning.IMAGE_EXTENSIONS):
        for name in (f"small{extension}", f"LARGE{extension.upper()}"):
            save(folder / "train" / "ant" / name, format=SAVED_AS.get(extension))
            names.append(name)
    bundle = open_root(folder, kind, batch_size=1, holdout=0.0)
    found = [os.path.basename(path) for path, name in samples(bundle) if name == "ant"]
    assert sorted(found) == sorted(names + [f"{number}.jpg" for number in range(12)])
    assert len(list(bundle.train_loader(seed=0, epoch=0))) == len(names) + 24
    assert {".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"} <= scanning.IMAGE_EXTENSIONS


@pytest.mark.parametrize("kind", KINDS)
def test_other_files_and_hidden_ones_are_left_out_and_said(folder, caplog, kind):
    ant = folder / "train" / "ant"
    (ant / "Thumbs.db").write_bytes(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(100))
    (ant / "list.txt").write_text("P1 is where\nit was taken: by me\n")
    (ant / "boxes.csv").write_text("0.jpg,1,2\n")
    (ant / "README").write_text("")
    (folder / "train" / "classes.json").write_text("{}")
    for hidden in (ant / "._0.jpg", ant / ".DS_Store", folder / "train" / ".DS_Store"):
        hidden.write_bytes(b"\x00\x05\x16\x07")
    save(folder / "train" / ".ipynb_checkpoints" / "0.png")
    save(folder / "train" / "bee" / ".trash" / "0.png")
    bundle = open_root(folder, kind)
    assert bundle.class_names == ["ant", "bee", "cat"]
    assert len(samples(bundle)) == 24
    assert f"{folder}/train: left out 5 files that are no images, such as {folder}/train/" in caplog.text
    assert f"{folder}/train: left out 5 hidden entries, such as {folder}/train/." in caplog.text
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_a_plain_folder_says_nothing(folder, caplog):
    open_root(folder)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["0.heic", "0.JXL", "0.svg", "0.nef"])
def test_images_of_other_kinds_are_refused(folder, name):
    (folder / "train" / "ant" / name).write_bytes(b"anything")
    with pytest.raises(DataError, match=f"{folder}/train/ant/{name} is an image of a kind that is not read"):
        open_root(folder)


@pytest.mark.parametrize("name", ["photo", "photo.jpg_large", "photo.data"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_by_content_alone_are_refused(folder, name, format):
    save(folder / "train" / "ant" / name, format=format)
    with pytest.raises(DataError, match=f"{name} is an image by its content, but not by its name"):
        open_root(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["train/ant/0.png", "train/ant/deep/0.png", "train/pipe", "val/ant/pipe"])
@pytest.mark.parametrize(
    "what", ["pipe", "link to pipe", "socket", "device", "link to nothing", "link to itself"]
)
def test_only_regular_files_are_opened(folder, tmp_path, kind, where, what):
    path = folder / where
    path.parent.mkdir(exist_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "link to pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    elif what == "socket":
        before = os.getcwd()
        os.chdir(path.parent)  # the path of a socket may have 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        finally:
            os.chdir(before)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to("nowhere" if what == "link to nothing" else path.name)
    with pytest.raises(DataError, match=f"{path} is neither a file nor a folder"):
        open_root(folder, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_file_that_becomes_a_device_later_is_not_opened(folder, kind):
    bundle = open_root(folder, kind)
    path = folder / "val" / "bee" / "1.jpg"
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"cannot read image {path}: it is not a regular file"):
        list(bundle.val_loader())


def test_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    def scandir(path):
        if str(path).endswith("/bee"):
            raise PermissionError(13, "Permission denied")
        return os_scandir(path)

    os_scandir = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=f"cannot list the folder {folder}/train/bee: Permission denied"):
        open_root(folder)


def test_split_without_class_folders(folder):
    for name in ("ant", "bee", "cat"):
        for image in (folder / "val" / name).iterdir():
            image.unlink()
        (folder / "val" / name).rmdir()
    (folder / "val" / "list.txt").write_text("x")
    with pytest.raises(DataError, match=f"{folder}/val holds no class folder"):
        open_root(folder)


def test_names_that_are_not_utf8(folder):
    image = os.fsencode(folder / "train" / "bee") + b"/\xe9.jpg"
    with open(image, "wb") as file:
        file.write(b"no image")
    bundle = open_root(folder, holdout=0.0)
    with pytest.raises(DataError, match=r"cannot read image .*/bee/\\xe9\.jpg: ") as caught:
        list(bundle.train_loader(seed=0, epoch=0))
    str(caught.value).encode("utf-8")
    os.remove(image)
    os.rename(folder / "train" / "bee", os.fsencode(folder / "train") + b"/b\xe9")
    with pytest.raises(DataError, match=r"the class folder .*/train/b\\xe9 is not UTF-8"):
        open_root(folder)


def test_torchvision_folder_needs_its_splits(make_folder, tmp_path):
    root = make_folder({"ant": {"x": 2}, "bee": {"x": 2}})
    with pytest.raises(DataError, match="no folder for the split 'train'"):
        open_root(root, "torch/folder")
    with pytest.raises(DataError, match="needs the folder of its splits as data_dir, not None"):
        open_data(DataConfig(data="torch/folder"), num_classes=None)
