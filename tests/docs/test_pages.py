"""The pages of docs/: each is a story, and all of its code is run, in order, in one folder."""

import functools
import importlib.util
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from documents import DOCS, PAGES, README, ROOT, anchors_of, blocks_of, check_flags, links_of, names, words
from fake_clock import Clock
from on_request import on_request
from PIL import Image

import depthfuse
from depthfuse import ModelSource, origins
from depthfuse.checkpoint import save_tensors
from depthfuse.cli import main
from depthfuse.cli.command import BUDGET_MISSED, DONE
from depthfuse.measuring.timing import Timing
from depthfuse.merging.adapters import base
from depthfuse.runs import closing

# What takes minutes in reality, and what is run in its place; the first that stands in a command is replaced first.
SIZES = "channels=(4,4,8,8) layers=(1,1,1,1)"
CHEAP = (
    "--data.img-size 48 --data.batch-size 24 --baseline.epochs 1 --baseline.warmup-epochs 0 --latency.rounds 1 "
    "--search.calibration-images 64 --search.losing-merges --cpu"
)
SMALL = (
    (
        "--model resnet34 --pretrained --data.data unsorted",
        f"--model resnet18 --model-kwargs {SIZES} num_classes=3 --weights small.safetensors "
        f"--data.data unsorted {CHEAP}",
    ),
    ("--model resnet34 --pretrained", f"--model resnet18 --model-kwargs {SIZES} {CHEAP}"),
    ("latency resnet34", f"latency resnet18 --model-kwargs {SIZES} --input-size 3 32 32 --rounds 1"),
    ("inspect resnet34", f"inspect resnet18 --model-kwargs {SIZES}"),
    ("export resnet18 --pretrained", f"export resnet18 --model-kwargs {SIZES}"),
    ("accelerate runs/photos --dtype auto", "accelerate runs/photos --tune heuristic"),
    ("accelerate resnet18 --model-kwargs", f"accelerate resnet18 --model-kwargs {SIZES}"),
    # the tests' clock takes a parameter for a millisecond, and the small net has 14,827
    ("--search.budget-ms 4.0", "--search.budget-ms 14500"),
    ("--search.speedup 1.2", "--search.speedup 1.02"),
    ("--points 1.0", "--points 99"),
    (
        "--search.blocks 1 --out runs/light",
        "--search.blocks 1 --baseline.epochs 1 --supernet.epochs 1 --finetune.epochs 1 --data.batch-size 32 "
        "--latency.rounds 1 --search.losing-merges --search.strategy uniform --cpu --out runs/light",
    ),
)
# Without onnx and onnxscript, as a file of torch.export.
WITHOUT_ONNX = (("--to onnx", "--to torch"), (".onnx", ".pt2"))
# What is not run, and why. Flags of depthfuse are read all the same.
NOT_RUN = {
    "torchrun ": "there is one process here; runs/test_processes.py starts two",
    "depthfuse env --selftest": "minutes in Triton's interpreter; test_selftest.py",
    "depthfuse prune --effort quick --model resnet34 --pretrained --data.data photos --latency.device mi100 ": (
        "predictions count whole models; costs/test_latency.py"
    ),
    "depthfuse latency resnet34 --device mi300x ": "the same",
    "depthfuse bench ": "a process for each engine; cli/test_bench.py",
    "make gpu-proof": "needs a GPU; benchmarks/test_gpu_proof.py",
    "pip install ": "needs a network",
    "docker run ": "there is no Triton server here; test_serving.py compares its configuration with the file",
    "MODEL=photos.onnx uvicorn ": "a server that does not end; test_serving.py calls it",
    "curl ": "the same",
}
# Pages that read what the tutorial's run has left, which is made once.
AFTER_THE_RUN = ("tutorial.md", "files.md")
# Pages that take too long for every run; else the flags of their commands are read, and files and Python are left out.
LONG_PAGES = {"guides/budget.md": "half a minute", "guides/no_labels.md": "ten seconds"}
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript"))
STORIES = [page for page in PAGES if blocks_of(page, "python") or blocks_of(page, "sh")]


def photos(folder, classes=("daisy", "tulip", "rose"), count=32):
    """Images of `classes` that differ in their hue, in a folder for each; or directly in it, without classes."""
    draw = np.random.RandomState(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = draw.randint(0, 120, (36, 40, 3))
            pixels[..., number % 3] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}-{index}.png")


@pytest.fixture(scope="session")
def given_images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    photos(folder / "photos" / "train")
    photos(folder / "photos" / "val", count=8)
    photos(folder / "unsorted", classes=("",), count=96)
    model = ModelSource.make("resnet18", channels=(4, 4, 8, 8), layers=(1, 1, 1, 1), num_classes=3).build()
    save_tensors(folder / "small.safetensors", model.state_dict())
    return folder


def untimed(calls, rounds, device):
    return {name: Timing((1.0,) * rounds) for name in calls}


@pytest.fixture
def folder(given_images, tmp_path, monkeypatch, restored_logger):
    """What readers have: a folder with their images. Nothing is timed."""
    for entry in given_images.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Clock().install(monkeypatch)
    monkeypatch.setattr(closing, "time_interleaved", untimed)
    monkeypatch.setattr(closing, "accelerate", functools.partial(closing.accelerate, tune="heuristic"))
    monkeypatch.setattr(base, "_CANDIDATES", {kind: [*known] for kind, known in base._CANDIDATES.items()})
    monkeypatch.setattr(origins, "_allowed", set(origins._allowed))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def run_command(command, monkeypatch):
    if any(command.startswith(start) for start in NOT_RUN):
        if words(command)[0] in ("depthfuse", "torchrun"):
            check_flags(command, monkeypatch)
        return
    for text, small in (*SMALL, *(() if HAS_ONNX else WITHOUT_ONNX)):
        command = command.replace(text, small)
    program, *arguments = words(command)
    if program == "python":
        if HAS_ONNX:  # which our scripts need
            monkeypatch.setattr(sys, "argv", [str(ROOT / arguments[0]), *arguments[1:]])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
            assert ended.value.code == 0, command
        return
    assert program == "depthfuse", f"nobody has said how to run: {command}"
    # the closing times are not those of the clock that the net was chosen by
    budget = any(word in command for word in ("speedup", "budget-ms", "points"))
    assert main([*arguments, "--quiet"]) in ((DONE, BUDGET_MISSED) if budget else (DONE,)), command


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "runs"


def make_the_run(folder, kept, monkeypatch):
    if not kept.exists():
        for block in blocks_of(DOCS / "tutorial.md", "sh", "3. Prune"):
            for command in block.commands():
                run_command(command, monkeypatch)
        shutil.copytree(folder / "runs", kept)
    else:
        shutil.copytree(kept, folder / "runs")


def stories():
    for page in STORIES:
        name = str(page.relative_to(DOCS))
        marks = on_request(LONG_PAGES[name]) if name in LONG_PAGES else ()
        yield pytest.param(page, id=name, marks=marks)


@pytest.mark.parametrize("page", list(stories()))
def test_a_page(page, folder, kept, monkeypatch):
    left = names()
    if page.name in AFTER_THE_RUN:
        make_the_run(folder, kept, monkeypatch)
    for block in blocks_of(page):
        if block.file:
            (folder / block.file).write_text(block.code)
        elif block.language == "python":
            block.run(left)
        elif block.language == "sh":
            for command in block.commands():
                run_command(command, monkeypatch)


@pytest.mark.parametrize("name", LONG_PAGES)
def test_the_commands_of_a_long_page_are_understood(name, monkeypatch, restored_logger):
    for block in blocks_of(DOCS / name, "sh"):
        for command in block.commands():
            check_flags(command, monkeypatch)


def test_all_that_is_declared_is_there():
    commands = [c for page in PAGES for block in blocks_of(page, "sh") for c in block.commands()]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in commands), start
    for text, _ in SMALL:
        assert any(text in command for command in commands), text
    known = {"python", "sh", "text", "{toctree}", "{eval-rst}", "{csv-table}", "{literalinclude}"}
    assert {block.language for page in PAGES for block in blocks_of(page)} <= known
    assert "\ngpu-proof:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.name)
def test_links(page):
    """Addresses outside are not asked: there is no network. `sphinx -b linkcheck` does."""
    for address, anchor in links_of(page):
        if address.startswith("http"):
            assert address.startswith("https://"), address
            continue
        target = (page.parent / address).resolve() if address else page
        assert target.exists(), f"{page.name} names {address}"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name} names {address}#{anchor}"


def test_every_public_name_is_documented():
    text = (DOCS / "api.md").read_text()
    missing = [name for name in depthfuse.__all__ if f":: depthfuse.{name}\n" not in text]
    assert not missing


def test_every_page_is_in_the_contents():
    listed = [line for block in blocks_of(DOCS / "index.md", "{toctree}") for line in block.code.splitlines()]
    assert {f"{line}.md" for line in listed} >= {
        str(page.relative_to(DOCS)) for page in PAGES if page.name != "index.md"
    }


def test_the_pages_build(tmp_path):
    """As `make docs`: a warning is an error."""
    for package in ("sphinx", "furo", "myst_parser"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed: pip install "depthfuse[docs]", or make docs')
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    built = subprocess.run([*command, DOCS, tmp_path / "out"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "--search.budget-ms" in (tmp_path / "out" / "commands.html").read_text()
