import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from blokern import keep_freed_memory

STEADY = """
import resource, torch
from blokern import keep_freed_memory
print(keep_freed_memory())
def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(million << 20) for million in (1, 4, 2, 7, 3, 16, 6, 8)]  # MiB / 4
    while blocks:
        blocks.pop()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults_of_a_step() for _ in range(16)))  # a block that is split in between may cost one of them pages
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_glibc_takes_the_setting_and_freed_memory_is_used_again() -> None:
    # In a process of its own: the setting is the whole process's, and cannot be taken back.
    run = subprocess.run([sys.executable, "-c", STEADY], capture_output=True, text=True, check=True)
    told, faults = run.stdout.split()
    assert told == "True"
    assert int(faults) < 100  # 188 MiB are 48,128 pages


def test_elsewhere_it_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    assert not keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
