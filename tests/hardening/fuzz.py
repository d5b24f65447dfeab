"""Fuzz every op for as long as you like: `make fuzz`, or

    python tests/hardening/fuzz.py --cases 100000 [--seed 0] [--only spmm] [--hostile 20]

A case is a random call compared with its oracle, followed by `--hostile` variants of each call that it made with a few
arguments replaced. It is made by its number alone: `--seed N --cases 1` runs case N again.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter

import hostile
import torch
from arbitrary import Draw
from op_cases import CASES


def run_case(number: int, names: list[str], variants: int) -> tuple[str, int]:
    """The op, and how many hostile calls followed."""
    source = random.Random(number)
    name = names[number % len(names)]
    if not variants:
        CASES[name](Draw(source))
        return name, 0
    calls = hostile.recorded(Draw(source), name)
    for call in calls:
        for _ in range(variants):
            hostile.attack(Draw(source), call)
    return name, variants * len(calls)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="the first case's number")
    parser.add_argument("--only", default="", help="a part of the op's name")
    parser.add_argument("--hostile", type=int, default=0, help="hostile variants of each call")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="each case's number before it runs")
    options = parser.parse_args()
    names = [name for name in CASES if options.only in name]
    torch.set_num_threads(options.threads)
    start, counts, hostile_calls, failed = time.perf_counter(), Counter[str](), 0, 0
    for number in range(options.seed, options.seed + options.cases):
        if options.verbose:
            print(number, names[number % len(names)], file=sys.stderr, flush=True)
        try:
            name, more = run_case(number, names, options.hostile)
        except KeyboardInterrupt:
            break
        except Exception:
            failed += 1
            print(f"case {number} ({names[number % len(names)]}):", flush=True)
            traceback.print_exc(limit=-3, file=sys.stdout)
            if failed == 20:
                break
        else:
            counts[name] += 1
            hostile_calls += more
    seconds = time.perf_counter() - start
    print(
        f"{sum(counts.values())} cases and {hostile_calls} hostile calls passed, {failed} failed, {seconds:.0f} s"
    )
    for name, count in sorted(counts.items()):
        print(f"  {count:7d}  {name}")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
