"""`make gpu`: builds in place with this interpreter's torch, tests marked cuda, compute-sanitizer, benchmarks; a JSON
and a table. Needs a CUDA device, nvcc and pytest; no network, and nine minutes at most: a step that runs out of time is
told as such, and the next one begins."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TOTAL_SECONDS = 530.0
#: Beside plain cases, which reach every kernel, nothing: a sanitizer is a hundred times slower.
PLAIN = "kernel_once or test_curvature_ops_equal_their_oracles"
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--kernel-name", "kernel_substring=blokern")


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str]
    seconds: float  # at most
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    name: str
    outcome: str  # "passed", "failed (exit code N)", "out of time", "not run: …"
    seconds: float


def steps(out: Path) -> list[Step]:
    python = sys.executable
    pytest = (python, "-m", "pytest", "tests/cuda", "-m", "cuda", "-p", "no:cacheprovider")
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    build = (
        ("FORCE_CUDA", "1"),
        ("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}"),
        ("BLOKERN_CPU_CAPABILITIES", torch.backends.cpu.get_cpu_capability()),
        ("MAX_JOBS", str(os.cpu_count())),
    )
    unpooled = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # so that each tensor has bounds of its own
    return [
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 240.0, build),
        Step("tests", (*pytest, "--durations=5"), 150.0),
        Step(
            "benchmarks",
            (python, "-m", "benchmarks.cuda", "--out", str(out / "cuda.json"), "--seconds", "100"),
            150.0,
        ),
        Step("memcheck", (*SANITIZER, "--tool", "memcheck", *pytest, "-k", PLAIN), 75.0, unpooled),
        Step("racecheck", (*SANITIZER, "--tool", "racecheck", *pytest, "-k", PLAIN), 75.0),
    ]


def run(step: Step, left: float) -> Outcome:
    print(f"\n== {step.name}: {' '.join(step.command)}", flush=True)
    if shutil.which(step.command[0]) is None:
        return Outcome(step.name, f"not run: no {step.command[0]} here", 0.0)
    limit, start = min(step.seconds, left), time.monotonic()
    if limit <= 0:
        return Outcome(step.name, "not run: no time left", 0.0)
    environment = os.environ | dict(step.environment) | {"PYTHONPATH": str(ROOT)}
    # A group of its own, so that a step that is stopped leaves nothing running.
    process = subprocess.Popen(step.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(limit)
        outcome = "passed" if code == 0 else f"failed (exit code {code})"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        outcome = "out of time"
    return Outcome(step.name, outcome, round(time.monotonic() - start, 1))


def run_all(planned: Sequence[Step], total: float = TOTAL_SECONDS) -> list[Outcome]:
    """Each in turn; without a build there is nothing to run."""
    until, outcomes = time.monotonic() + total, []
    for step in planned:
        outcomes.append(run(step, until - time.monotonic()))
        if step.name == "build" and outcomes[-1].outcome != "passed":
            outcomes += [Outcome(later.name, "not run: no build", 0.0) for later in planned[1:]]
            break
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    return "\n".join(f"{o.name:12}{o.seconds:8.1f} s  {o.outcome}" for o in outcomes)


def write(out: Path, outcomes: Sequence[Outcome], card: str) -> Path:
    """The steps and, where they ran, the benchmarks, as one file."""
    found = out / "cuda.json"
    measured = json.loads(found.read_text()) if found.exists() else {}
    path = out / "gpu.json"
    told = {"card": card, "steps": [asdict(o) for o in outcomes], "benchmarks": measured}
    path.write_text(json.dumps(told, indent=1) + "\n")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    args = parser.parse_args(argv)
    if args.dry_run:
        for step in steps(args.out):
            print(f"{step.name}, at most {step.seconds:.0f} s: {' '.join(step.command)}")
        return 0
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        print(
            f"make gpu: no CUDA device to be seen by {sys.executable} (torch {torch.__version__}, for {built})"
        )
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cuda.json").unlink(missing_ok=True)
    outcomes = run_all(steps(args.out))
    card = torch.cuda.get_device_name()
    print(f"\n{card}\n{summary(outcomes)}\nwritten: {write(args.out, outcomes, card)}")
    return 0 if all(o.outcome == "passed" for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
