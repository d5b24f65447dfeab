"""`blokern bench SUITE`: runs suites, prints their tables, writes results/SUITE.json and the pictures."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import attack, bilevel, curvature, distributed, plot, pruning, sparse
from blokern._race import Case, Row, pretty, report, run_case

SUITES: dict[str, Callable[[], Iterator[Case]]] = {
    "attack": attack.cases,
    "sparse": sparse.quick,
    "pruning": pruning.cases,
    "curvature": curvature.cases,
    "bilevel": bilevel.cases,
    "distributed": distributed.cases,
}
#: In their place with --full.
FULL = {"sparse": sparse.full}
#: Steps of a network take seconds, ops milliseconds.
ROUNDS = {"attack": 31, "sparse": 7, "pruning": 5, "curvature": 11, "bilevel": 7, "distributed": 7}
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="blokern bench", description=__doc__)
    parser.add_argument("suite", choices=[*SUITES, "all"], nargs="?", default="all")
    parser.add_argument("--rounds", type=int, help="samples of each rival (default: the suite's own)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--full", action="store_true", help="every layer, batch and sparsity of sparse: hours"
    )
    parser.add_argument("--out", type=Path, help="folder for JSON and PNG (default: none are written)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    suites = SUITES | (FULL if args.full else {})
    for suite in suites if args.suite == "all" else [args.suite]:
        rows: list[Row] = []
        for case in suites[suite]():
            if args.only in case.name:
                rows += run_case(case, args.rounds or ROUNDS[suite])
                print(table(rows[-len(case.rivals) :]), flush=True)
        if args.out is not None:
            path = write(args.out, {"suite": suite, "commit": commit(), **report(rows)})
            print(f"\nwritten: {path}, {plot.draw(path)}")
    return 0


def table(rows: Sequence[Row]) -> str:
    """Markdown, a section a case."""
    lines: list[str] = []
    for case in dict.fromkeys(row.case for row in rows):
        lines += [
            f"\n### {case}\n",
            "| | time | × ours | spread | GB/s | peak |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for row in (row for row in rows if row.case == case):
            name = f"**{row.rival}**" if row.ours else row.rival
            rate = f"{row.gigabytes_a_second:.1f}" if row.gigabytes_a_second else ""
            peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f} MB"
            lines.append(
                f"| {name} | {pretty(row.seconds)} | {row.times_ours:.2f} | ±{row.spread:.0%} | {rate} | {peak} |"
            )
    return "\n".join(lines)


def write(folder: Path, result: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['suite']}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return path


def commit() -> str:
    """The commit measured; "-dirty" if anything but the results that a run itself writes differs from it."""
    revision = _git("rev-parse", "--short", "HEAD")
    written = (":(exclude)results", ":(exclude,top)docs/benchmarks.md")
    changed = _git("status", "--porcelain", "--", ":/", *written)
    return (revision or "unknown") + ("-dirty" if changed else "")


def _git(*words: str) -> str:
    root = Path(__file__).parent
    return subprocess.run(
        ["git", *words], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
