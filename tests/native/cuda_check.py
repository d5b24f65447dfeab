"""Compiles every CUDA kernel for real architectures and looks at what came out: no spills, no stack, the registers of
each kernel, and 128-bit loads and stores in those that stream. Says so and ends well where there is no nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "build" / "cuda_check"
ARCHITECTURES = ("sm_80", "sm_90a")
#: Kernels whose results are a few sums, and one whose inputs are too: what is theirs to stream is the rest.
SUMS, NARROW = ("column_sums", "LabelWeightsRow"), ("column_factors",)
SUMS += ("count_digits", "count_bits", "11pack_pieces", "multiply_few", "inner_products")
SUMS += ("DotBlock", "add_blocks", "multiply_packed")
NARROW += ("choose_digit", "mask_ties", "nm_mask_any", "transpose_halves", "count_parts", "fill_parts")
NARROW += ("gather_entries", "scatter_entries")
NARROW += ("multiply_streamIfLi1", "multiply_streamIfLi2", "multiply_streamIdLi1")  # of few samples
#: Kernels that write much, and read no more than a mask's bits.
FILLS = ("unpack_pieces", "cleared_packs")
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]
FLAGS += [word for path in include_paths() for word in ("-isystem", path)]


def find(tool: str) -> str | None:
    """A CUDA tool: on the path, in CUDA_HOME, or of its PyPI package."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    site = Path(sys.prefix) / "lib" / f"python3.{sys.version_info.minor}" / "site-packages" / "nvidia"
    candidates = [Path(home) / "bin" / tool, *site.glob(f"**/bin/{tool}")]
    return shutil.which(tool) or next((str(path) for path in candidates if path.exists()), None)


def compiled(nvcc: str, source: Path, architecture: str) -> tuple[Path, str]:
    """(cubin, what ptxas told)"""
    cubin = FOLDER / f"{source.stem}.{architecture}.cubin"
    command = [nvcc, *FLAGS, f"-arch={architecture}", "-Xptxas=-v", "-Werror=all-warnings", "-cubin", source]
    run = subprocess.run([*command, "-o", cubin], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SystemExit(f"{source.name} does not compile for {architecture}:\n{run.stdout}{run.stderr}")
    return cubin, run.stdout + run.stderr


def kernels(told: str) -> dict[str, tuple[int, int, int]]:
    """By mangled name: registers, bytes of stack, bytes of spills."""
    found = {}
    for part in told.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        registers = re.search(r"Used (\d+) registers", part).group(1)
        found[part.split("'")[0]] = int(registers), int(stack), int(stores) + int(loads)
    return found


def readable(names: list[str]) -> list[str]:
    """Demangled, without namespaces and arguments."""
    told = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    return [
        re.sub(r"^void |\w+::(?=\w+[<,> ])", "", name.partition("(")[0]).replace("> >", ">>")
        for name in told.splitlines()
    ]


def without_wide_accesses(disassembler: str, cubin: Path) -> list[str]:
    """The kernels that lack a 128-bit load or a 128-bit store."""
    run = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True)
    lacking = []
    for part in re.split(r"(?=\.section\s+\.text\.)", run.stdout)[1:]:
        name = re.match(r"\.section\s+\.text\.(\w+)", part).group(1)
        if any(narrow in name for narrow in NARROW):
            continue
        wanted = ("LDG",) if any(sums in name for sums in SUMS) else ("LDG", "STG")
        wanted = ("STG",) if any(fills in name for fills in FILLS) else wanted
        bits = 64 if "column_" in name and re.search("Half|BFloat16", name) else 128  # packs of four elements
        if not all(re.search(rf"\b{word}\.E\S*{bits}", part) for word in wanted):
            lacking.append(name)
    return lacking


def main() -> None:
    nvcc = find("nvcc")
    if nvcc is None:
        print("cuda-check: no nvcc here: nothing compiled, nothing checked")
        return
    disassembler = find("nvdisasm")
    FOLDER.mkdir(parents=True, exist_ok=True)
    jobs = [(source, arch) for source in sorted((ROOT / "csrc").rglob("*.cu")) for arch in ARCHITECTURES]

    def checked(job: tuple[Path, str]) -> tuple[str, list[str]]:
        cubin, told = compiled(nvcc, *job)
        return told, [] if disassembler is None else without_wide_accesses(disassembler, cubin)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(checked, jobs))
    table: dict[str, dict[str, int]] = {}
    faults, count = [], 0
    for (_, arch), (told, lacking) in zip(jobs, results, strict=True):
        found = kernels(told)
        count += len(found)
        for name, (registers, stack, spills) in zip(readable([*found]), found.values(), strict=True):
            table.setdefault(name, {})[arch] = registers
            if stack or spills:
                faults.append(f"{name}, {arch}: {stack} bytes of stack, {spills} of spills")
        faults += [f"{name}, {arch}: no 128-bit loads or stores" for name in lacking and readable(lacking)]
    width = max(map(len, table))
    print(f"{'registers':{width}}{''.join(f'{arch:>8}' for arch in ARCHITECTURES)}")
    for name, by_arch in sorted(table.items()):
        print(f"{name:{width}}{''.join(f'{by_arch[arch]:8}' for arch in ARCHITECTURES)}")
    if faults:
        raise SystemExit("\n".join(["cuda-check failed:", *faults]))
    seen = "128-bit loads and stores in each" if disassembler else "no nvdisasm: SASS not looked at"
    print(f"cuda-check: {count} kernels, no spills, no stack; {seen}")


if __name__ == "__main__":
    main()
