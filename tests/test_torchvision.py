"""depthfuse._torchvision: timm imports after `ensure`, whatever torchvision is installed.

Each case runs in a fresh interpreter, because an import happens only once in a process. The module is loaded
from its file, so that what the package itself imports does not get in the way.
"""

import subprocess
import sys
from pathlib import Path

import pytest

MODULE = Path(__file__).resolve().parent.parent / "depthfuse" / "_torchvision.py"


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def run_ensured(code: str = "", path: Path | None = None) -> subprocess.CompletedProcess:
    """Runs code after `ensure()`, with `path` first on sys.path."""
    return run(
        "import importlib.util, sys\n"
        + (f"sys.path.insert(0, {str(path)!r})\n" if path else "")
        + f"spec = importlib.util.spec_from_file_location('ensured', {str(MODULE)!r})\n"
        "ensured = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(ensured)\n"
        "ensured.ensure()\n" + code
    )


def torchvision_imports() -> bool:
    return run("import torchvision").returncode == 0


def test_timm_and_torchvision_work_after_ensure():
    result = run_ensured(
        "import torch, timm, timm.data, torchvision, torchvision.datasets\n"
        "from torchvision.transforms import v2\n"
        "from PIL import Image\n"
        "image = Image.new('RGB', (40, 30), (255, 0, 0))\n"
        "x = timm.data.create_transform((3, 24, 24), is_training=True, auto_augment='rand-m9')(image)\n"
        "assert x.shape == (3, 24, 24) and x.dtype == torch.float32, x\n"
        "assert v2.functional.pil_to_tensor(image).shape == (3, 30, 40)\n"
        "assert torchvision.datasets.FakeData(size=2)[0][0].size == (224, 224)\n"
        "model = timm.create_model('resnet18', num_classes=3).eval()\n"
        "assert model(torch.rand(1, 3, 32, 32)).shape == (1, 3)\n"
    )
    assert result.returncode == 0, result.stderr


def test_nms_still_says_that_it_is_missing():
    if torchvision_imports():
        pytest.skip("this torchvision loads beside this torch, so nothing is missing")
    result = run_ensured(
        "import torch, torchvision\ntorchvision.ops.nms(torch.rand(3, 4), torch.rand(3), 0.5)\n"
    )
    assert result.returncode == 1
    assert "Couldn't load custom C++ ops" in result.stderr


def test_ensure_leaves_a_working_torchvision_alone(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("marker = 'plain'\n")
    result = run_ensured(
        "ensured.ensure()\n"
        "import torchvision\n"
        "assert torchvision.marker == 'plain'\n"
        "assert ensured._library is None\n",
        path=tmp_path,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('the disk burns')", "RuntimeError: the disk burns"),
        ("raise RuntimeError('operator torchvision::other does not exist')", "torchvision::other"),
        ("import no_such_module_of_torchvision", "No module named 'no_such_module_of_torchvision'"),
    ],
)
def test_other_failures_of_torchvision_come_through(tmp_path, source, message):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(source + "\n")
    result = run_ensured(path=tmp_path)
    assert result.returncode == 1
    assert message in result.stderr


def test_importing_depthfuse_sees_to_torchvision_before_timm(tmp_path):
    (tmp_path / "torchvision.py").write_text("")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(
        "import sys\nassert 'torchvision' in sys.modules, 'too early'\n"
    )
    (tmp_path / "timm" / "layers.py").write_text("")
    result = run(
        f"import sys\nsys.path[:0] = [{str(tmp_path)!r}, {str(MODULE.parents[1])!r}]\n"
        "import depthfuse\n"
        "assert 'torchvision' not in sys.modules\n"
        "import timm.layers, timm\n"
    )
    assert result.returncode == 0, result.stderr


def test_a_missing_torchvision_is_left_to_timm(tmp_path):
    (tmp_path / "torchvision.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torchvision'\", name='torchvision')\n"
    )
    result = run_ensured("print('still here')\n", path=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "still here" in result.stdout
