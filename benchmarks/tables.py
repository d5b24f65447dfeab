"""Writes the tables of docs/ out of results/: `python -m benchmarks.tables`, after a new result.

A table lies between <!-- table: NAME --> and <!-- end -->, and its figures have no other source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SPARSITIES = (50, 80, 90, 95, 99)
RESNET18 = ("64→64, 32²", "128→128, 16²", "256→256, 8²", "512→512, 4²")


class Results:
    """A suite's rows: how many times as long as its case's own rival each took."""

    def __init__(self, suite: str) -> None:
        found = json.loads((RESULTS / f"{suite}.json").read_text())
        self.rows = {(row["case"], row["rival"]): row for row in found["rows"]}
        machine, torch = found["machine"], found["versions"]["torch"]
        self.source = (
            f"{machine['processor']}; {machine['threads']} threads; torch {torch}; {found['date'][:10]}; "
            f"[{suite}.json](../benchmarks/results/{suite}.json)"
        )

    def times(self, case: str, *rivals: str) -> float:
        """That of the fastest of the rivals; a name's end may be left open by "…". KeyError where none has run."""
        found = [
            row["times_ours"]
            for (its_case, rival), row in self.rows.items()
            if its_case == case
            and any(rival == name or (name[-1] == "…" and rival.startswith(name[:-1])) for name in rivals)
        ]
        if not found:
            raise KeyError(f"{case}: no {' or '.join(rivals)}")
        return min(found)

    def megabytes(self, case: str, rival: str) -> int:
        return round(self.rows[case, rival]["peak_bytes"] / 1e6)


def number(value: float) -> str:
    """Two digits, or the whole number."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], source: str) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join([*lines, "", f"*{source}*"])


def attack() -> str:
    found = Results("attack")
    sizes = ("128×3×32×32", "64×3×224×224")
    rows = [
        ("L∞, float32: eager, torchattacks' sequence", "L∞ step, {}, float32", "eager…"),
        ("L∞, float32: torch.compile, its best formula", "L∞ step, {}, float32", "torch.compile…"),
        ("L∞, float32: a torch kernel of equal traffic", "L∞ step, {}, float32", "limit: torch.addcmul, 3 reads, i…"),
        ("L∞, bfloat16: eager", "L∞ step, {}, bfloat16", "eager…"),
        ("L∞, bfloat16: torch.compile, its best formula", "L∞ step, {}, bfloat16", "torch.compile…"),
        ("L2: eager", "L2 step, {}", "eager…"),
        ("L2: torch.compile", "L2 step, {}", "torch.compile…"),
        ("L1: sort-based projection, AutoAttack's", "L1 step, {}", "eager…"),
        ("APGD, L∞: eager, AutoAttack's", "APGD step (L∞), {}", "eager…"),
        ("APGD, L∞: torch.compile", "APGD step (L∞), {}", "torch.compile…"),
        ("Fast-BAT's step with its mask: eager", "Fast-BAT step with mask, {}", "eager…"),
        ("Fast-BAT's step with its mask: torch.compile", "Fast-BAT step with mask, {}", "torch.compile…"),
        ("random start: eager", "Random start (L∞), {}", "eager…"),
    ]  # fmt: skip
    body = [
        [label, *(number(found.times(case.format(size), rival)) for size in sizes)]
        for label, case, rival in rows
    ]
    return table(["time over blokern's", *sizes], body, found.source)


def linear() -> str:
    found = Results("sparse")

    def ratio(case: str, rival: str, ours: str = "blokern") -> float:
        return found.times(case, rival) / found.times(case, ours)

    rows = []
    for batch in (128, 8, 1):
        cases = [f"linear 2048→2048, batch {batch}, {s} % sparse, " for s in SPARSITIES]
        step, packed = "refresh, forward and backward", "blokern, packed beforehand"
        dense, beforehand = "F.linear(x, weight * mask)", "F.linear, masked beforehand"
        for label, part, rival, ours in (
            (f"batch {batch}, forward", "forward", dense, "blokern"),
            (f"batch {batch}, forward, over a weight masked beforehand", "forward", beforehand, "blokern"),
            (f"batch {batch}, forward, over torch's CSR (MKL)", "forward", "torch CSR", "blokern"),
            (f"batch {batch}, packed", "forward", dense, packed),
            (f"batch {batch}, packed, over torch's CSR", "forward", "torch CSR", packed),
            (f"batch {batch}, new mask, forward, backward", step, dense, "blokern"),
        ):
            rows.append([label, *(number(ratio(case + part, rival, ours)) for case in cases)])
    return table(["times faster", *(f"{s} %" for s in SPARSITIES)], rows, found.source)


def convolution() -> str:
    found = Results("sparse")
    rows = []
    for label, part in (
        ("forward", "forward"),
        ("new mask, forward, backward", "refresh, forward and backward"),
    ):
        for layout in ("samples innermost", "NCHW"):
            cells = []
            for sparsity in SPARSITIES[1:]:
                ratios = []
                for size in RESNET18:
                    case = f"conv {size}, 3×3/1, batch 128, {sparsity} % sparse, {part}"
                    ratios.append(found.times(case, "F.conv2d…") / found.times(case, f"blokern, {layout}"))
                cells.append(number(geometric_mean(ratios)))
            rows.append([f"{label}, {layout}", *cells])
    return table(["times faster", *(f"{s} %" for s in SPARSITIES[1:])], rows, found.source)


def networks() -> str:
    found = Results("pruning")
    training, inference = (f"preact_resnet18, batch 128: {what}" for what in ("a training step", "inference"))
    bip = "resnet18, batch 128, 90 % sparse: a step of BiP, and a dense training step"
    step = found.times(bip, "dense, NCHW", "dense, channels_last")
    rows = [
        [
            "training step, 95 % of each layer, times faster than dense",
            number(found.times(training, "dense…")),
        ],
        ["inference, the same", number(found.times(inference, "dense…"))],
        ["a step of BiP at 90 % of all weights, in dense steps", number(1 / step)],
        [
            "the released code's sequence for it",
            number(found.times(bip, "BiP, released sequence") / step),
        ],
    ]
    return table(["network, batch 128", "times"], rows, found.source)


def curvature() -> str:
    found = Results("curvature")
    cases = {
        "MLP": "MLP 784-512-512-10, batch 128: products",
        "transformer": "transformer, 4 layers of 128, batch 16, 64 tokens: products",
        "preact_resnet18": "preact_resnet18, batch 32: products",
    }
    rivals = dict.fromkeys(
        rival for case, rival in found.rows if case == cases["MLP"] and rival != "a gradient"
    )
    rows = []
    for rival in rivals:
        stack = 8 if "8 stacked" in rival else 1
        times = [found.times(case, rival) for case in cases.values()]
        label = rival + ", a vector" * (stack > 1)
        memory = found.megabytes(cases["preact_resnet18"], rival)
        rows.append([label, *(number(t / stack) for t in times), str(memory)])
    return table(["in gradients", *cases, "its peak, MB"], rows, found.source)


def bilevel() -> str:
    found = Results("bilevel")
    case = "Training step, preact_resnet18, batch 64"
    rows = [
        [rival, number(found.times(case, rival)), str(found.megabytes(case, rival))]
        for its_case, rival in found.rows
        if its_case == case
    ]
    return table(["preact_resnet18, batch 64", "in standard steps", "peak, MB"], rows, found.source)


class Comparison(NamedTuple):
    """A row of README's table: two rivals of one case that do the whole of the same work, every option named."""

    work: str
    suite: str
    case: str
    theirs: tuple[str, str]  #: the rival's name among the results, and what it is called here
    ours: tuple[str, str]


LINF_STEP = "attack", "L∞ step, 64×3×224×224, float32"
EVALUATION = "peers_attack", "PGD-50-10 of small_cnn of width 64, 1000 test images, end to end"
LINEAR_95 = "sparse", "linear 2048→2048, batch 128, 95 % sparse, forward"
NETWORK = "pruning", "preact_resnet18, batch 128: a training step"
BIP_STEP = "pruning", "resnet18, batch 128, 90 % sparse: a step of BiP, and a dense training step"
ONE_PRODUCT = "curvature", "preact_resnet18, batch 32: products"
MORE_PRODUCTS = "peers_curvature", "preact_resnet18, batch 32: Hessian times vector, at one point"
BILEVEL_STEP = "bilevel", "Training step, preact_resnet18, batch 64"
COMPARISONS = (
    Comparison(
        *("PGD step, L∞, 64×3×224×224, into a new tensor", *LINF_STEP),
        *(("eager (torchattacks)", "torchattacks, eager"), ("blokern, new tensor", "`pgd_step`")),
    ),
    Comparison(
        *("the same, in place, beside a compiled formula", *LINF_STEP),
        *(("torch.compile (bounds), in place", "torch.compile"), ("blokern, in place", "`pgd_step_`")),
    ),
    Comparison(
        *("robust accuracy under PGD-50-10, 1000 images, small_cnn", *EVALUATION),
        *(("torchattacks, MultiAttack",) * 2, ("blokern", "`evaluate`, float32")),
    ),
    Comparison(
        *("the same, steps by a bfloat16 copy, judged in float32", *EVALUATION),
        *(("torchattacks, MultiAttack",) * 2, ("blokern, bf16 surrogate", '`evaluate`, surrogate="bf16"')),
    ),
    Comparison(
        *("masked linear layer 2048→2048, 95 % pruned, 128 samples, forward", *LINEAR_95),
        *(("torch CSR", "torch's CSR product"), ("blokern", "`masked_linear`")),
    ),
    Comparison(
        *("training step, preact_resnet18, batch 128, 95 % of each layer pruned", *NETWORK),
        *(("dense, channels_last", "not pruned, channels_last"), ("blokern, 95 % of each layer", "`sparsify`")),
    ),
    Comparison(
        *("the same, 95 % of all weights pruned", *NETWORK),
        *(("dense, channels_last", "not pruned, channels_last"), ("blokern, 95 % of all weights", "`sparsify`")),
    ),
    Comparison(
        *("BiP step, resnet18, batch 128, 90 % pruned", *BIP_STEP),
        *(("BiP, released sequence", "the released code's sequence"), ("BiP", "`BiP`")),
    ),
    Comparison(
        *("one Hessian-vector product, preact_resnet18, batch 32", *ONE_PRODUCT),
        *(("hvp: double backward", "double backward"), ("hvp", "`hvp`")),
    ),
    Comparison(
        *("one more product at the same point", *MORE_PRODUCTS),
        *(("PyHessian", "PyHessian, gradient's graph kept"), ("blokern, linearized", "`linearize`, then `hvp`")),
    ),
    Comparison(
        *("Fast-BAT step, preact_resnet18, batch 64", *BILEVEL_STEP),
        *(("fast-bat, released sequence", "the released code's sequence"), ("fast-bat", "`FastBAT`")),
    ),
)  # fmt: skip


def before_after() -> str:
    """For README: of each family what people run, what blokern takes for the same, and the ratio, measured in turns."""
    suites = {suite: Results(suite) for suite in dict.fromkeys(c.suite for c in COMPARISONS)}
    body = []
    for work, suite, case, (theirs, before_label), (ours, after_label) in COMPARISONS:
        before, after = (suites[suite].rows[case, rival] for rival in (theirs, ours))
        cells = [
            f"{duration(row['seconds'])}, {label}"
            for row, label in ((before, before_label), (after, after_label))
        ]
        body.append([work, *cells, number(before["times_ours"] / after["times_ours"])])
    processors = ", ".join(dict.fromkeys(found.source.partition(";")[0] for found in suites.values()))
    return table(
        ["float32, 2 threads", "beside", "blokern", "times faster"],
        body,
        f"{processors}; medians of interleaved runs, from [benchmarks/results](benchmarks/results)",
    )


def duration(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.0f} s"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make for make in (before_after, attack, linear, convolution, networks, curvature, bilevel)
}


def filled(text: str) -> str:
    """The page with its tables as the results have them."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.S,
    )


def pages() -> list[Path]:
    paths = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    return [path for path in paths if "<!-- table: " in path.read_text()]


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text()))
        print(page)
