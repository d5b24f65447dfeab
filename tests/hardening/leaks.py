"""Whether calls leak: `python tests/hardening/leaks.py --calls 100000`, shared out among all ops, says what the
process's memory was before and after, and fails where it grew."""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from pathlib import Path

import every_op
import torch
from hostile import REFUSALS, Call

#: What the allocator may keep, of all calls together.
MOST_GROWTH = 4 << 20


class _MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


try:
    _mallinfo2 = ctypes.CDLL(None).mallinfo2
    _mallinfo2.restype = _MallInfo
    CAN_COUNT = True
except AttributeError:
    CAN_COUNT = False


def allocated() -> int:
    """Bytes that malloc has given out."""
    info = _mallinfo2()
    return int(info.uordblks + info.hblkhd)


def resident() -> int:
    """Bytes of the process that lie in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def repeat(call: Call, count: int) -> None:
    func, args = call
    with torch.no_grad():
        for _ in range(count):
            func(*args)


def growth(call: Call, count: int) -> int:
    """Of the bytes in use, by that many calls."""
    before = allocated()
    repeat(call, count)
    return allocated() - before


def refuse(call: Call, count: int) -> None:
    """The same for calls that are refused, as exceptions carry strings out of C++."""
    func, args = call
    for _ in range(count):
        try:
            func(
                *[torch.zeros(1, 2, 3, dtype=torch.int16) if isinstance(a, torch.Tensor) else a for a in args]
            )
        except REFUSALS:
            continue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    count = parser.parse_args().calls
    calls = every_op.calls()
    each = -(-count // (2 * len(calls)))
    for call in calls.values():
        repeat(call, 50)
        refuse(call, 50)
    before = resident()
    for call in calls.values():
        repeat(call, each)
        refuse(call, each)
    after = resident()
    print(
        f"{2 * each * len(calls)} calls of {len(calls)} ops, half of them refused: "
        f"{before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after"
    )
    return after - before > MOST_GROWTH


if __name__ == "__main__":
    sys.exit(main())
