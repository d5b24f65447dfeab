"""``blokern bench``: a network's speed, and the repository's benchmarks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from blokern.cli.bench_model import bench_model
from blokern.cli.options import first_line

__all__ = ["bench"]


def bench(argv: list[str]) -> int:
    """Measure the speed of a network or, in a checkout of the repository, of ops and steps: blokern bench --help."""
    if argv[:1] == ["model"]:
        return bench_model(argv[1:])
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(
            "usage: blokern bench model CHECKPOINT ...\n"
            "       blokern bench SUITE ...\n\n"
            f"  model      {first_line(bench_model)}\n"
            "  SUITE      Ops and steps against their peers, in a checkout of the repository; all: every suite.\n\n"
            "blokern bench model --help says more, and so does blokern bench all --help."
        )
        return 0 if argv else 2
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").exists():
        raise FileNotFoundError(f"the benchmarks come with the repository; {root} has no benchmarks/run.py")
    sys.path.insert(0, str(root))
    try:
        return int(importlib.import_module("benchmarks.run").main(argv) or 0)
    except ModuleNotFoundError as error:
        if error.name in ("benchmarks", "blokern"):
            raise
        raise ImportError(
            f"the suites need {error.name}: `make build` installs what they compare with"
        ) from error
    finally:
        sys.path.remove(str(root))
