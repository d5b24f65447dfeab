"""``blokern spectrum``: the curvature of a trained network's loss."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from blokern.cli.options import MACHINE_OPTIONS, Option, check_known, make_parser, parse, say, select_device
from blokern.cli.output import ANY_PICTURE, JSON, PICTURE, check_files, write_json
from blokern.cli.source import Source

if TYPE_CHECKING:
    from torch import Tensor

    from blokern.data import ImageDataset

__all__ = ["CURVATURES", "spectrum"]

CURVATURES = ("hessian", "ggn")


def spectrum(argv: list[str]) -> int:
    """Eigenvalues of a trained network's Hessian, with a picture: blokern spectrum CHECKPOINT."""
    parser = make_parser(
        "spectrum",
        "The extreme eigenvalues, the trace and the spectral density of the Hessian of a checkpoint's loss, the mean "
        "cross-entropy in eval mode over the images that it was trained on, by all parameters that were trained. An "
        "eigenvalue is printed with a bound on its error. Draws the density as a PNG. Takes steps · (samples + 1) + "
        "samples products with the matrix, each several passes over the images, but for those taken at once.",
        [
            Option("curvature", str, "hessian", "hessian, or ggn for the Gauss-Newton matrix"),
            Option("images", int, None, "use only the first so many training images (default: all)"),
            Option("data_dir", str, None, "folder with the data set's files (default: as trained)"),
            Option("batch_size", int, 256, "images a pass"),
            Option("top", int, 5, "eigenvalues to print at each end"),
            Option("steps", int, 40, "Lanczos steps, for the eigenvalues and for each sample of the density"),
            Option("samples", int, 8, "random vectors, for the trace and for the density"),
            Option(
                "at_once", int, 1, "products of the trace and the density at once, in as much more memory"
            ),
            Option("seed", int, 0, "of the random vectors"),
            Option("png", str, None, "the picture to write (default: spectrum.png beside the checkpoint)"),
            Option("json", str, None, "also write the result to this file"),
            *MACHINE_OPTIONS,
        ],
        of_run=("data_dir",),
    )
    parser.add_argument(
        "checkpoint", type=str, help="best.pt or last.pt of a run, or the run's folder for its best.pt"
    )
    options = parse(parser, argv)
    check_known("curvature", options["curvature"], CURVATURES)
    for name in ("batch_size", "top", "steps", "samples", "at_once"):
        if options[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {options[name]}")
    device = select_device(options)

    import torch
    import torch.nn.functional as F

    from blokern import plots
    from blokern.bilevel import checkpoint
    from blokern.curvature import GGNOperator, HessianOperator, hutchinson_trace, lanczos, spectral_density
    from blokern.data import Batches

    source = Source.open(options["checkpoint"])
    png = Path(options["png"] or source.path.with_name("spectrum.png"))
    picture = PICTURE if options["png"] else ANY_PICTURE
    check_files([("png", png, picture), ("json", options["json"], JSON)], sources=[source.path])
    train = _trained_on(source, options["data_dir"], options["images"])
    model = checkpoint.load_model(source.payload, source.path).to(device).eval()
    shown = sys.stderr.isatty()
    kind = {"hessian": HessianOperator, "ggn": GGNOperator}[options["curvature"]]
    operator = kind(model, F.cross_entropy, Batches(train, options["batch_size"]), progress=shown)
    estimate = {
        "at_once": options["at_once"],
        "generator": torch.Generator().manual_seed(options["seed"]),
        "progress": shown,
    }
    ritz = lanczos(operator, options["steps"], generator=estimate["generator"], progress=shown)
    trace = hutchinson_trace(operator, options["samples"], **estimate)
    density = spectral_density(operator, options["steps"], options["samples"], **estimate)
    # Of fewer values than twice `top` each belongs to one end.
    top, found = options["top"], len(ritz.values)
    high, low = min(top, (found + 1) // 2), min(top, found // 2)
    if high < top:
        say(f"{found} Lanczos steps have {found} values: --steps {2 * top} or more give {top} at each end")
    result = {
        "curvature": options["curvature"],
        "images": len(train),
        "parameters": operator.shape[0],
        "largest": _pairs(ritz.values[-high:].flip(0), ritz.residuals[-high:].flip(0)),
        "smallest": _pairs(ritz.values[:low], ritz.residuals[:low]),
        "trace": asdict(trace),
    }
    error = (
        f" ± {trace.standard_error:.2g}" if options["samples"] > 1 else ", of one sample: no error is known"
    )
    title = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}[options["curvature"]]
    print(
        f"{source}: {title} of the loss over {len(train):,} training images of {train.name}, "
        f"{operator.shape[0]:,} parameters\n"
        f"largest eigenvalues:  {_words(result['largest'])}\n"
        f"smallest eigenvalues: {_words(result['smallest']) or 'none of their own'}\n"
        f"trace: {trace.value:.4g}{error}"
    )
    plots.spectrum(density, operator.shape[0], title, png)
    print(f"density: {png}")
    if options["json"] is not None:
        masses = {"values": density.values.tolist(), "weights": density.weights.tolist()}
        about = {"checkpoint": str(source.path), "epoch": source.epoch}
        write_json(options["json"], {**about, **result, "density": masses})
    return 0


def _trained_on(source: Source, data_dir: str | None, images: int | None) -> ImageDataset:
    """The training images of the checkpoint's run, or the first of them."""
    train = source.splits(data_dir).train
    if images is None:
        return train
    if not 1 <= images <= len(train):
        raise ValueError(
            f"images must be in [1, {len(train)}], the training images of {source.path}, got {images}"
        )
    return train.subset(range(images))


def _pairs(values: Tensor, residuals: Tensor) -> list[dict[str, float]]:
    return [
        {"value": value, "error": error}
        for value, error in zip(values.tolist(), residuals.tolist(), strict=True)
    ]


def _words(pairs: list[dict[str, float]]) -> str:
    return ", ".join(f"{pair['value']:.4g} ± {pair['error']:.1g}" for pair in pairs)
