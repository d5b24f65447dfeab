"""``blokern export``: a pruned network as a file for other programs."""

from __future__ import annotations

from pathlib import Path

from blokern.cli.options import INPUT_SHAPE, check_known, make_parser, parse
from blokern.cli.output import EXPORT, check_files
from blokern.cli.source import Source

__all__ = ["FORMS", "export"]

FORMS = ("dense", "compacted", "sparse")


def export(argv: list[str]) -> int:
    """Write a pruned network for other programs: blokern export CHECKPOINT --form FORM --out FILE."""
    parser = make_parser(
        "export",
        "dense: a state_dict of the dense network, pruned weights being zeros, for torch.load. compacted: the network "
        "without the channels that its masks free, for torch.export.load, which needs no blokern. sparse: the kept "
        "weights and the masks' bits in the safetensors format; blokern.bilevel.export.load_sparse reads it.",
        [INPUT_SHAPE],
        of_run=(),
    )
    parser.add_argument(
        "checkpoint", type=str, help="best.pt or last.pt of a run, or the run's folder for its best.pt"
    )
    parser.add_argument("--form", type=str, default="dense", help=f"one of {', '.join(FORMS)}")
    parser.add_argument("--out", type=str, required=True, help="the file to write")
    options = parse(parser, argv)
    check_known("form", options["form"], FORMS)

    from blokern.bilevel.export import save_compacted, save_dense, save_sparse
    from blokern.bilevel.masking import kept_of
    from blokern.sparse import to_dense

    source, out = Source.open(options["checkpoint"]), Path(options["out"])
    check_files([("out", out, EXPORT)], sources=[source.path])
    dense = sum(weight.nbytes for weight in to_dense(source.network()).state_dict().values())
    if options["form"] == "compacted":
        save_compacted(source.payload, source.path, out, options["input_shape"])
    else:
        save = save_dense if options["form"] == "dense" else save_sparse
        save(source.payload, source.path, out)
    print(f"{out}: {out.stat().st_size:,} bytes; the dense network's weights take {dense:,}")
    print(kept_of(source.network()))
    return 0
