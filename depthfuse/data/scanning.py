"""What a split folder holds: a class is a folder directly below it, and all images anywhere below belong to it.

Every entry is read, refused by name, or left out with a line in the log; nothing is passed over in silence.
"""

import logging
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from depthfuse.data import decoding
from depthfuse.data.targets import UNKNOWN
from depthfuse.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".webp", ".avif"),
        *(".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".ico", ".dds", ".qoi"),
        *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".tga", ".pcx", ".sgi", ".ras"),
    )
)
# Images too, but Pillow does not read them, or not as pixels.
_UNREADABLE_EXTENSIONS = frozenset(
    (
        *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"),  # of cameras
        *(".dcm", ".eps", ".exr", ".hdr", ".heic", ".heif", ".jxl", ".psd", ".svg", ".xcf"),
    )
)
_ANNOTATIONS = "_annotations.txt"
_UNSORTED = "."  # in the place of a class


class FolderImages:
    """Position -> (path, class number), in a fixed order.

    Attributes:
        samples: [N] (path, class number).
        class_to_idx: class name -> class number.
        real_folders: every folder, without links, that holds images directly.
        real_links: target, without links, of every image that is a link.
    """

    def __init__(self, samples: list[tuple[str, int]], class_to_idx: dict[str, int], found: "_Scan"):
        self.samples = samples
        self.class_to_idx = class_to_idx
        self.real_folders = found.image_folders
        self.real_links = frozenset(found.links)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.samples[index]

    def shared_with(self, other: "FolderImages") -> str | None:
        """A real folder or file whose images are in both, or None."""
        shared = self.real_folders & other.real_folders | self.real_links & other.real_links
        for one, another in ((self, other), (other, self)):
            shared |= {path for path in one.real_links if os.path.dirname(path) in another.real_folders}
        return min(shared, default=None)


def scan(folder: Path, *, natural: bool = True) -> FolderImages:
    """The images of a split.

    Links are followed, and what they lead to is counted once. Hidden entries and files that are no images are left out
    and logged. The split of Tiny-ImageNet that has its classes in a file (`images/` beside `val_annotations.txt`) is
    read too.

    Args:
        folder: of the split.
        natural: order classes and images by the numbers in their names, as timm does; else by character, as
            torchvision does.

    Raises:
        DataError: naming the folder or file that cannot be a part of a split.
    """
    found = _Scan(folder)
    classes = found.classes()
    annotations = [path for path in found.no_images if path.endswith(_ANNOTATIONS)]
    if list(classes) == ["images"] and len(annotations) == 1:
        found.no_images.remove(annotations[0])
        classes = _annotated(folder / "images", classes["images"], annotations[0])
    found.report()
    if len(classes) == 1:
        raise DataError(_single_class(folder, *classes))
    names = sorted(classes, key=lambda name: (_natural_key(name), name) if natural else name)
    class_to_idx = {name: number for number, name in enumerate(names)}
    samples = [(path, class_to_idx[name]) for name in names for path in classes[name]]
    # Paths that differ in case or leading zeros alone have the same natural key, so the path itself comes second.
    samples.sort(key=lambda s: (_natural_key(s[0]), s[0]) if natural else (names[s[1]], *os.path.split(s[0])))
    return FolderImages(samples, class_to_idx, found)


def scan_unsorted(folder: Path) -> FolderImages:
    """The images directly in a folder, of the class -1 each, by the numbers in their names.

    Raises:
        DataError: as `scan`; for class folders beside the images too.
    """
    found = _Scan(folder)
    paths = found.unsorted()
    found.report()
    if not paths:
        raise DataError(
            f"{folder} holds no image: those of the other split lie directly in it, without class folders"
        )
    paths.sort(key=lambda path: (_natural_key(path), path))
    return FolderImages([(path, UNKNOWN) for path in paths], {}, found)


def is_unsorted(folder: Path) -> bool:
    """Whether images lie directly in a folder, and there is no folder beside them."""
    with os.scandir(folder) as listing:
        entries = [entry for entry in listing if not entry.name.startswith(".")]
    return any(_is_image(entry.name) for entry in entries) and not any(entry.is_dir() for entry in entries)


@dataclass
class _Scan:
    """The walk through a split: who owns which real folder, and what was left out."""

    folder: Path
    root: str = ""  # the folder without links
    owners: dict[str, str] = field(default_factory=dict)  # real folder -> its class
    image_folders: set[str] = field(default_factory=set)  # real folders with images directly in them
    links: dict[str, str] = field(default_factory=dict)  # real target of an image that is a link -> its class
    hidden: list[str] = field(default_factory=list)
    no_images: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)

    def classes(self) -> dict[str, list[str]]:
        """Class name -> paths of its images."""
        self.root = os.path.realpath(self.folder)
        entries = list(self._entries(str(self.folder)))
        if any(_is_image(entry.name) for entry, is_folder in entries if not is_folder):
            raise DataError(
                f"images lie directly in {self.folder}: it needs one sub-folder for each class, or, for images "
                "without classes, no sub-folder in any split"
            )
        paths, linked = {}, {}
        for entry, is_folder in entries:
            if not is_folder:
                self.no_images.append(entry.path)
                continue
            if entry.name != shown(entry.name):
                raise DataError(f"the name of the class folder {shown(entry.path)} is not UTF-8: rename it")
            real = self._real_folder(entry, self.root, entry.name)
            if real is not None:
                paths[entry.name], linked[entry.name] = self._images(entry.name, entry.path, real)
        if not paths:
            what = "holds no class folder" if entries else "is empty"
            raise DataError(f"{self.folder} {what}: it needs one sub-folder for each class")
        for name, links in linked.items():
            paths[name] += [path for path in links if self._is_new(path, name)]
        for name, images in paths.items():
            if not images:
                raise DataError(
                    f"the class folder {shown(str(self.folder / name))} holds no image "
                    f"({', '.join(sorted(IMAGE_EXTENSIONS)[:6])}, ...): "
                    "add some, or remove the folder"
                )
        return paths

    def unsorted(self) -> list[str]:
        """Paths of the images directly in the folder, where it has no class folders."""
        self.root = os.path.realpath(self.folder)
        self.owners[self.root] = _UNSORTED
        files, links = self._images(_UNSORTED, str(self.folder), self.root)
        below = [real for real in self.owners if real != self.root]
        if below:
            raise DataError(
                f"{self.folder} holds the folder {shown(os.path.basename(below[0]))}, where images without classes are "
                "expected, as in the other split: put them all directly into it, or all into class folders"
            )
        return [*files, *(path for path in links if self._is_new(path, _UNSORTED))]

    def _images(self, name: str, path: str, real: str) -> tuple[list[str], list[str]]:
        """Paths of the images below a class folder: (files, links to files)."""
        files, links = [], []
        pending = [(path, real)]
        while pending:
            path, real = pending.pop()
            for entry, is_folder in self._entries(path):
                if is_folder:
                    below = self._real_folder(entry, real, name)
                    if below is not None:
                        pending.append((entry.path, below))
                elif not _is_image(entry.name):
                    self.no_images.append(entry.path)
                elif entry.is_symlink():
                    links.append(entry.path)
                else:
                    files.append(entry.path)
                    self.image_folders.add(real)
        return files, links

    def _entries(self, path: str) -> Iterator[tuple[os.DirEntry[str], bool]]:
        """(entry, whether it is a folder) of all that is not hidden, by name."""
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"cannot list the folder {shown(path)}: {error.strerror}") from error
        for entry in entries:
            if entry.name.startswith("."):
                self.hidden.append(entry.path)
                continue
            is_folder, is_file = _kind(entry)
            if not (is_folder or is_file):
                raise DataError(
                    f"{shown(entry.path)} is neither a file nor a folder, but a pipe, a socket, a device or a link "
                    "that leads nowhere: remove it"
                )
            yield entry, is_folder

    def _real_folder(self, entry: os.DirEntry[str], parent: str, name: str) -> str | None:
        """The folder without links, or None where its images are counted already.

        Args:
            parent: the folder that holds the entry, without links.
            name: of the class.
        """
        real = os.path.join(parent, entry.name)
        if entry.is_symlink():
            real = os.path.realpath(entry.path)
            if any(os.path.commonpath([real, inner]) == real for inner in (self.root, parent)):  # a loop
                self.repeated.append(entry.path)
                return None
        owner = self.owners.get(real)
        if owner is None:
            self.owners[real] = name
            return real
        if owner != name:
            raise DataError(_two_classes(entry.path, real, owner, name))
        self.repeated.append(entry.path)
        return None

    def _is_new(self, path: str, name: str) -> bool:
        """Whether the image that a link leads to is not counted yet, by itself or by another link."""
        real = os.path.realpath(path)
        folder, file = os.path.split(real)
        owner = self.owners.get(folder) if _is_image(file) and not file.startswith(".") else None
        owner = owner or self.links.get(real)
        if owner is None:
            self.links[real] = name
            return True
        if owner != name:
            raise DataError(_two_classes(path, real, owner, name))
        self.repeated.append(path)
        return False

    def report(self) -> None:
        """Log what was left out, and refuse images in disguise."""
        by_extension = {os.path.splitext(path)[1].lower(): path for path in reversed(self.no_images)}
        for extension, path in by_extension.items():
            if extension in _UNREADABLE_EXTENSIONS:
                raise DataError(
                    f"{shown(path)} is an image of a kind that is not read: convert it, to PNG for instance"
                )
            if _looks_like_image(path):
                raise DataError(
                    f"{shown(path)} is an image by its content, but not by its name: rename or remove it"
                )
        for paths, what in (
            (self.no_images, "files that are no images"),
            (self.hidden, "hidden entries"),
            (self.repeated, "links to what is counted already"),
        ):
            if paths:
                logger.warning(
                    "%s: left out %d %s, such as %s", self.folder, len(paths), what, shown(paths[0])
                )


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether the entry is, or is a link to, (a folder, a regular file)."""
    if not entry.is_symlink():  # then no file has to be touched
        return entry.is_dir(), entry.is_file()
    try:
        mode = os.stat(entry.path).st_mode
    except OSError:  # it leads nowhere, or in a circle
        return False, False
    return stat.S_ISDIR(mode), stat.S_ISREG(mode)


def _annotated(folder: Path, paths: list[str], annotations: str) -> dict[str, list[str]]:
    """Class name -> paths, from lines of "FILE NAME <tab> CLASS <tab> ...", as Tiny-ImageNet has them.

    Raises:
        DataError: a line is something else, or files and lines do not match one to one.
    """
    by_name = {os.path.relpath(path, folder): path for path in paths}
    try:
        lines = Path(annotations).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {shown(annotations)}: {error}") from error
    classes: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0].strip()
        path = by_name.pop(name, None)
        if path is None or not label:
            raise DataError(
                f"line {number} of {shown(annotations)} is {line[:80]!r}, where the name of an image of its folder "
                "images, not named before, a tab and a class are expected"
            )
        classes.setdefault(label, []).append(path)
    if by_name:
        raise DataError(
            f"{shown(annotations)} gives no class to {len(by_name)} images, such as {shown(min(by_name))}"
        )
    return classes


def _single_class(folder: Path, name: str) -> str:
    below = folder / name
    inner = sorted(entry.name for entry in below.iterdir() if entry.is_dir()) if below.is_dir() else []
    hint = (
        f"if {', '.join(map(shown, inner[:3]))} are the classes, name {folder.name}/{name} as the split"
        if len(inner) > 1
        else f"sort the images into one folder a class, or name their classes in {folder.name}{_ANNOTATIONS}"
    )
    return (
        f"{folder} has one single class, {name!r}, and there is nothing to tell apart: a class is a folder directly "
        f"below the split; {hint}"
    )


def _two_classes(path: str, real: str, first: str, second: str) -> str:
    return (
        f"{shown(path)} leads to {shown(real)}, so that the same images are of the classes {first!r} and {second!r}: "
        "remove one of the links"
    )


def _looks_like_image(path: str) -> bool:
    try:
        with decoding.open_image(path) as image:
            # The others have no distinctive first bytes: text and tables may pass for them.
            return image.format not in ("DIB", "PCX", "PPM", "SGI", "SUN", "TGA")
    except Image.DecompressionBombError:
        return True
    except Exception:  # what Pillow's parsers raise on something else knows no bounds
        return False


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def shown(path: str) -> str:
    """A path for messages: bytes that are not UTF-8, which no log could encode, as backslashes and digits."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _natural_key(text: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())]
