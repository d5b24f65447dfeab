"""``blokern bench model``: how fast a pruned network is, dense and sparse."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from blokern.cli.compare import check_different
from blokern.cli.options import INPUT_SHAPE, Integers, Option, make_parser, parse, say, set_threads
from blokern.cli.output import JSON, check_files, write_json
from blokern.cli.source import Source

if TYPE_CHECKING:
    from torch import Tensor, nn

    from blokern._race import Row

__all__ = ["bench_model"]

#: Of the largest output of the dense network: far above rounding in float32, far below a wrong result.
_TOLERANCE = 1e-3
#: Of a form's samples, above which a figure is told with a warning.
_SCATTER = 0.25


def bench_model(argv: list[str]) -> int:
    """Time a pruned network's inference in its forms: blokern bench model CHECKPOINT."""
    parser = make_parser(
        "bench model",
        "Time of a pruned network's inference on the CPU: dense, in both memory formats; sparse, masked layers "
        "in NCHW and with samples innermost; and compacted, where its masks free channels. The forms take turns, round "
        "after round, on the same images in NCHW, and must compute the same. Latency is that of batch 1.",
        [
            Option("batch", Integers, Integers("1,8,128"), "images a batch, such as 1,8,128"),
            Option("rounds", int, 7, "samples of each form"),
            INPUT_SHAPE,
            Option("threads", int, 2, "CPU threads"),
            Option("json", str, None, "also write the figures to this file"),
        ],
        of_run=(),
    )
    parser.add_argument(
        "checkpoint", type=str, help="best.pt or last.pt of a run, or the run's folder for its best.pt"
    )
    options = parse(parser, argv)
    check_different("batch", options["batch"])
    for name, least in (("batch", min(options["batch"])), ("rounds", options["rounds"])):
        if least < 1:
            raise ValueError(f"{name} must be at least 1, got {least}")

    import torch

    from blokern import keep_freed_memory
    from blokern._race import Case, report, run_case
    from blokern.bilevel import checkpoint

    source = Source.open(options["checkpoint"])
    path, payload = str(source.path), source.payload
    check_files([("json", options["json"], JSON)], sources=[source.path])
    set_threads(options["threads"])
    model = checkpoint.load_model(payload, path).eval()
    shape = checkpoint.find_input_shape(model, payload, path, options["input_shape"])
    forms = _forms(model, path)
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    for batch in options["batch"]:
        x = torch.rand(batch, *shape, generator=generator)
        with torch.inference_mode():
            _check_same({name: form(x) for name, form in forms.items()})
            rivals = {name: partial(form, x) for name, form in forms.items()}
            rows += run_case(Case(f"batch {batch}", rivals, ours="dense"), options["rounds"])
        print(_table(batch, rows[-len(forms) :]), flush=True)
    if (widest := max(row.spread for row in rows)) > _SCATTER:
        say(
            f"the samples of a form differ by up to ±{widest:.0%}: other programs take the processors, and the factors "
            "above are not to be relied on; --rounds 21 or a quieter machine makes them firmer"
        )
    if options["json"] is not None:
        write_json(options["json"], {"checkpoint": path, "input_shape": shape, **report(rows)})
    return 0


def _forms(sparse: nn.Module, path: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each form of the masked network, "dense" first; all take images in NCHW."""
    import copy

    import torch

    from blokern.bilevel.checkpoint import CheckpointError
    from blokern.bilevel.export import compacted
    from blokern.bilevel.masking import kept_of
    from blokern.sparse import masks_of, samples_innermost, to_dense

    def channels_last(model: nn.Module) -> Callable[[Tensor], Tensor]:
        nhwc = torch.channels_last
        model = copy.deepcopy(model).to(memory_format=nhwc)  # type: ignore[call-overload]  # torch's stub
        return lambda x: model(x.contiguous(memory_format=nhwc))

    if not masks_of(sparse):
        raise ValueError(
            f"{path} has no masks: there is one form of it only; blokern prune makes sparse networks"
        )
    print(f"{path}: {kept_of(sparse)}")
    dense = to_dense(copy.deepcopy(sparse))
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": dense,
        "dense, channels_last": channels_last(dense),
        "sparse": sparse,
        "sparse, samples innermost": samples_innermost(copy.deepcopy(sparse)),
    }
    try:
        small = compacted(sparse, path)
    except CheckpointError as error:
        print(f"not compacted: {error}", file=sys.stderr)
    else:
        forms |= {"compacted": small, "compacted, channels_last": channels_last(small)}
    return forms


def _check_same(outputs: Mapping[str, Tensor]) -> None:
    """Raise FloatingPointError unless all forms compute what the dense one does, and that is finite."""
    dense = outputs["dense"]
    largest = dense.abs().max()
    for name, output in outputs.items():
        difference = (output - dense).abs().max()
        if not bool(difference <= _TOLERANCE * largest):
            raise FloatingPointError(
                f"{name}: its outputs differ from the dense network's by {difference:.3g}, "
                f"whose largest is {largest:.3g}"
            )


def _table(batch: int, rows: Sequence[Row]) -> str:
    """Markdown."""
    from blokern._race import pretty

    lines = [
        f"\n### batch {batch}\n",
        "| | time | images/s | × faster | spread |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (
            pretty(row.seconds),
            f"{batch / row.seconds:,.0f}",
            f"{1 / row.times_ours:.2f}",
            f"±{row.spread:.0%}",
        )
        lines.append(f"| {row.rival} | {' | '.join(cells)} |")
    return "\n".join(lines)
