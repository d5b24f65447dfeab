"""The native build: `_C` (schemas, bindings) and the CPU kernels once for each instruction set."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"

# As torch's own inductor builds; `torch.backends.cpu.get_cpu_capability()` names the one to load.
X86 = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"],
}
CAPABILITIES = X86 if platform.machine() in ("x86_64", "AMD64") else {"DEFAULT": []}

FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
    "-fvisibility=hidden",
    # One formula has the same bits on every instruction set and in torch: a fused multiply-add is written, not made.
    "-ffp-contract=off",
    *(flag for path in include_paths() for flag in ("-isystem", path)),
]


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in CSRC.glob(pattern))


def extension(name: str, files: list[str], flags: list[str], links: list[str]) -> CppExtension:
    headers = sources("**/*.h")
    return CppExtension(
        f"blokern.{name}",
        files,
        include_dirs=[str(CSRC)],
        depends=headers,
        extra_compile_args=FLAGS + flags,
        extra_link_args=links,
    )


def cpu_library(capability: str, flags: list[str]) -> CppExtension:
    return extension(
        f"_cpu_{capability.lower()}",
        sources("cpu_module.cpp", "*/*_cpu.cpp"),
        # at::parallel_for is inline: without OpenMP here it would quietly run on one thread.
        [*flags, "-fopenmp"],
        ["-fopenmp"],
    )


def cuda_decision() -> str:
    """Whether CUDA kernels are built, and why."""
    if torch.version.cuda is None:
        return "no: this torch is a CPU build"
    return "no: this version of blokern has CPU kernels alone"


def main() -> None:
    built, cuda = " ".join(CAPABILITIES), cuda_decision()
    print(f"blokern: CPU kernels for {built}; CUDA: {cuda}")
    facts = {"TORCH_VERSION": torch.__version__, "CPU_CAPABILITIES": built, "CUDA": cuda}
    core = extension(
        "_C",
        sources("library.cpp", "bindings.cpp"),
        [f'-DBLOKERN_{name}="{value}"' for name, value in facts.items()],
        [],
    )
    setup(
        ext_modules=[core, *(cpu_library(name, flags) for name, flags in CAPABILITIES.items())],
        cmdclass={"build_ext": BuildEachInItsOwnFolder},
    )


class BuildEachInItsOwnFolder(BuildExtension):
    """The CPU libraries share their sources, so each needs object files of its own; kept, so that ninja rebuilds
    only what changed."""

    def build_extension(self, ext: CppExtension) -> None:
        folder = ROOT / "build" / f"torch-{torch.__version__}" / ext.name.rpartition(".")[2]
        folder.mkdir(parents=True, exist_ok=True)
        self.build_temp = str(folder)
        super().build_extension(ext)


main()
