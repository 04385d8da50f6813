"""Small folders of images."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def make_folder(tmp_path) -> Callable[..., Path]:
    """Returns a function that writes random JPEGs: {split: {class: number of images}} -> root folder."""

    def make(splits: Mapping[str, Mapping[str, int]], size: tuple[int, int] = (40, 36)) -> Path:
        root = tmp_path / "images"
        rng = np.random.RandomState(0)
        for split, classes in splits.items():
            for name, count in classes.items():
                (root / split / name).mkdir(parents=True)
                for number in range(count):
                    pixels = rng.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(root / split / name / f"{number}.jpg")
        return root

    return make


@pytest.fixture
def folder(make_folder) -> Path:
    """3 classes: 12, 8 and 4 images for training, 2 each for validation."""
    return make_folder(
        {"train": {"ant": 12, "bee": 8, "cat": 4}, "val": {"ant": 2, "bee": 2, "cat": 2}},
    )
