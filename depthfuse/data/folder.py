"""Find the splits of a data set, and check that they fit together."""

from pathlib import Path

from depthfuse.errors import DataError

_SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation", "test"),
}
_SYNONYMS |= {name: _SYNONYMS["validation"] for name in ("val", "valid", "eval", "evaluation")}
USUAL_SPLITS = frozenset(name for names in _SYNONYMS.values() for name in names)


def split_folder(root: Path, split: str) -> Path:
    """The sub-folder of a split, by its name or a usual synonym of it.

    Raises:
        DataError: no such sub-folder.
    """
    tried = _names(split)
    for name in tried:
        if (root / name).is_dir():
            return root / name
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    raise DataError(
        f"{root} has no folder for the split {split!r} (tried {', '.join(tried)}; "
        f"found {', '.join(found[:10]) or 'none'}): it needs one folder a split, and in it one folder a class"
    )


def has_split(root: Path, split: str) -> bool:
    """Whether there is a sub-folder of that name or a usual synonym of it."""
    return any((root / name).is_dir() for name in _names(split))


def _names(split: str) -> list[str]:
    return [split, *(name for name in _SYNONYMS.get(split, ()) if name != split)]


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
