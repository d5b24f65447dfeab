"""`make bench-peers`: holds the contests, writes results/peers_SUITE.json, its picture, and docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import plot
from benchmarks.peers import page
from benchmarks.peers.contest import Contest, hold
from benchmarks.run import commit, write
from blokern import keep_freed_memory
from blokern._race import pretty, report

SUITES = ("attack", "sparse", "curvature", "bilevel")
REQUIREMENTS = Path(__file__).parent / "requirements.txt"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("suite", choices=[*SUITES, "all"], nargs="?", default="all")
    parser.add_argument(
        "--rounds", type=int, default=15, help="samples of each rival in short work (default: 15)"
    )
    parser.add_argument("--images", type=int, default=1000, help="of the evaluation (default: 1000)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument(
        "--only",
        default="",
        help="only contests whose name contains this; the file's others stay as they are",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pt of the network to attack")
    parser.add_argument("--out", type=Path, help="folder for JSON and PNG; benchmarks/results: the page, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    all_equal = True
    measured = commit()  # hours before the results
    keep_freed_memory()  # as `blokern evaluate` and the trainers do; it serves every rival
    for suite in SUITES if args.suite == "all" else [args.suite]:
        cases: Callable[..., Iterator[Contest]] = import_module(f"benchmarks.peers.{suite}").cases
        about = (args.checkpoint, args.images) if suite == "attack" else ()
        rows: list[dict[str, Any]] = []
        left_out: dict[str, str] = {}
        for contest in cases(*about):
            if args.only in contest.name:
                print(f"\n{contest.name}", flush=True)
                try:
                    here = hold(contest, args.rounds)
                except AssertionError as error:  # hours may have been measured before
                    left_out[contest.name] = str(error)
                    print(f"  NOT EQUAL, left out: {error}")
                    continue
                for row in here:
                    print(
                        f"  {row['rival']:36} {pretty(row['seconds']):>8} ×{row['times_ours']:.2f} {row['result']}"
                    )
                rows += here
        all_equal &= not left_out
        if args.out is not None:
            result = {"suite": f"peers_{suite}", "commit": measured, **report([]), "rows": rows}
            result["left_out"] = left_out
            result["versions"] |= _peers()
            if args.only:
                _keep_others(result, args.out)
            path = write(args.out, result)
            print(f"\nwritten: {path}, {plot.draw(path)}")
    if args.out is not None and args.out.resolve() == page.RESULTS:
        page.write()
    return 0 if all_equal else 1


def _keep_others(result: dict[str, Any], folder: Path) -> None:
    """Add what the file that is there has of other contests."""
    path = folder / f"{result['suite']}.json"
    if path.exists():
        old = json.loads(path.read_text())
        held = {row["case"] for row in result["rows"]} | result["left_out"].keys()
        result["rows"] = [row for row in old["rows"] if row["case"] not in held] + result["rows"]
        others = {case: why for case, why in old.get("left_out", {}).items() if case not in held}
        result["left_out"] = others | result["left_out"]
        result["commit"] = ", ".join(dict.fromkeys([*old["commit"].split(", "), result["commit"]]))


def _peers() -> dict[str, str]:
    names = [line.partition("==")[0] for line in REQUIREMENTS.read_text().splitlines() if "==" in line]
    return {name: metadata.version(name) for name in names}


if __name__ == "__main__":
    raise SystemExit(main())
