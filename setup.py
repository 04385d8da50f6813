"""What pyproject.toml cannot say: dependencies that respect an installed torch."""

import site
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from setuptools import setup

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


setup(install_requires=DEPENDENCIES + installed_torch())
