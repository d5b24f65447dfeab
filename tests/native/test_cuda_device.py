"""The emulated device against kernels with planted bugs (cuda_emulation/test_device.cpp)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from emulation_build import HERE, build

SCHEDULES = ("forward", "reverse", "shuffled")


@pytest.fixture(scope="module")
def program() -> Path:
    return build("test_device", [HERE / "cuda_emulation" / "test_device.cpp"])


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def test_planted_bugs_are_caught(program: Path) -> None:
    """Correct kernels pass under every schedule; each wrong one is caught, a wrong result or a refusal."""
    cases = run(program).stdout.splitlines()
    sound = [case for case in cases if case.startswith("ok: ")]
    bugs = [case for case in cases if case.startswith("bug: ")]
    assert len(sound) + len(bugs) == len(cases)
    for case in sound:
        for schedule in SCHEDULES:
            told = run(program, case, schedule)
            assert told.returncode == 0, (case, schedule, told.stderr)
    caught = [case for case in bugs if any(run(program, case, schedule).returncode for schedule in SCHEDULES)]
    print(f"planted bugs caught: {len(caught)} of {len(bugs)}")
    assert caught == bugs


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("bug: off by one", r"heap-buffer-overflow"),
        ("bug: misaligned vectors", r"misaligned address"),
        ("bug: shared array overflows", r"use-after-poison"),
        ("bug: barriers in two branches", r"barrier divergence"),
        ("bug: mask of lanes that do not come", r"no thread can go on"),
    ],
)
def test_reports_say_where(program: Path, case: str, message: str) -> None:
    told = run(program, case, "forward").stderr
    assert re.search(message, told)
    assert re.search(r"kernel .*planted::\w+", told)
    assert re.search(r"block \(0, 0, 0\), thread \(\d+, 0, 0\)", told)
