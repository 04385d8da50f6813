"""The house: each folder imports only what stands below it, and no import goes round in a circle.

Imports inside functions count too: they hide a circle from Python, not from the reader.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "depthfuse"

# From the roof to the ground. What stands in one row imports nothing of its neighbours in that row.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("rivals", "exporting"),
    ("runs",),
    ("searching", "benching"),
    ("costs",),
    ("acceleration", "training", "fitting"),
    ("measuring", "merging", "selftest"),
    ("fused", "config", "env", "tasks"),
    ("data", "ops", "native"),
    ("kernels",),
    ("spec", "measured_cache", "reporting"),
    ("checkpoint", "architecture", "log", "origins"),
    ("untrusted",),
    ("devices", "effort", "errors", "shapes", "logits", "_spinning", "_torchvision", "_version"),
)
# Inside acceleration, the same: a plan is made, checked and run, and last put together.
ACCELERATION = (("api",), ("model",), ("saving",), ("checking", "running"), ("planning",))


def modules() -> dict[str, Path]:
    """{dotted name below the package: file}; kernels is reached by a link."""
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")]
    named = {}
    for path in files:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


MODULES = modules()


def imports_of(path: Path) -> set[str]:
    """Dotted names below the package of all that a file imports from it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name != "depthfuse" and not name.startswith("depthfuse."):
                continue
            inner = name.removeprefix("depthfuse").removeprefix(".")
            while inner not in MODULES:  # the last part may be a function
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def floor_of(room: str, floors: tuple[tuple[str, ...], ...]) -> int:
    (height,) = [index for index, rooms in enumerate(floors) if room in rooms]
    return height


def test_every_room_has_a_floor():
    rooms = {name.split(".")[0] for name in MODULES if name}
    assert rooms == {room for rooms in FLOORS for room in rooms}


@pytest.mark.parametrize(("prefix", "floors"), [("", FLOORS), ("acceleration.", ACCELERATION)])
def test_folders_import_only_what_stands_below(prefix, floors):
    upwards = []
    for name, imported in IMPORTS.items():
        if not name.startswith(prefix) or name in ("", "acceleration"):
            continue
        room = name.removeprefix(prefix).split(".")[0]
        for other in imported:
            if not other.startswith(prefix) or other in ("", "acceleration"):
                continue
            target = other.removeprefix(prefix).split(".")[0]
            if target != room and floor_of(target, floors) <= floor_of(room, floors):
                upwards.append(f"{name} imports {other}")
    assert not upwards, "\n".join(sorted(upwards))


def test_no_import_goes_round_in_a_circle():
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        # a package's own __init__ names what is in it; importing the package from inside would be the circle
        for other in sorted(IMPORTS[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in sorted(MODULES):
        visit(name)
