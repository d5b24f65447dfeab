"""Tries blokern on networks that others wrote: `make zoo`, or

    python tests/zoo/zoo.py [--only resnet] [--column hvp] [--page]

Without choices it takes every network and column, writes results.json beside itself, and docs/compatibility.md from
that. Rows that were tried with choices replace those of before. Exit status 1 where a cell is wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
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
    parser.add_argument("--page", action="store_true", help="write the page alone, from results.json")
    parser.add_argument(
        "--load", type=Path, help=argparse.SUPPRESS
    )  # the other process of the column `saved`
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))
        return 0
    found = tried(options.only, options.column, options.load)
    if options.load:
        print(json.dumps(found))
        return 0
    before = (
        json.loads(RESULTS.read_text())["networks"]
        if RESULTS.exists() and (options.only or options.column)
        else {}
    )
    rows = {name: before.get(name, {}) | found.get(name, {}) for name in {**before, **found}}
    results = {"versions": versions(), "networks": rows}
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(results))
    counts = Counter(cell["status"] for row in rows.values() for cell in row.values())
    print(f"{len(rows)} networks: {', '.join(f'{count} {status}' for status, count in counts.items())}")
    return 1 if counts["wrong"] else 0


def tried(only: str, column: str, load: Path | None) -> dict[str, dict[str, Any]]:
    """The cells, by network and column."""
    import torch
    import zoo_columns
    from zoo_networks import networks

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = [network for network in networks() if only in network.name]
    found: dict[str, dict[str, Any]] = {network.name: {} for network in chosen}

    def put(network: Any, name: str, cell: zoo_columns.Cell) -> None:
        found[network.name][name] = {"status": cell.status, "detail": cell.detail}

    def file(folder: Path, network: Any) -> Path:
        return folder / f"{network.name.replace('/', '-')}.pt"

    if load:
        for network in chosen:
            if file(load, network).exists():
                put(network, SAVED, zoo_columns.tried(lambda n: zoo_columns.load(n, file(load, n)), network))
        return found
    with tempfile.TemporaryDirectory() as folder:
        for network in chosen:
            start = time.perf_counter()
            for name, run in zoo_columns.COLUMNS.items():
                if column in ("", name):
                    put(network, name, zoo_columns.tried(run, network))
            if column in ("", SAVED):
                put(
                    network,
                    SAVED,
                    zoo_columns.tried(lambda n: zoo_columns.save(n, file(Path(folder), n)), network),
                )
            marks = "  ".join(f"{name} {cell['status']}" for name, cell in found[network.name].items())
            print(
                f"{network.name} ({time.perf_counter() - start:.0f} s): {marks}", file=sys.stderr, flush=True
            )
        if column in ("", SAVED):
            command = [sys.executable, __file__, "--load", folder, "--only", only]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for name, row in json.loads(done.stdout).items():
                found[name].update(row)
    return found


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
