"""What pyproject.toml cannot say: dependencies that respect an installed torch, and a wheel with a built engine."""

import functools
import importlib.util
import os
import shutil
import site
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# DEPTHFUSE_BUILD_NATIVE=1: the wheel brings the engine built, for this kind of machine. Else it brings the sources, and
# each machine that has a g++ builds them at first use.
BUILDS_NATIVE = os.environ.get("DEPTHFUSE_BUILD_NATIVE", "0") == "1"

# No triton: CUDA wheels of torch bring it, ROCm wheels bring their own distribution of the same module, and a
# second one would overwrite that. No torchvision: timm asks for it.
DEPENDENCIES = [
    "torch>=2.11",
    # Up to 1.0.25 timm unpickles whatever `checkpoint_path` names, and its ViTs know no `is_causal`. Nothing from a
    # file reaches that keyword (depthfuse/architecture.py): the floor is a second wall.
    "timm>=1.0.26",
    "numpy",
    "pillow",
    "safetensors",
    "accelerate",
    "rich",
    "tyro",
    "pyyaml",
    "matplotlib",
]


def installed_torch() -> list[str]:
    """`["torch==VERSION"]` of the torch in the environment that is being installed into, if there is one.

    Without it, pip takes the newest torchvision, which asks for the newest torch, and so replaces a CPU or ROCm
    build by a CUDA build. A build for release runs in an environment of its own and finds none, as it should.
    pip's isolated builds hide the environment's packages from import, but run its interpreter: so look on disk.
    """
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    elif "include-system-site-packages = true" in (Path(sys.prefix) / "pyvenv.cfg").read_text().lower():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
    for found in distributions(name="torch", path=folders):
        return [f"torch=={found.version}"]
    return []


class OfOneMachine(Distribution):
    """Built in a folder of its own, so that no binary gets into a later wheel without one."""

    def has_ext_modules(self) -> bool:
        return True


class WithEngine(build_py):
    """Puts the engine where `python -m depthfuse.native` does. A compiler that is missing or fails is an error."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            if not self._engine.exists():  # what an earlier build left is of other sources
                shutil.rmtree(self._engine.parents[1], ignore_errors=True)
            self._building.made(self._engine, self._building.compile_engine)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(self._engine)]

    @functools.cached_property
    def _building(self) -> ModuleType:
        """By its path: the package itself cannot be imported where it is built, and needs not be."""
        path = Path(__file__).resolve().parent / "depthfuse" / "native" / "building.py"
        spec = importlib.util.spec_from_file_location("building", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @property
    def _engine(self) -> Path:
        building = self._building
        inside = building.BUILT.relative_to(building.PACKAGE)
        return Path(self.build_lib, "depthfuse", inside, building.digest(), building.NAME)


class AnyPython(bdist_wheel):
    """The engine is plain C at its border, loaded by ctypes: one binary for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


native = {"distclass": OfOneMachine, "cmdclass": {"build_py": WithEngine, "bdist_wheel": AnyPython}}
setup(install_requires=DEPENDENCIES + installed_torch(), **(native if BUILDS_NATIVE else {}))
