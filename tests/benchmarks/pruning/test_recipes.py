"""The ImageNet recipes load, name what exists, and prune the blocks that they say."""

import csv
from pathlib import Path

import pytest
import timm

import depthfuse
from benchmarks.pruning.recipe_cost import comment
from depthfuse.config import load_yaml
from depthfuse.costs.counting import count_costs
from depthfuse.searching.space import SearchSpace, check_one_budget
from depthfuse.searching.strategies import find_strategy

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
RECIPES = sorted((BENCHMARKS / "pruning" / "recipes").glob("*.yaml"))
BLOCK_SETS = {"A": [1, 2, 5, 7, 9, 12], "C": [1, 2, 4, 5, 6, 7, 8, 9, 12], "E": [1, 2, *range(4, 13)]}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_leave_a_space_to_search(path):
    config = load_yaml(path)
    check_one_budget(config.search)
    find_strategy(config.search.strategy)
    model = depthfuse.ModelSource.make(config.model).build()
    supernet = depthfuse.Supernet(model)
    if config.search.blocks is not None:
        table = count_costs(supernet, (3, 32, 32), "MACs")
        space = SearchSpace(supernet.options(), config.search, table)
        assert config.search.blocks <= len(space.options)
    if path.stem.startswith("mobilenetv2_140_"):
        sixteen = [p for p, b in supernet.blocks.items() if type(b.block).__name__ == "InvertedResidual"]
        wanted = BLOCK_SETS[path.stem[-1]]
        assert len(sixteen) == 16
        assert list(config.search.force) == [f"{sixteen[i - 1]}=dense" for i in wanted]
        assert config.search.blocks == len(wanted)


def test_each_recipe_tells_its_cost_as_it_was_last_estimated():
    with (BENCHMARKS / "results" / "recipe_cost.csv").open() as file:
        rows = {row["recipe"]: row for row in csv.DictReader(file)}
    assert set(rows) == {path.stem for path in RECIPES}
    for path in RECIPES:
        assert comment(rows[path.stem]) in path.read_text(), "run python -m benchmarks.pruning.recipe_cost"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_name_the_weights_that_the_paper_starts_from(path):
    config = load_yaml(path)
    tags = {"resnet34": "tv_in1k", "convnext_tiny": "fb_in1k", "mobilenetv2_140": "ra_in1k"}
    name = config.model.partition(".")[0]
    assert timm.get_pretrained_cfg(config.model).tag == tags.get(name, "fb_in1k")
    assert config.pretrained


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
