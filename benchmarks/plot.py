"""Draws a suite's JSON: a panel a case, a bar a rival, as multiples of our time."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def draw(path: Path) -> Path:
    """Writes PATH's picture beside it, as .png, and returns where."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(path.read_text())
    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    bars = [[row for row in result["rows"] if row["case"] == case] for case in cases]
    figure, axes = plt.subplots(
        len(cases),
        figsize=(9, sum(0.6 + 0.28 * len(rows) for rows in bars) + 0.8),
        gridspec_kw={"height_ratios": [2 + len(rows) for rows in bars]},
        squeeze=False,
        layout="constrained",
    )
    for axis, case, rows in zip(axes[:, 0], cases, bars, strict=True):
        names = [row["rival"] for row in rows]
        values = [row["times_ours"] for row in rows]
        colours = ["#1f6fb4" if row["ours"] else "#9aa5b1" for row in rows]
        drawn = axis.barh(names, values, color=colours)
        axis.bar_label(drawn, labels=[f" {value:.2f}×" for value in values], fontsize=8)
        axis.set_title(case, loc="left", fontsize=10)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(min(0.5, *values), max(values) * 1.6)
        axis.axvline(1, color="black", linewidth=0.6)
        axis.tick_params(labelsize=8)
    machine, versions = result["machine"], result["versions"]
    figure.suptitle(
        f"{result['suite']}: time over blokern's, lower is faster\n{machine['processor']}, "
        f"{machine['threads']} threads, torch {versions['torch']}, {result['date'][:10]}",
        fontsize=10,
    )
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)))
