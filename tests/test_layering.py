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
        "threads.h",
    }
    torch_side |= {"torch_ops.h", "torch_cpu.h", "torch_cuda.h", "cuda_call.h"}
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.name not in torch_side and not re.match("register|host|.*_host", path.stem):
            known = [name for name in includes(path) if name.startswith(("torch/", "ATen/", "c10/"))]
            assert all(name.startswith("torch/headeronly/") for name in known), path


def test_one_file_knows_python_and_none_includes_the_heavy_header() -> None:
    python = {"torch/extension.h": [], "torch/csrc/utils/pybind.h": ["bindings.cpp"]}
    for header, files in python.items():
        assert [path.name for path in (ROOT / "csrc").rglob("*.*") if header in includes(path)] == files


def included(path: Path) -> set[str]:
    """Our own headers that a file includes, by whatever way."""
    direct = {name for name in includes(path) if (ROOT / "csrc" / name).exists()}
    return direct.union(*(included(ROOT / "csrc" / name) for name in direct))


def test_registrations_know_no_vectors() -> None:
    """They are compiled once, and linked with the kernels of every instruction set."""
    registrations = list((ROOT / "csrc").glob("*/register_*cpu.cpp"))
    assert registrations
    for path in registrations:
        assert "support/math.h" in included(path)
        assert "support/vec.h" not in included(path), path


def test_cuda_work_is_queued_on_its_tensors_device() -> None:
    """Kernels are told where to run by cuda_call.h alone, behind a device guard and on the current stream; and every
    registration runs what it queues there, or asks the device under a guard of its own."""
    told = (ROOT / "csrc" / "cuda_call.h").read_text()
    assert re.search(
        r"CUDAGuard guard\(like\.device\(\)\);.*run\(CudaCall\{.*getCurrentCUDAStream", told, re.DOTALL
    )
    for path in (ROOT / "csrc").rglob("register_*cuda.cpp"):
        text = path.read_text()
        assert not re.search(r"CudaCall\s*\{|CUDAStream", text), path
        assert "on_device_of" in text or "torch_cuda.h" in text, path
