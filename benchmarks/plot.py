"""Draws a suite's JSON, times as multiples of ours: a panel a case with a bar a rival; where cases are the same work at
many sparsities, a panel a work with a curve a rival."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

#: Panels that one reads below each other; a suite with more cases has curves.
MANY = 40
SPARSITY = re.compile(r", (\d+) % sparse")
OURS, THEIRS = "#1f6fb4", "#9aa5b1"


def draw(path: Path) -> Path:
    """Writes PATH's picture beside it, as .png, and returns where."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(path.read_text())
    cases = _grouped((row["case"], row) for row in result["rows"])
    figure = _curves(cases) if len(cases) > MANY else _bars(cases)
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


def _grouped(pairs: Iterable[tuple[str, Row]]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for key, row in pairs:
        groups.setdefault(key, []).append(row)
    return groups


def _bars(cases: dict[str, list[Row]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(cases),
        figsize=(9, sum(0.6 + 0.28 * len(rows) for rows in cases.values()) + 0.8),
        gridspec_kw={"height_ratios": [2 + len(rows) for rows in cases.values()]},
        squeeze=False,
        layout="constrained",
    )
    for axis, (case, rows) in zip(axes[:, 0], cases.items(), strict=True):
        names = [row["rival"] for row in rows]
        values = [row["times_ours"] for row in rows]
        drawn = axis.barh(names, values, color=[OURS if row["ours"] else THEIRS for row in rows])
        axis.bar_label(drawn, labels=[f" {value:.2f}×" for value in values], fontsize=8)
        axis.set_title(case, loc="left", fontsize=10)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(min(0.5, *values), max(values) * 1.6)
        axis.axvline(1, color="black", linewidth=0.6)
        axis.tick_params(labelsize=8)
    return figure


def _curves(cases: dict[str, list[Row]], columns: int = 3) -> Figure:
    import matplotlib.pyplot as plt

    works = _grouped((SPARSITY.sub("", case), row) for case, rows in cases.items() for row in rows)
    lines = -(-len(works) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 2.6 * lines + 0.8), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(works) :]:
        axis.set_axis_off()
    for axis, (work, rows) in zip(axes.flat, works.items(), strict=False):
        for rival, of_rival in _grouped((row["rival"], row) for row in rows).items():
            axis.plot(*_curve(of_rival), marker=".", label=rival, linewidth=2 if of_rival[0]["ours"] else 1)
        axis.set_title(work, loc="left", fontsize=9)
        axis.set_yscale("log")
        axis.axhline(1, color="black", linewidth=0.6)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("% sparse", fontsize=7)
        axis.legend(fontsize=6)
    return figure


def _curve(rows: Sequence[Row]) -> tuple[list[str], list[float]]:
    """By sparsity, as labels at equal distances; "" for a work of one alone."""
    found = [SPARSITY.search(row["case"]) for row in rows]
    return ["" if match is None else match[1] for match in found], [row["times_ours"] for row in rows]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)))
