"""docs/benchmarks.md, as the peers' JSON files have it: `python -m benchmarks.peers.page`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from blokern._race import pretty

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

SUITES = {
    "attack": "Attacks and evaluation",
    "sparse": "Sparse layers and pruned networks",
    "curvature": "Curvature",
    "bilevel": "Implicit gradients",
}
NOTES = {
    "attack": (
        "The network is trained by PGD on 10,000 images before the contests, and computes in float32 for all. Rows "
        "with a surrogate take their steps by a copy of it whose BatchNorms are folded into its convolutions, in "
        "float32 or bfloat16, and every point that they find is judged by the network itself."
    ),
    "sparse": (
        "Every rival gets its factors in the layout that serves it best. torch-pruning is told which filters go, where "
        "`compact` reads masks: it finds what is constant or read by nobody, and moves constants into biases."
    ),
    "curvature": (
        "blokern records the forward pass in Python, some 50 µs an op: that counts in a small network's product from "
        "scratch, and not in a large one's. torch.func was compiled beforehand."
    ),
}
HEAD = """# blokern beside other libraries

The same work on the same inputs, in one run, the rivals in turns; a result is compared with the others' before its time
counts, and `result` says how. Times are medians; a ratio is the median over rounds of two times of one round: how many
times longer than the row in bold a rival took. Within 2 % two rivals are level: either may come out ahead, measured
again. Rows with a surrogate, which no peer has, count for no place, and neither does an attack that leaves more images
standing than the strongest. `make bench-peers` measures all of it, in a venv of its own, and writes this page from the
JSON files in [benchmarks/results](../benchmarks/results); the cases are in [benchmarks/peers](../benchmarks/peers),
whose docstrings say what exactly is compared.
"""

Row = dict[str, Any]
Place = Literal["first", "level", "behind"]
LEVEL = 1.02
WEAKER = 1.0  # points: an attack that leaves so many more images standing has not done the same work


def render(results: Path = RESULTS) -> str:
    return "\n".join(
        [HEAD, *_summary(results), *(part for suite in SUITES for part in _suite(results, suite))]
    )


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    page.write_text(render(results))
    print(f"written: {page}")


def _load(results: Path, suite: str) -> dict[str, Any] | None:
    path = results / f"peers_{suite}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _contests(result: dict[str, Any]) -> dict[str, list[Row]]:
    contests: dict[str, list[Row]] = {}
    for row in result["rows"]:
        contests.setdefault(row["case"], []).append(row)
    return contests


def is_ours(row: Row) -> bool:
    return str(row["rival"]).startswith("blokern")


def _is_like_for_like(row: Row) -> bool:
    """Not with a surrogate, which no peer has."""
    return is_ours(row) and "surrogate" not in str(row["rival"])


def _holding(row: Row) -> float | None:
    """The percentage of images that an attack leaves standing, where that is a contest's result."""
    found = re.fullmatch(r"([\d.]+)% hold", str(row.get("result")))
    return None if found is None else float(found[1])


def verdict(rows: Sequence[Row]) -> tuple[Place, str]:
    """The place of the fastest of ours among the peers, surrogates aside, and the sentence that says so."""
    ours = min(filter(_is_like_for_like, rows), key=lambda row: row["times_ours"])
    strongest = min((row for row in rows if not is_ours(row)), key=lambda row: _holding(row) or 0.0)
    left, least = _holding(ours), _holding(strongest)
    if left is not None and least is not None and left > least + WEAKER:
        return "behind", f"{strongest['rival']} is stronger: {least}% of the images hold, {left}% of ours."
    peer = min((row for row in rows if not is_ours(row)), key=lambda row: row["times_ours"])
    ratio = peer["times_ours"] / ours["times_ours"]
    if max(ratio, 1 / ratio) <= LEVEL:
        return "level", f"{ours['rival']} and {peer['rival']} are level."
    if ratio > 1:
        return "first", f"{ours['rival']} is first, {ratio:.2f} times faster than {peer['rival']}."
    return "behind", f"{peer['rival']} is first, {1 / ratio:.2f} times faster than {ours['rival']}."


def _summary(results: Path) -> Iterator[str]:
    measured = [found for suite in SUITES if (found := _load(results, suite)) is not None]
    if not measured:
        yield "Nothing is measured yet.\n"
        return
    contests = [(case, *verdict(rows)) for result in measured for case, rows in _contests(result).items()]
    count = Counter(place for _, place, _ in contests)
    yield f"blokern is first in {count['first']} of {len(contests)}, and level with the first in {count['level']}.\n"
    if others := [f"- {case}: {sentence}" for case, place, sentence in contests if place != "first"]:
        yield "## Where blokern is not first\n"
        yield "\n".join(others) + "\n"


def _suite(results: Path, suite: str) -> Iterator[str]:
    result = _load(results, suite)
    if result is None:
        return
    machine, versions = result["machine"], dict(result["versions"])
    yield f"## {SUITES[suite]}\n"
    yield (
        f"{machine['processor']}; {machine['cores']} cores, {machine['threads']} threads; "
        f"{result['date'][:10]}, commit {result['commit']}.\n"
    )
    if suite in NOTES:
        yield NOTES[suite] + "\n"
    for case, rows in _contests(result).items():
        yield f"### {case}\n"
        yield verdict(rows)[1] + "\n"
        yield "| | time | ratio | spread | result |\n|---|---:|---:|---:|---|"
        for row in rows:
            name = f"**{row['rival']}**" if row["ours"] else row["rival"]
            spread = f"±{row['spread']:.0%}" if row["rounds"] > 1 else ""
            yield f"| {name} | {pretty(row['seconds'])} | {row['times_ours']:.2f} | {spread} | {row['result']} |"
        yield ""
    for case, why in result.get("left_out", {}).items():
        yield f"### {case}\n"
        yield f"Not measured: results were not the same. {why}\n"
    yield f"![{SUITES[suite]}](../benchmarks/results/peers_{suite}.png)\n"
    yield "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".\n"


if __name__ == "__main__":
    write()
