"""What pyproject.toml cannot say: dependencies that respect an installed torch, and the native extension."""

import os
import site
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from setuptools import setup

SWITCH = "DEPTHFUSE_BUILD_EXT"

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


def native_extension() -> dict:
    """Arguments to `setup` that build `depthfuse._C` from csrc/; exits with the reason if it cannot.

    torch is imported only here, because a plain `pip install .` needs none at build time.
    """
    root = Path(__file__).parent
    host_sources = sorted(str(path.relative_to(root)) for path in (root / "csrc").rglob("*.cpp"))
    device_sources = sorted(str(path.relative_to(root)) for path in (root / "csrc").rglob("*.cu"))
    if not host_sources:
        raise SystemExit(f"{SWITCH}=1 was given, but csrc/ holds no sources yet: install without it.")
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"{SWITCH}=1 builds against the torch of this environment, which cannot be imported ({error}). "
            "Install torch first and pass --no-build-isolation to pip."
        ) from error
    if device_sources and (cpp_extension.CUDA_HOME or cpp_extension.ROCM_HOME):
        extension = cpp_extension.CUDAExtension("depthfuse._C", host_sources + device_sources)
    else:
        extension = cpp_extension.CppExtension("depthfuse._C", host_sources)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(
    install_requires=DEPENDENCIES + installed_torch(),
    **(native_extension() if os.environ.get(SWITCH) == "1" else {}),
)
