"""`blokern bench SUITE`: runs suites, prints their tables, writes results/SUITE.json and the pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import attack, bilevel, plot, sparse
from benchmarks.race import Case, Row, report, run_case, table, write

SUITES: dict[str, Callable[[], Iterator[Case]]] = {
    "attack": attack.cases,
    "sparse": sparse.cases,
    "bilevel": bilevel.cases,
}
#: Steps of a network take seconds, ops milliseconds.
ROUNDS = {"attack": 31, "sparse": 9, "bilevel": 7}
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="blokern bench", description=__doc__)
    parser.add_argument("suite", choices=[*SUITES, "all"], nargs="?", default="all")
    parser.add_argument("--rounds", type=int, help="samples of each rival (default: the suite's own)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, help="folder for JSON and PNG (default: none are written)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for suite in SUITES if args.suite == "all" else [args.suite]:
        rows: list[Row] = []
        for case in SUITES[suite]():
            if args.only in case.name:
                rows += run_case(case, args.rounds or ROUNDS[suite])
                print(table(rows[-len(case.rivals) :]), flush=True)
        if args.out is not None:
            path = write(args.out, report(suite, rows))
            print(f"\nwritten: {path}, {plot.draw(path)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
