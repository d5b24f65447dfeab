"""Side-by-side timing. Rivals run in turn, round after round, so that a slow moment of a shared machine falls on
all of them; a ratio is the median over rounds of two times of one round. Times themselves are medians."""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from blokern import _backend
from blokern._version import __version__

__all__ = ["Case", "Row", "pretty", "report", "run_case", "wall_time"]

#: Long enough for the clock and for a thread's wake-up not to matter.
MIN_SAMPLE_SECONDS = 2e-3


@dataclass(frozen=True)
class Case:
    """The same work done by several rivals. `ours` names the one that the ratios are of.

    `bytes` is the traffic that the work cannot avoid, for rates; 0 where that is not the limit. `memory`: measure what
    each needs at its peak, too. `long`: a call takes so long that warming up first does not matter.
    """

    name: str
    rivals: Mapping[str, Callable[[], object]]
    ours: str
    bytes: int = 0
    memory: bool = False
    long: bool = False


@dataclass(frozen=True)
class Row:
    """One rival of one case. times_ours: how many times our time it took (above 1: we are faster).

    peak_bytes: the most that tensors made during the work took at once, what it returns included; None: not measured.
    """

    case: str
    rival: str
    ours: bool
    seconds: float
    spread: float  # the middle half of the samples, over their median
    times_ours: float
    gigabytes_a_second: float
    peak_bytes: int | None
    rounds: int


def wall_time(run: Callable[[], object], repeats: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def run_case(
    case: Case, rounds: int, clock: Callable[[Callable[[], object], int], float] = wall_time
) -> list[Row]:
    """Time the rivals in turn, each once a round; a row a rival, in their order. clock: as `wall_time`."""
    repeats = {name: 1 if case.long else _repeats(run, clock) for name, run in case.rivals.items()}
    samples: dict[str, list[float]] = {name: [] for name in case.rivals}
    for _ in range(rounds):
        for name, run in case.rivals.items():
            samples[name].append(clock(run, repeats[name]))
    peaks = {name: _peak_bytes(run) if case.memory else None for name, run in case.rivals.items()}
    ours = samples[case.ours]
    return [_row(case, name, times, ours, peaks[name]) for name, times in samples.items()]


def _row(case: Case, name: str, times: Sequence[float], ours: Sequence[float], peak: int | None) -> Row:
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (median, median, median)
    return Row(
        case=case.name,
        rival=name,
        ours=name == case.ours,
        seconds=median,
        spread=(high - low) / median,
        times_ours=statistics.median(t / o for t, o in zip(times, ours, strict=True)),
        gigabytes_a_second=case.bytes / median / 1e9,
        peak_bytes=peak,
        rounds=len(times),
    )


def _repeats(run: Callable[[], object], clock: Callable[[Callable[[], object], int], float]) -> int:
    run()  # compile, allocate
    fastest = min(clock(run, 1) for _ in range(3))  # warms the caches, too
    return max(1, round(MIN_SAMPLE_SECONDS / max(fastest, 1e-9)))


def _peak_bytes(run: Callable[[], object]) -> int:
    """By what torch's CPU allocator tells its profiler; the buffers inside a library's kernels are not in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()  # alive until the profiler has ended
    del result
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(changes), default=0)


def pretty(seconds: float) -> str:
    """With a fitting unit, and three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that a reader needs to judge the figures, as JSON takes it."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "cores": torch.multiprocessing.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(terse=True),
        },
        "versions": {"blokern": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "build": _backend.build_info(),
        "rows": [asdict(row) for row in rows],
    }


def _processor() -> str:
    """The model's name, and the widest vectors: virtual machines often hide the rest."""
    try:
        info = Path("/proc/cpuinfo").read_text()
        found = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in found.items()}
        family = f"family {facts['cpu family']} model {facts['model']}"
        return f"{facts['model name']}, {family}, {torch.backends.cpu.get_cpu_capability()}"
    except (OSError, KeyError):
        return f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
