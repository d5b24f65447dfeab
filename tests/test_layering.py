"""The house's rules, read off the sources: who may import and include whom."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: What each room may import of blokern. Families do not know each other; only ops touches the native ops.
ALLOWED = {
    "ops": {"_backend", "_names", "ops"},
    "distributed": {"distributed"},
    "attack": {"ops", "attack", "distributed", "_names"},
    "sparse": {"ops", "sparse", "_names"},
    "curvature": {"ops", "curvature", "_names"},
    "bilevel": {
        "attack",
        "sparse",
        "curvature",
        "ops",
        "distributed",
        "bilevel",
        "_names",
        "_version",
        "data",
        "models",
        "plots",
    },
    "data.py": {"_names"},
    "models.py": {"_names"},
    "_backend.py": set(),
    "_names.py": set(),
}


def imported(path: Path) -> set[str]:
    """The rooms of blokern that a file imports, wherever in the file."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("blokern.")}
    return rooms


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_follow_the_layers(room: str) -> None:
    folder = ROOT / "blokern" / room
    for path in [folder] if room.endswith(".py") else folder.rglob("*.py"):
        assert imported(path) <= ALLOWED[room], path


def test_only_ops_touches_native_ops() -> None:
    for path in (ROOT / "blokern").rglob("*.py"):
        if path.parent.name != "ops":
            assert "torch.ops.blokern" not in path.read_text(), path


def includes(path: Path) -> list[str]:
    return re.findall(r'#include [<"](.+?)[>"]', path.read_text())


def test_kernels_know_no_torch() -> None:
    """Only the dtypes' header-only definitions: so that any compiler builds a kernel in a second or two."""
    torch_side = {
        "library.cpp",
        "bindings.cpp",
        "checks.h",
        "memory_overlap.h",
        "arrange.h",
        "stacks.h",
        "dispatch.h",
    }
    torch_side |= {"torch_ops.h", "torch_cpu.h", "torch_cuda.h", "cuda_call.h"}
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.name not in torch_side and not path.name.startswith("register_"):
            known = [name for name in includes(path) if name.startswith(("torch/", "ATen/", "c10/"))]
            assert all(name.startswith("torch/headeronly/") for name in known), path


def test_one_file_includes_the_heavy_header() -> None:
    heavy = [path.name for path in (ROOT / "csrc").rglob("*.*") if "torch/extension.h" in includes(path)]
    assert heavy == ["bindings.cpp"]
