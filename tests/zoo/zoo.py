"""Tries blokern on networks that others wrote: `make zoo`, or

    python tests/zoo/zoo.py [--only resnet] [--column hvp] [--part 0/2] [--page]

Without choices it takes every network and column, writes results.json beside itself, and docs/compatibility.md from
that. Rows that were tried with choices replace those of before. Exit status 1 where a cell is wrong.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
SAVED = "saved"  # the column whose second half runs in another process
HEAD = """# Networks that others wrote

{count} networks with random weights, as their libraries make them, in float64. Each cell is blokern's answer beside
plain torch's (tests/zoo has the comparisons; `make zoo` runs them and writes this page):

- **attack**: three steps of PGD, beside a plain loop.
- **hvp**, **ggnvp**, **mixed_hvp**: products, beside autograd differentiated twice.
- **SGD**, **AdamW**: 30 % of the weights kept; outputs, and after three steps with momentum and weight decay weights
  and outputs, beside a dense network of weight · mask. **saved**: its state loaded in another process. **EMA**:
  averaged by torch's AveragedModel without and with buffers. **compile**: outputs and gradients under torch.compile
  (backend aot_eager). **export**: by torch.export.
- **compact**: half of the filters of each layer pruned; outputs of the smaller network beside the masked one's.

✓ exact (to rounding) · ↺ exact, by double backward instead of blokern's own rules · ✗ refused, with the reason below
· – does not apply.
"""
MARKS = {"exact": "✓", "falls back": "↺", "refused": "✗", "none": "–", "wrong": "**wrong**"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a part of the network's name")
    parser.add_argument("--column", default="", help="one column alone")
    parser.add_argument("--part", default="0/1", help="1/2: every second network, from the second on")
    parser.add_argument("--page", action="store_true", help="write the page alone, from results.json")
    parser.add_argument(
        "--load", type=Path, help=argparse.SUPPRESS
    )  # the other process of the column `saved`
    options = parser.parse_args()
    if options.load:
        print(json.dumps(loaded(options.load)))
        return 0
    if not options.page:
        everything = options.only == options.column == "" and options.part == "0/1"
        if everything and RESULTS.exists():
            RESULTS.unlink()
        first, parts = map(int, options.part.split("/"))
        try_networks(options.only, options.column, slice(first, None, parts))
    results = json.loads(RESULTS.read_text())
    PAGE.write_text(page(results))
    counts = Counter(cell["status"] for row in results["networks"].values() for cell in row.values())
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{len(results['networks'])} networks: {told}")
    return 1 if counts["wrong"] else 0


def try_networks(only: str, column: str, part: slice) -> None:
    """Fills the cells, a network after another."""
    import torch
    import zoo_columns
    from zoo_networks import networks

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for network in [network for network in networks() if only in network.name][part]:
            start = time.perf_counter()
            row = {
                name: asdict(zoo_columns.tried(run, network))
                for name, run in zoo_columns.COLUMNS.items()
                if column in ("", name)
            }
            if column in ("", SAVED):
                file = Path(folder) / network.name.replace("/", "-")
                row[SAVED] = asdict(zoo_columns.tried(lambda n: zoo_columns.save(n, file), network))  # noqa: B023
            put({network.name: row})
            marks = "  ".join(f"{name} {cell['status']}" for name, cell in row.items())
            print(
                f"{network.name} ({time.perf_counter() - start:.0f} s): {marks}", file=sys.stderr, flush=True
            )
        command = [sys.executable, __file__, "--load", folder]
        put(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def loaded(folder: Path) -> dict[str, dict[str, Any]]:
    """The column `saved` of the networks that another process has saved in a folder."""
    import zoo_columns
    from zoo_networks import networks

    warnings.simplefilter("ignore")
    files = {network: folder / network.name.replace("/", "-") for network in networks()}
    return {
        network.name: {SAVED: asdict(zoo_columns.tried(lambda n: zoo_columns.load(n, file), network))}  # noqa: B023
        for network, file in files.items()
        if file.exists()
    }


def put(rows: dict[str, dict[str, Any]]) -> None:
    """Cells into results.json, beside those that are there, and that other processes put there."""
    folder = os.open(RESULTS.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        known = json.loads(RESULTS.read_text())["networks"] if RESULTS.exists() else {}
        for name, row in rows.items():
            known[name] = known.get(name, {}) | row
        results = {"versions": versions(), "networks": dict(sorted(known.items()))}
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    finally:
        os.close(folder)


def versions() -> dict[str, str]:
    packages = ("torch", "timm", "torchvision", "transformers", "segmentation-models-pytorch")
    return {package: version(package) for package in packages}


def page(results: dict[str, Any]) -> str:
    rows = results["networks"]
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [HEAD.format(count=len(rows))]
    told = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
    lines += [
        f"With {told}.",
        "",
        f"| network | {' | '.join(columns)} |",
        "| --- |" + " :-: |" * len(columns),
    ]
    for name, row in sorted(rows.items()):
        lines.append(
            f"| {name} | {' | '.join(MARKS[row[c]['status']] if c in row else '' for c in columns)} |"
        )
    for title, status in (
        ("Refused", "refused"), ("Products by double backward", "falls back"), ("Does not apply", "none"), ("Wrong",
        "wrong")
    ):  # fmt: skip
        reasons: dict[tuple[str, str], list[str]] = {}
        for name, row in sorted(rows.items()):
            for column, cell in row.items():
                if cell["status"] == status:
                    reasons.setdefault((name, cell["detail"]), []).append(column)
        if reasons:
            lines += ["", f"## {title}", ""]
            lines += [f"- {name}, {', '.join(names)}: {detail}" for (name, detail), names in reasons.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
