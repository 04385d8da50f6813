"""Cut the embedded Fashion-MNIST subset out of the original files.

    python -m benchmarks.tools.cut_fashion_mnist /usr/share/datasets/fashion-mnist

The folder holds the four original idx files, gzipped; Debian's package dataset-fashion-mnist installs them
there. The choice is class-balanced and seeded: 1,000 training and 200 test images a class, kept in the order
of the originals. The output is a function of the originals and of this file alone.
"""

import argparse
import gzip
import hashlib
import lzma
from pathlib import Path

import numpy as np

from depthfuse.data.embedded import IMAGE_SIZE, IMAGES_PER_CLASS, NUM_CLASSES, SUBSET_PATH

SEED = 2024

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped idx file (magic 0, 0, type 8, number of dimensions; big-endian sizes)."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    dims = raw[3]
    shape = tuple(np.frombuffer(raw, dtype=">u4", count=dims, offset=4).tolist())
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)


def balanced_choice(labels: np.ndarray, images_per_class: int, rng: np.random.RandomState) -> np.ndarray:
    """Indices of `images_per_class` images of each class, ascending."""
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:images_per_class] for label in range(NUM_CLASSES)
    ]
    return np.sort(np.concatenate(chosen))


def cut(folder: Path) -> bytes:
    """The subset file, in the format that depthfuse/data/embedded.py describes."""
    rng = np.random.RandomState(SEED)  # RandomState's streams are frozen for good, Generator's are not
    parts = []
    for split, (image_file, label_file) in FILES.items():
        images, labels = read_idx(folder / image_file), read_idx(folder / label_file)
        if images.shape != (len(labels), IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"{folder / image_file}: {images.shape} images for {len(labels)} labels")
        chosen = balanced_choice(labels, IMAGES_PER_CLASS[split], rng)
        parts += [labels[chosen].tobytes(), images[chosen].tobytes()]
    return lzma.compress(b"".join(parts), format=lzma.FORMAT_XZ, check=lzma.CHECK_SHA256, preset=9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the four original .gz files")
    parser.add_argument("--out", type=Path, default=SUBSET_PATH)
    arguments = parser.parse_args()
    data = cut(arguments.folder)
    arguments.out.write_bytes(data)
    print(f"{arguments.out}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
