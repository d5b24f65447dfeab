"""The native build: `_C` (schemas, bindings), the CPU kernels once for each instruction set, and the CUDA kernels."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"

# As torch's own inductor builds; `torch.backends.cpu.get_cpu_capability()` names the one to load.
X86 = {
    "DEFAULT": ["-O1"],  # for processors older than 2013: what it is asked for most is to build quickly
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"],
}
CAPABILITIES = X86 if platform.machine() in ("x86_64", "AMD64") else {"DEFAULT": []}
# Some of them alone, separated by spaces, where a build is in a hurry, native being this machine's; the plain one where
# there is no such.
if "BLOKERN_CPU_CAPABILITIES" in os.environ:
    native = torch.backends.cpu.get_cpu_capability()
    wanted = [native if name == "native" else name for name in os.environ["BLOKERN_CPU_CAPABILITIES"].split()]
    CAPABILITIES = {name: CAPABILITIES[name] for name in wanted if name in CAPABILITIES} or {"DEFAULT": []}

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

# BLOKERN_SANITIZE=address (ASan and UBSan) or thread (TSan): for tests/hardening/sanitize.py, never for use.
SANITIZER = os.environ.get("BLOKERN_SANITIZE", "")
SANITIZED = ["-O0", "-g1", "-fno-omit-frame-pointer", "-Wno-error"]
SANITIZERS = {
    "": [],
    "address": [
        *SANITIZED,
        "-fsanitize=address,undefined",
        "-fno-sanitize=vptr,null,object-size,pointer-overflow",  # what ASan sees, for half the compiler's time
        "-fno-sanitize-recover=all",
    ],
    # TSan knows nothing of libgomp, which it cannot see synchronise: the kernels then run on std::thread.
    "thread": [*SANITIZED, "-fsanitize=thread", "-include", str(CSRC / "support/sanitize/threads.h")],
}[SANITIZER]
OPENMP = [] if SANITIZER == "thread" else ["-fopenmp"]

NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fmad=false",  # as -ffp-contract=off
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden",
]
#: Ampere, Hopper, and by its PTX what comes after; TORCH_CUDA_ARCH_LIST overrides it.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in CSRC.glob(pattern))


def build_folder(name: str) -> Path:
    """Each library's own, since they share sources; kept, so that ninja rebuilds only what changed."""
    return ROOT / "build" / f"torch-{torch.__version__}{SANITIZER}" / name


def extension(
    name: str, files: list[str], flags: list[str], links: list[str], objects: Sequence[Path] = ()
) -> CppExtension:
    return CppExtension(
        f"blokern.{name}",
        files,
        include_dirs=[str(CSRC)],
        depends=sources("**/*.h", "*/register_*.cpp"),
        extra_compile_args=FLAGS + flags,
        extra_link_args=links,
        extra_objects=[str(path) for path in objects],
    )


def cpu_libraries() -> Iterator[CppExtension]:
    """The CPU kernels, once for each instruction set. What registers them and shares out the threads knows no
    vectors, and most of torch's headers: it is compiled once, with the first library, for the least of the sets."""
    registrations = sources("*/register_*cpu.cpp")
    kernels = [path for path in sources("*/*_cpu.cpp") if path not in registrations]
    compiled: list[Path] = []
    for capability, flags in CAPABILITIES.items():
        name = f"_cpu_{capability.lower()}"
        files = ["csrc/cpu_module.cpp", *kernels, *([] if compiled else registrations)]
        # at::parallel_for is inline: without OpenMP here it would quietly run on one thread.
        links = [*OPENMP, *(flag for flag in SANITIZERS if flag.startswith("-fsanitize"))]
        yield extension(name, files, [*flags, *OPENMP, *SANITIZERS], links, compiled)
        compiled = compiled or [build_folder(name) / Path(path).with_suffix(".o") for path in registrations]


def cuda_library() -> CppExtension:
    return CUDAExtension(
        "blokern._cuda",
        sources("cpu_module.cpp", "*/register_*cuda.cpp", "*/*_cuda.cu"),
        include_dirs=[str(CSRC)],
        depends=sources("**/*.h", "**/*.cuh"),
        extra_compile_args={"cxx": FLAGS, "nvcc": NVCC_FLAGS},
    )


def nvcc_version() -> str | None:
    """As "13.0"; None where there is no nvcc."""
    nvcc = Path(CUDA_HOME) / "bin" / "nvcc" if CUDA_HOME else None
    found = nvcc if nvcc is not None and nvcc.exists() else shutil.which("nvcc")
    if found is None:
        return None
    told = subprocess.run([str(found), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", told).group(1)


def cuda_decision() -> tuple[bool, str]:
    """Whether CUDA kernels are built, and why. FORCE_CUDA=1 makes it an error not to."""
    nvcc, forced = nvcc_version(), os.environ.get("FORCE_CUDA") == "1"
    if torch.version.cuda is None:
        builds, why = False, "this torch is a CPU build"
    elif nvcc is None:
        builds, why = False, f"torch is built for CUDA {torch.version.cuda}, and there is no nvcc"
    elif nvcc.split(".")[0] != torch.version.cuda.split(".")[0]:
        builds, why = False, f"torch is built for CUDA {torch.version.cuda}, and nvcc is of CUDA {nvcc}"
    else:
        builds, why = True, f"CUDA {torch.version.cuda}, nvcc {nvcc}"
    if forced and not builds:
        raise SystemExit(f"blokern: FORCE_CUDA=1, but {why}")
    return builds, why


def main() -> None:
    builds_cuda, why = cuda_decision()
    built, cuda = " ".join(CAPABILITIES), f"{'yes' if builds_cuda else 'no'}: {why}"
    print(f"blokern: CPU kernels for {built}; CUDA: {cuda}")
    facts = {"TORCH_VERSION": torch.__version__, "CPU_CAPABILITIES": built, "CUDA": cuda}
    core = extension(
        "_C",
        sources("library.cpp", "bindings.cpp"),
        [f'-DBLOKERN_{name}="{value}"' for name, value in facts.items()],
        [],
    )
    libraries = list(cpu_libraries())
    if builds_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        libraries.append(cuda_library())
    setup(
        ext_modules=[core, *libraries],
        cmdclass={"build_ext": BuildEachInItsOwnFolder},
    )


class BuildEachInItsOwnFolder(BuildExtension):
    def build_extension(self, ext: CppExtension) -> None:
        folder = build_folder(ext.name.rpartition(".")[2])
        folder.mkdir(parents=True, exist_ok=True)
        self.build_temp = str(folder)
        super().build_extension(ext)


main()
