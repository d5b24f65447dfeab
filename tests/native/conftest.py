"""The families' cases and oracle checks also serve their emulated CUDA kernels; at the end, how many of these ran."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulation_build import FOLDER, ROOT

for family in ("attack", "sparse", "curvature"):
    sys.path.insert(0, str(Path(__file__).parent.parent / family))

LAUNCHED = "BLOKERN_LAUNCHED"


@pytest.fixture(scope="session", autouse=True)
def launched(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the emulated device writes what it was asked to run (device.cpp)."""
    os.environ[LAUNCHED] = str(tmp_path_factory.mktemp("emulation") / "launched")


def kernels_there_are() -> dict[tuple[str, int], str]:
    """Those of the programs that are built: by program and address, their names."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cuh"))
    names = re.findall(r"__global__ void(?: __launch_bounds__\([^)]*\))?\s+(\w+)\(", sources)
    kernel = re.compile(rf"(?:void )?blokern::({'|'.join(names)})[<(]")
    found = {}
    for program in FOLDER.glob("*_emulated/*_emulated"):
        told = subprocess.run(["nm", "-C", program], capture_output=True, text=True, check=True).stdout
        for line in told.splitlines():
            address, _, symbol = line.partition(" ")
            if kernel.match(symbol[2:]):
                found[str(program), int(address, 16)] = symbol[2:]
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    path = Path(os.environ.get(LAUNCHED, ""))
    if not path.is_file():
        return
    lines = (line.rpartition(" ") for line in path.read_text().splitlines())
    ran, every = {(program, int(address)) for program, _, address in lines}, kernels_there_are()
    terminalreporter.write_line(f"CUDA kernels emulated: {len(every.keys() & ran)} of {len(every)}")
    missing = sorted(every[kernel] for kernel in every.keys() - ran)
    for kernel in missing if len(missing) <= 20 else []:  # more where not all of these tests ran
        terminalreporter.write_line(f"  not run: {kernel}")
