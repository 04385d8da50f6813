"""The embedded images: a class-balanced subset of Fashion-MNIST, 10,000 for training and 2,000 for test.

Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", arXiv 1708.07747; MIT licence, beside the file. `benchmarks/cut_fashion_mnist.py` cut it.

Format: xz over [train labels | train pixels | test labels | test pixels], all uint8, pixels as [N, 28, 28].
"""

import functools
import lzma
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUBSET_PATH = Path(__file__).parent / "fashion_mnist" / "subset.xz"
IMAGE_SIZE = 28
NUM_CLASSES = 10
IMAGES_PER_CLASS = {"train": 1000, "test": 200}
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@functools.cache
def load(split: str) -> tuple[Tensor, Tensor]:
    """The images and labels of "train" or "test". Shared between callers: do not write into them.

    Returns:
        images: [N, 1, 28, 28] uint8.
        labels: [N] int64.
    """
    return _load_all()[split]


@functools.cache
def _load_all() -> dict[str, tuple[Tensor, Tensor]]:
    raw = np.frombuffer(bytearray(lzma.decompress(SUBSET_PATH.read_bytes())), dtype=np.uint8)
    splits, offset = {}, 0
    for split, images_per_class in IMAGES_PER_CLASS.items():
        count = images_per_class * NUM_CLASSES
        labels, offset = raw[offset : offset + count], offset + count
        pixels, offset = raw[offset : offset + count * IMAGE_SIZE**2], offset + count * IMAGE_SIZE**2
        images = torch.from_numpy(pixels).view(count, 1, IMAGE_SIZE, IMAGE_SIZE)
        splits[split] = images, torch.from_numpy(labels).long()
    if offset != len(raw):
        raise ValueError(f"{SUBSET_PATH} holds {len(raw)} bytes instead of {offset}: reinstall depthfuse")
    return splits
