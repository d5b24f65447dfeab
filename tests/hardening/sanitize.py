"""The kernels under sanitizers: `make sanitize`, or

    python tests/hardening/sanitize.py address [--cases 4000]   # ASan and UBSan
    python tests/hardening/sanitize.py thread

builds them apart from the installed ones, and runs the fuzzer and the tests of the ops on them. Python and torch are
not instrumented: the sanitizer's runtime is loaded before them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
HERE = "tests/hardening"
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # Python frees nothing at its end; sizes beyond memory are refused, as without the sanitizer.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # Torch's own loops run on libgomp, whose barriers TSan does not see.
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}
#: Not those of torch's machinery around an op, nor those that build or load other kernels.
PYTEST = ["-P", "-m", "pytest", "-x", "-o", "pythonpath=", "-p", "no:cacheprovider"]
PYTEST += ["--hypothesis-profile=ci"]  # no deadlines
PYTEST += ["-k", "not compile and not opcheck and not instruction_set"]
OP_TESTS = [
    f"{HERE}/test_hostile_calls.py",
    f"{HERE}/test_every_op.py",
    "tests/attack/test_ops.py",
    "tests/sparse/test_mask.py",
    "tests/sparse/test_products.py",
    "tests/sparse/test_packed.py",
    "tests/sparse/test_convolution.py",
    "tests/sparse/test_selection.py",
    "tests/sparse/test_pruning.py",
    "tests/curvature/test_curvature_ops.py",
    "tests/curvature/test_multi_tensor.py",
]


def build(kind: str, capability: str) -> Path:
    """The package with sanitized kernels, in a folder of its own."""
    folder = ROOT / "build" / f"sanitize-{kind}"
    settings = {"BLOKERN_SANITIZE": kind, "BLOKERN_CPU_CAPABILITIES": capability}
    log = ROOT / "build" / f"sanitize-{kind}.log"
    log.parent.mkdir(exist_ok=True)
    print(f"building; {log} has what the compiler says", flush=True)
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(folder)]
    with log.open("w") as told:
        subprocess.run(
            command, cwd=ROOT, env=os.environ | settings, stdout=told, stderr=subprocess.STDOUT, check=True
        )
    return folder


def environment(kind: str, capability: str, folder: Path) -> dict[str, str]:
    # With C++'s own, for the sanitizers to find what throws.
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in (RUNTIMES[kind], "libstdc++.so")
    ]
    settings = {
        "LD_PRELOAD": " ".join(library.stdout.strip() for library in libraries),
        "PYTHONPATH": str(folder),
        "BLOKERN_CPU_CAPABILITY": capability,
    }
    return os.environ | settings | OPTIONS


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=RUNTIMES)
    parser.add_argument("--cases", type=int, default=4000, help="of the fuzzer")
    options = parser.parse_args()
    best = torch.backends.cpu.get_cpu_capability()
    capability = best if best in ("AVX2", "AVX512") else "DEFAULT"
    folder = build(options.kind, capability)
    fuzz = [f"{HERE}/fuzz.py", "--cases", str(options.cases), "--threads", "3", "--hostile"]
    commands = {
        "address": [[*fuzz, "8"], [*PYTEST, *OP_TESTS]],
        "thread": [
            [*fuzz, "0"],
            [
                *PYTEST,
                *OP_TESTS,
                f"{HERE}/test_threads_and_processes.py",
                "-k",
                "threads and not worker and not forked and not leaks",
            ],
        ],
    }[options.kind]
    where = "import blokern; print('sanitized:', blokern.__file__)"
    for command in [["-P", "-c", where], *commands]:
        # TSan's shadow memory has fixed addresses, which random ones may run into.
        prefix = ["setarch", "-R"] if options.kind == "thread" else []
        ran = subprocess.run(
            [*prefix, sys.executable, *command],
            cwd=ROOT,
            env=environment(options.kind, capability, folder),
            check=False,
        )
        if ran.returncode != 0:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
