"""Builds C++ and CUDA sources for the emulation (cuda_emulation/device.h), by ninja, into build/cuda_emulation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
FOLDER = ROOT / "build" / "cuda_emulation"

FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # nvcc's unroll
    "-ffp-contract=off",
    "-fno-strict-aliasing",  # a vector access is a cast, as in CUDA
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    f"-I{HERE / 'cuda_emulation'}",
    f"-I{ROOT / 'csrc'}",
    *(f"-isystem {path}" for path in include_paths()),
]
DEVICE = HERE / "cuda_emulation" / "device.cpp"


def build_family(family: str) -> Path:
    """The server of a family's kernels, all there are."""
    kernels = sorted((ROOT / "csrc" / family).glob("*_cuda.cu"))
    return build(f"{family}_emulated", [HERE / f"{family}_emulated.cpp", *kernels])


def build(name: str, sources: list[Path]) -> Path:
    """The program made of `sources` and the emulated device; only what changed is compiled anew."""
    folder, program = FOLDER / name, FOLDER / name / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"flags = {' '.join(FLAGS)}",
        "rule compile\n  command = $cxx $flags -MD -MF $out.d -x c++ -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        # The kernels' names in reports come from the dynamic symbols.
        "rule link\n  command = $cxx $in -fsanitize=address,undefined -rdynamic -ldl -o $out",
    ]
    objects = []
    for source in [DEVICE, *sources]:
        objects.append(folder / f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {program}: link {' '.join(map(str, objects))}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    ninja = Path(sys.executable).parent / "ninja"
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    run = subprocess.run([ninja, "-C", folder, "-j", jobs], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"the emulation does not build:\n{run.stdout}{run.stderr}")
    return program
