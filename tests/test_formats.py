"""Files that were written once are read by this version, and mean what they meant: tests/formats/VERSION."""

import re

import pytest
import torch
from documents import DOCS
from keep_formats import FORMATS, KEPT, STATE, outputs_of

import depthfuse
from benchmarks.tools.damage import KINDS, artefacts
from depthfuse import checkpoint, measured_cache, spec
from depthfuse.acceleration.saving import saved
from depthfuse.checkpoint import load_json, load_state
from depthfuse.exporting import facts

VERSIONS = sorted(path for path in FORMATS.iterdir() if path.is_dir())
AN_OLD_FILE = (
    "it was readable when it was written: read it still, or give the format a new number and say what to do"
)


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_every_file_is_read(folder):
    read = [path.name for path, kind in artefacts(folder) if kind.read(path) is not None]
    assert set(read) >= {name for name in KEPT if name != "front.csv"} | {"fast.safetensors"}, AN_OLD_FILE


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_models_compute_what_they_did(folder):
    wanted = torch.tensor(load_json(folder / "expected.json"))
    fast = depthfuse.load_accelerated(folder / "fast.safetensors", tune="heuristic", engines="own")
    for model in (depthfuse.load(folder), fast):
        assert torch.allclose(torch.tensor(outputs_of(model)), wanted, rtol=1e-4, atol=1e-5), AN_OLD_FILE


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_a_state_comes_back(folder):
    state = load_state(folder / "baseline.state")
    assert torch.equal(state["weights"]["layer"][0], STATE["weights"]["layer"][0])
    assert {**state, "weights": None} == {**STATE, "weights": None} and state["weights"]["layer"][1] is None


def test_this_version_has_kept_its_files():
    """Of every kind of file that a run of one method leaves, so that a new kind is kept, too."""
    here = {kind for folder in VERSIONS for _, kind in artefacts(folder)}
    missing = {pattern for pattern, kind in KINDS.items() if kind not in here}
    assert missing <= {"trial.json", "foreign.safetensors"}, "run python tests/keep_formats.py"
    assert depthfuse.__version__ in {folder.name for folder in VERSIONS}, "run python tests/keep_formats.py"


def test_the_numbers_of_formats_are_documented():
    told = set(re.findall(r"depthfuse\.\w+/\d+", (DOCS / "files.md").read_text()))
    assert told == {module.FORMAT for module in (spec, saved, facts, measured_cache)} | {
        checkpoint.JSON_FORMAT
    }
