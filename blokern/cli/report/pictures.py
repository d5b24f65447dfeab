"""The page's pictures: curves as SVG in the page's own colours, images and attacks on them as PNG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from blokern import data, plots
from blokern.attack import PGD, eval_mode
from blokern.bilevel import ThreatModel
from blokern.bilevel.record import Record
from blokern.cli.source import Source

__all__ = ["PANELS", "STYLES", "Attacked", "attacked", "curve_svg", "image_uri"]

#: What is drawn over the epochs; accuracies in percent.
PANELS = {
    "loss": "training loss",
    "train_accuracy": "training accuracy (%)",
    "val_accuracy": "standard accuracy, validation (%)",
    "val_robust_accuracy": "robust accuracy, validation (%)",
}
_COLORS = [
    "#3b82c4",
    "#e07b28",
    "#3aa35b",
    "#d04a4a",
    "#8f6bc9",
    "#a0705f",
    "#d566b0",
    "#7d8790",
    "#a9a52c",
    "#2aa9b8",
]
#: Colour and dashes (None: a whole line) of the first curve, the second, …; readable on light and on dark.
STYLES = [(color, dashes) for dashes in (None, (5, 2), (1.5, 1.5), (7, 2, 1.5, 2)) for color in _COLORS]
#: Stands for the page's text colour until the SVG is text.
_INK = "#010203"
_THEME: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **{
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "blokern",
    },
}


def curve_svg(key: str, runs: Mapping[str, tuple[int, Sequence[Record]]]) -> str:
    """One of PANELS as an ``<svg>`` element: for each run, by its label, the number of its style and its epochs."""
    with mpl.rc_context(_THEME):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axes: Any = figure.subplots()
        scale = 100 if PANELS[key].endswith("(%)") else 1
        for number, records in runs.values():
            color, dashes = STYLES[number % len(STYLES)]
            line = axes.plot(
                [record["epoch"] for record in records],
                [scale * record[key] for record in records],
                *(".-",),
                color=color,
            )[0]
            if dashes is not None:
                line.set_dashes(dashes)
        plots.epoch_axis(axes, max(len(records) for _, records in runs.values()))
        axes.grid(alpha=0.15, color=_INK)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = (
        re.sub(r' (?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")])
        + svg[svg.index(">") :]
    )
    # Several figures share a page, and so their ids.
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", svg)


def image_uri(image: Tensor) -> str:
    """An image [1 or 3, H, W] in [0, 1] as a data URI."""
    buffer = io.BytesIO()
    pixels = image.squeeze(0) if len(image) == 1 else image.permute(1, 2, 0)
    imsave(buffer, pixels.clamp(0, 1).numpy(), format="png", cmap="gray", vmin=0, vmax=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Attacked:
    """Test images x [N, C, H, W], adversarial ones within a threat model of them, their labels [N], and what a network
    says before and after. why: the threat model is this one."""

    x: Tensor
    x_adv: Tensor
    labels: Tensor
    before: Tensor
    after: Tensor
    threat: ThreatModel
    why: str
    attack: str

    @property
    def eps(self) -> float:
        return self.threat.eps


def attacked(path: Path, count: int, steps: int, data_dir: str | None, device: str) -> Attacked:
    """The first test images under PGD on a checkpoint's network, with the budget that it was trained for, or else
    validated with.

    Raises:
        OSError, ValueError, ImportError: the checkpoint does not say which network or data, or the data are not there.
        FloatingPointError: its weights are not finite.
    """
    source = Source.open(path)
    name = source.data["name"]
    test = data.load(name, data_dir=data_dir or source.data_dir, test_limit=count).test
    if test.images.shape[1] not in (1, 3):
        raise ValueError(f"{name} has images of {test.images.shape[1]} channels, which are no pictures")
    model = source.network().to(device)
    threat, why = source.threat, "as trained"
    if threat is None:
        threat, why = ThreatModel(eps=float(source.payload["settings"]["eps"])), "as validated"
    eps = threat.eps
    pgd = PGD(model, eps, eps / 4, steps, threat.norm, generator=torch.Generator(device).manual_seed(0))
    x, y = next(iter(data.Batches(test.to(torch.device(device)), count)))
    x_adv = pgd(x, y)
    with torch.no_grad(), eval_mode(model):
        before, after = model(x).argmax(dim=1), model(x_adv).argmax(dim=1)
    return Attacked(x.cpu(), x_adv.cpu(), y.cpu(), before.cpu(), after.cpu(), threat, why, pgd.name)
