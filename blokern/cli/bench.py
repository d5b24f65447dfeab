"""``blokern bench``: the repository's benchmarks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

__all__ = ["bench"]


def bench(argv: list[str]) -> int:
    """Measure the speed of ops and steps, in a checkout of the repository: blokern bench --help."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").exists():
        raise FileNotFoundError(f"the benchmarks come with the repository; {root} has no benchmarks/run.py")
    sys.path.insert(0, str(root))
    try:
        return int(importlib.import_module("benchmarks.run").main(argv) or 0)
    finally:
        sys.path.remove(str(root))
