"""The picture of the house, held against the code: which room may import which."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import flatwater

PACKAGE = Path(flatwater.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# What each room may import of Flatwater, besides itself.
FOUNDATION = {"errors", "files", "rounding", "spec"}
ROOMS = {
    "errors": set(),
    "files": set(),
    "rounding": set(),
    "spec": {"errors"},
    "advice": {"errors", "policy"},
    "momentum": {"errors"},
    "lined": {"errors"},
    "settings": {"lined"},
    "policy": {"errors", "lined", "momentum", "settings"},
    "reference": FOUNDATION,
    "kernels": FOUNDATION | {"host"},
    "surgery": FOUNDATION,
    "verify": FOUNDATION | {"reference", "inspection"},
    "host": {"errors"},
    "inspection": FOUNDATION,
    "onnx": FOUNDATION | {"inspection", "surgery", "verify"},
    "paddle": FOUNDATION | {"kernels", "surgery", "verify", "policy", "advice", "momentum", "inspection", "onnx"},
    "recipes": FOUNDATION | {"kernels", "paddle", "surgery", "verify", "host", "policy", "lined", "settings"},
    "models": {"errors", "inspection", "onnx", "paddle", "verify"},
    "quiet": set(),
    "cli_models": FOUNDATION | {"models", "onnx", "verify", "quiet"},
    "cli": {"errors", "host", "paddle", "cli_models", "recipes", "quiet"},
    "__init__": FOUNDATION | {"host"},
    "__main__": {"cli"},
}
FRAMEWORK_ROOMS = {"paddle", "recipes"}
# Within the front end: what each folder may import of the others. The modules at its top are the layers.
FLOORS = {
    "sync": set(),
    "surgery": {"sync"},
    "choosing": {"sync", "surgery", "shipping"},
    "policy": {"surgery", "choosing"},
    "shipping": {"surgery"},
    "nn": {"sync"},
    "__init__": {"sync", "surgery", "choosing", "policy", "shipping"},
}
MAX_LINES = 400


def room_of(source: Path) -> str:
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(source: Path) -> set[str]:
    """Every module that the file imports, wherever in the file, by its absolute name."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative imports hide where an arrow points"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def identify(source: Path) -> str:
    return str(source.relative_to(PACKAGE))


@pytest.mark.parametrize("source", SOURCES, ids=identify)
def test_arrows_point_one_way(source: Path) -> None:
    room = room_of(source)
    rooms_seen = {name.split(".")[1] for name in imported_modules(source) if name.startswith("flatwater.")}
    names_at_the_top = set(flatwater.__all__)
    assert rooms_seen - names_at_the_top - {room} <= ROOMS[room]


@pytest.mark.parametrize("source", sorted((PACKAGE / "paddle").rglob("*.py")), ids=identify)
def test_arrows_point_one_way_within_the_front_end(source: Path) -> None:
    floor = source.relative_to(PACKAGE / "paddle").parts[0].removesuffix(".py")
    floors = {path.name for path in (PACKAGE / "paddle").iterdir() if (path / "__init__.py").is_file()}
    seen = {name.split(".")[2] for name in imported_modules(source) if name.startswith("flatwater.paddle.")}
    assert (seen & floors) - {floor} <= FLOORS.get(floor, set())


@pytest.mark.parametrize("source", SOURCES, ids=identify)
def test_only_the_front_end_imports_the_framework(source: Path) -> None:
    top_level = {name.split(".")[0] for name in imported_modules(source)}
    if room_of(source) not in FRAMEWORK_ROOMS:
        assert not top_level & {"paddle", "torch"}


@pytest.mark.parametrize("source", SOURCES, ids=identify)
def test_files_stay_readable(source: Path) -> None:
    assert len(source.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("source", SOURCES, ids=identify)
def test_all_is_what_is_visible(source: Path) -> None:
    """Each name in ``__all__`` exists, and each public definition of the module is in ``__all__``."""
    if source.name == "__main__.py":
        return
    dotted = ".".join(["flatwater", *source.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    module = importlib.import_module(dotted)
    assert len(set(module.__all__)) == len(module.__all__)
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing

    defined = [
        node.name
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    commands = [name for name in defined if name.endswith(("_command", "_group")) and room_of(source) == "cli"]
    assert set(defined) - set(commands) <= set(module.__all__)


def test_importing_flatwater_imports_no_framework() -> None:
    code = "import sys, flatwater; print(sorted({'paddle', 'torch', 'onnxruntime', 'pydantic'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
