"""Plain rows of convolutions (VGG, RepVGG and MobileOne once their branches are one): two neighbours in a long
`nn.Sequential` become one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from depthfuse.merging.adapters.layers import ACTIVATIONS, DROPOUTS
from depthfuse.merging.computed_weights import plain_type

_FEWEST = 5  # convolutions; a shorter row is a block itself, or a stem


class Row(nn.Sequential):
    """A Sequential some of whose layers became one block: it can be called, but not be taken apart.

    A model whose code goes through such a row on its own would read features at the wrong places.
    """

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            x = layer(x)
        return x

    def __iter__(self) -> Iterator[nn.Module]:
        self._refuse()

    def __getitem__(self, index: Any) -> Any:
        self._refuse()

    def _refuse(self) -> NoReturn:
        blocks = [name for name, layer in self._modules.items() if not isinstance(layer, nn.Identity)]
        raise TypeError(
            f"this model's code takes an nn.Sequential apart, in which neighbouring convolutions are one block now "
            f"(it begins with layers {', '.join(blocks[:3])}): let the code call it whole, or keep it out of pruning"
        )


def pairs_of(row: nn.Module) -> list[tuple[str, nn.Sequential]]:
    """(name of the first layer, the layers as a module) of each two neighbours among the stages of a long row.

    Counted from the end of each run: its first convolution is the one that widens.
    """
    if type(row) is not nn.Sequential or sum(_begins_stage(layer) for layer in row.children()) < _FEWEST:
        return []
    pairs = []
    for run in _runs(row):
        for i in range(len(run) % 2, len(run) - 1, 2):
            layers = run[i] + run[i + 1]
            pairs.append((layers[0], nn.Sequential(*(row._modules[name] for name in layers))))
    return pairs


def gather(model: nn.Module, path: str, length: int) -> None:
    """Make the `length` layers that begin at `path` one module there, with nothing in the place of the others."""
    holder, _, first = path.rpartition(".")
    row = model.get_submodule(holder)
    names = list(row._modules)
    taken = names[names.index(first) :][:length]
    layers = [row._modules[name] for name in taken]
    row.__class__ = Row
    for name in taken[1:]:
        row._modules[name] = nn.Identity()
    row._modules[first] = nn.Sequential(*layers)


def _begins_stage(layer: nn.Module) -> bool:
    """A convolution, or a module of one with what belongs to it."""
    if plain_type(layer) is nn.Conv2d:
        return True
    products = sum(isinstance(part, nn.Conv2d | nn.Linear) for part in layer.modules())
    return products == 1 and not isinstance(layer, nn.Conv2d | nn.Linear)


def _runs(row: nn.Sequential) -> list[list[list[str]]]:
    """Runs of stages, each the names of what holds a convolution and of the norm and activations after it."""
    runs: list[list[list[str]]] = [[]]
    for name, layer in row._modules.items():
        if _begins_stage(layer):
            runs[-1].append([name])
        elif runs[-1] and isinstance(layer, (nn.BatchNorm2d, BatchNormAct2d, *ACTIVATIONS, *DROPOUTS)):
            runs[-1][-1].append(name)
        else:
            runs.append([])
    return runs
