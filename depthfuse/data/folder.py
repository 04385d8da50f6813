"""Find the splits of a folder of images, and check what timm's reader would pass over in silence."""

import os
from pathlib import Path

from timm.data.readers.img_extensions import get_img_extensions

from depthfuse.errors import DataError

_SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation", "test"),
}
_SYNONYMS |= {name: _SYNONYMS["validation"] for name in ("val", "valid", "eval", "evaluation")}


def split_folder(root: Path, split: str) -> Path:
    """The sub-folder of a split, by its name or a usual synonym of it.

    Raises:
        DataError: no such sub-folder.
    """
    tried = [split, *(name for name in _SYNONYMS.get(split, ()) if name != split)]
    for name in tried:
        if (root / name).is_dir():
            return root / name
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    raise DataError(
        f"{root} has no folder for the split {split!r} (tried {', '.join(tried)}; "
        f"found {', '.join(found[:10]) or 'none'}): it needs one folder a split, and in it one folder a class"
    )


def check_classes(folder: Path) -> None:
    """Check that a split holds one folder a class, each with an image.

    timm would drop an empty class, shifting the numbers of all later ones, and take loose images for a class.

    Raises:
        DataError: naming the folder.
    """
    extensions = get_img_extensions(as_set=True)
    for path, subfolders, files in os.walk(folder, followlinks=True):
        has_images = any(os.path.splitext(name)[1].lower() in extensions for name in files)
        if Path(path) == folder:
            if has_images:
                raise DataError(f"images lie directly in {folder}: it needs one sub-folder for each class")
            if not subfolders:
                raise DataError(f"{folder} is empty: it needs one sub-folder for each class")
        elif not has_images and not subfolders:
            raise DataError(
                f"the class folder {path} holds no image ({', '.join(sorted(extensions)[:6])}, ...): "
                "add some, or remove the folder"
            )


def check_same_classes(train: list[str], other: list[str], train_name: str, other_name: str) -> None:
    """Raises DataError that names the classes which only one of two splits has."""
    if train == other:
        return
    lines = [
        f"only in {name}: {', '.join(sorted(only)[:8])}"
        for name, only in ((train_name, set(train) - set(other)), (other_name, set(other) - set(train)))
        if only
    ]
    raise DataError(
        f"{train_name} has {len(train)} classes and {other_name} {len(other)}, and they are not the same "
        f"({'; '.join(lines) or 'their order differs'})"
    )
