"""The optional native extension, built only when DEPTHFUSE_BUILD_EXT=1. All else is in pyproject.toml.

torch is imported only when the extension is asked for: a plain `pip install .` needs no torch at build time.
"""

import os
from pathlib import Path

from setuptools import setup

SWITCH = "DEPTHFUSE_BUILD_EXT"


def native_extension() -> dict:
    """Arguments to `setup` that build `depthfuse._C` from csrc/; exits with the reason if it cannot."""
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


setup(**(native_extension() if os.environ.get(SWITCH) == "1" else {}))
