"""What a wheel holds and asks for, and that importing the package stays light."""

import ast
import email
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from on_request import on_request

import depthfuse
from depthfuse.native.building import NAME, digest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["depthfuse", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"]


def copy_source(target: Path) -> Path:
    """The source tree, as in a fresh clone: building leaves files behind."""
    target.mkdir(exist_ok=True)
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / part, target / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / part, target / part)
    return target


def build(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    """What pip runs, without pip, network or isolation; our own code is not on the path there."""
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=source,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
    )


BINARY = f"depthfuse/native/built/{digest()}/{NAME}"
PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")
# In the place of g++: what it is to write holds a word.
COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
printf compiled > "$2"
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, zipfile.ZipFile]:
    """Both kinds, "native" and "any", of one tree, the native one first: it must leave nothing for the other."""
    source = copy_source(tmp_path_factory.mktemp("source"))
    (source / "tests").mkdir()
    (source / "tests" / "test_nothing.py").write_text("")
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "compiler").write_text(COMPILER)
    (folder / "compiler").chmod(0o755)
    native = {"DEPTHFUSE_BUILD_NATIVE": "1", "CXX": str(folder / "compiler")}
    built = {}
    for kind, tag, environment in (
        ("native", PLATFORM, native),
        ("any", "any", {"DEPTHFUSE_BUILD_NATIVE": "0"}),
    ):
        result = build(source, folder / kind, **environment)
        assert result.returncode == 0, result.stderr
        (path,) = (folder / kind).glob("*.whl")
        assert path.name == f"depthfuse-0.1.0-py3-none-{tag}.whl"
        built[kind] = zipfile.ZipFile(path)
    return built


@pytest.fixture(scope="module")
def wheel(wheels) -> zipfile.ZipFile:
    return wheels["any"]


def test_a_native_wheel_holds_the_engine_where_it_is_looked_for(wheels):
    native, names = wheels["native"], set(wheels["any"].namelist())
    assert set(native.namelist()) - names == {BINARY}
    assert names <= set(native.namelist()) and native.read(BINARY) == b"compiled"
    facts = native.read("depthfuse-0.1.0.dist-info/WHEEL").decode()
    assert f"Tag: py3-none-{PLATFORM}\n" in facts and "Root-Is-Purelib: false" in facts
    assert BINARY in native.read("depthfuse-0.1.0.dist-info/RECORD").decode()


def test_a_native_wheel_without_a_compiler_is_an_error(tmp_path):
    source = copy_source(tmp_path / "source")
    result = build(source, tmp_path / "out", DEPTHFUSE_BUILD_NATIVE="1", CXX=str(tmp_path / "none"))
    assert result.returncode != 0 and "none" in result.stderr and not list((tmp_path / "out").iterdir())


@on_request("a minute of g++")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_an_installed_native_wheel_needs_no_compiler(tmp_path):
    result = build(copy_source(tmp_path / "source"), tmp_path / "out", DEPTHFUSE_BUILD_NATIVE="1")
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "out").glob("*.whl")
    zipfile.ZipFile(path).extractall(tmp_path / "installed")
    code = "import depthfuse; from depthfuse.native.library import isa; print(depthfuse.__file__, isa())"
    environment = {
        "PYTHONPATH": str(tmp_path / "installed"),
        "PATH": "",
        "DEPTHFUSE_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    where, isa = done.stdout.split()
    assert where.startswith(str(tmp_path / "installed")) and isa in (
        "amx",
        "avx512_bf16",
        "avx512",
        "avx2",
        "baseline",
    ), done.stderr
    assert not (tmp_path / "cache" / "native").exists()


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if not name.startswith("depthfuse-0.1.0.dist-info/")}
    source = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "depthfuse").rglob("*")
        if path.suffix in (".py", ".json") or path.name == "py.typed"
    }
    # rglob does not follow the symlinks
    for suffix in ("py", "json"):
        source |= {f"depthfuse/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob(f"*.{suffix}")}
    source |= {f"depthfuse/{path.relative_to(ROOT)}" for path in (ROOT / "csrc").glob("*pu/*")}
    data = {f"depthfuse/data/fashion_mnist/{name}" for name in ("subset.xz", "LICENSE", "README.md")}
    assert names == source | data


def test_wheel_carries_both_licences(wheel):
    base = "depthfuse-0.1.0.dist-info/licenses/"
    assert b"Apache License" in wheel.read(base + "LICENSE")
    assert b"Zalando" in wheel.read(base + "depthfuse/data/fashion_mnist/LICENSE")


def requirements_of(metadata: str) -> list[str]:
    return email.message_from_string(metadata).get_all("Requires-Dist")


def test_metadata_holds_the_installed_torch_and_brings_no_triton(wheel):
    requirements = requirements_of(wheel.read("depthfuse-0.1.0.dist-info/METADATA").decode())
    base = [requirement for requirement in requirements if "extra ==" not in requirement]
    assert {"torch>=2.11", "timm>=1.0.26", f"torch=={version('torch')}"} <= set(base)
    assert not [
        requirement for requirement in base if "triton" in requirement or "torchvision" in requirement
    ]
    assert 'triton>=3.6; extra == "triton"' in requirements
    scripts = wheel.read("depthfuse-0.1.0.dist-info/entry_points.txt").decode()
    assert "depthfuse = depthfuse.cli:main" in scripts


def test_metadata_is_general_where_there_is_no_torch(tmp_path):
    source = copy_source(tmp_path / "source")
    code = (
        "import importlib.metadata, pathlib\n"
        "found = importlib.metadata.distributions\n"
        "importlib.metadata.distributions = lambda **k: [] if k.get('name') == 'torch' else found(**k)\n"
        "from setuptools import build_meta\n"
        "folder = build_meta.prepare_metadata_for_build_wheel('.')\n"
        "print(pathlib.Path(folder, 'METADATA').read_text())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    metadata = result.stdout[result.stdout.index("Metadata-Version") :]
    torch = [line for line in requirements_of(metadata) if re.match(r"torch\b(?!-)", line)]
    assert torch == ["torch>=2.11"]


def test_every_direct_dependency_is_pinned(wheel):
    metadata = wheel.read("depthfuse-0.1.0.dist-info/METADATA").decode()
    wanted = {
        re.match(r"[\w-]+", requirement)[0].lower()
        for requirement in requirements_of(metadata)
        if not re.search('extra == "(bench|data|triton|onnx|openvino|int8|executorch|all|docs)"', requirement)
    }
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all("==" in line or line.startswith("#") for line in lines)
    assert wanted <= {line.split("==")[0].lower() for line in lines}


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_importing_the_package_imports_none_of_its_parts():
    result = run(
        "import sys, depthfuse, depthfuse.cli\n"
        "print([name for name in ('torch', 'timm', 'torchvision', 'numpy') if name in sys.modules])\n"
    )
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


def test_names_are_there_when_they_are_used():
    (checked,) = [
        node.body
        for node in ast.parse((ROOT / "depthfuse" / "__init__.py").read_text()).body
        if isinstance(node, ast.If)
    ]
    told = {alias.name: f"{node.module}" for node in checked for alias in node.names}
    assert told == {
        name: f"depthfuse.{where}" for name, where in depthfuse._WHERE.items()
    }  # to type checkers
    assert sorted(told) == depthfuse.__all__ and set(depthfuse.__all__) < set(dir(depthfuse))
    for name, module in told.items():
        assert getattr(depthfuse, name) is getattr(importlib.import_module(module), name)
    assert depthfuse.errors.DepthfuseError and depthfuse.ops.conv2d
    for name in ("no_such_name", "_private", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"module 'depthfuse' has no attribute '{name}'"):
            getattr(depthfuse, name)
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec("from depthfuse import no_such_name")


def test_import_is_light():
    result = run(
        "import sys, torch\n"
        "from depthfuse import *\n"
        "assert Supernet and open_data\n"
        "heavy = ('matplotlib', 'tyro', 'torch_pruning', 'scipy', 'depthfuse.kernels.launch')\n"
        "loaded = [name for name in heavy if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_import_works_where_there_is_no_triton():
    result = run(
        "import sys\nsys.modules['triton'] = None  # makes every import of it fail\nimport depthfuse, timm\n"
    )
    assert result.returncode == 0, result.stderr
