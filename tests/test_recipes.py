"""The ImageNet recipes load, name what exists, and prune the blocks that they say."""

from pathlib import Path

import pytest

import depthfuse
from depthfuse.config import load_yaml
from depthfuse.macs import count_costs
from depthfuse.space import SearchSpace, check_one_budget
from depthfuse.strategies import find_strategy

RECIPES = sorted((Path(__file__).parents[1] / "benchmarks" / "recipes").glob("*.yaml"))
BLOCK_SETS = {"A": [1, 2, 5, 7, 9, 12], "C": [1, 2, 4, 5, 6, 7, 8, 9, 12], "E": [1, 2, *range(4, 13)]}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_leave_a_space_to_search(path):
    config = load_yaml(path)
    check_one_budget(config.search)
    find_strategy(config.search.strategy)
    assert "Cost (estimated by" in path.read_text()
    model = depthfuse.ModelSource.make(config.model).build()
    supernet = depthfuse.Supernet(model)
    table = count_costs(supernet, (3, 32, 32), "MACs") if config.model != "deit_tiny_patch16_224" else None
    if config.search.blocks is not None:
        space = SearchSpace(supernet.options(), config.search, table)
        assert config.search.blocks <= len(space.options)
    if path.stem.startswith("mobilenetv2_140_"):
        sixteen = [p for p, b in supernet.blocks.items() if type(b.block).__name__ == "InvertedResidual"]
        wanted = BLOCK_SETS[path.stem[-1]]
        assert len(sixteen) == 16
        assert list(config.search.force) == [f"{sixteen[i - 1]}=dense" for i in wanted]
        assert config.search.blocks == len(wanted)


def test_every_row_of_the_papers_tables_has_a_recipe():
    assert {path.stem for path in RECIPES} == {
        "resnet34_6blocks",
        "resnet34_10blocks",
        "mobilenetv2_140_A",
        "mobilenetv2_140_C",
        "mobilenetv2_140_E",
        "convnext_tiny",
        "deit_tiny",
    }
