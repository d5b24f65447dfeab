"""Running code on every CPU build that this machine supports, in processes of their own: one loads one build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from blokern import _backend

X86_ORDER = ["DEFAULT", "AVX2", "AVX512"]


def supported() -> list[str]:
    """The builds that this processor can run, the widest last."""
    best = torch.backends.cpu.get_cpu_capability()
    known = X86_ORDER[: X86_ORDER.index(best) + 1] if best in X86_ORDER else ["DEFAULT"]
    return [name for name in _backend.C.cpu_capabilities.split() if name in known]


def check_everywhere(code: str, folder: Path) -> None:
    """Run `code`, which may import the tests of `folder`, on every supported build; fails where it does."""
    paths = os.pathsep.join([str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    told = f"{code}\nfrom blokern import _backend; print(_backend.CPU_CAPABILITY)"
    for name in supported():
        environment = os.environ | {_backend.OVERRIDE: name, "PYTHONPATH": paths}
        run = subprocess.run(
            [sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == name
