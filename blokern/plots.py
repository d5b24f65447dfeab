"""Pictures of a run: its curves, adversarial examples and curvature, and the comparison of methods.

Figures are made without pyplot, so there is no window and no state shared with the caller's own plots.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from matplotlib.figure import Figure
from torch import Tensor

from blokern.bilevel.checkpoint import write_atomically
from blokern.curvature import SpectralDensity

__all__ = ["comparison", "curves", "epoch_axis", "examples", "layers", "minutes", "sparsity", "spectrum"]

#: By label of the method, by density, a value for each seed.
Points: TypeAlias = Mapping[str, Mapping[float, Sequence[float]]]

_PANELS = (
    ("loss", "training loss"),
    ("val_accuracy", "standard accuracy, validation (%)"),
    ("val_robust_accuracy", "robust accuracy, validation (%)"),
)


def curves(runs: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path) -> None:
    """Draw loss, standard and, where all have it, robust accuracy over the epochs, a line for each run of ``runs``.

    Args:
        runs: by name, the records that :meth:`blokern.bilevel.Trainer.fit` returns.
        path: the PNG to write.

    Raises:
        ValueError: no run, or one without records.
        OSError: the file cannot be written.

    >>> curves({"fast-bat": trainer.fit()}, "curves.png")
    """
    if not runs or not all(runs.values()):
        raise ValueError(f"runs must hold at least one run with records, got {dict(runs)}")
    panels = [panel for panel in _PANELS if all(panel[0] in records[0] for records in runs.values())]
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        scale = 100 if title.endswith("(%)") else 1
        for name, records in runs.items():
            epochs = [record["epoch"] for record in records]
            # Dots as well: a run of one epoch has no line.
            axes.plot(epochs, [scale * record[key] for record in records], ".-", label=name)
        axes.set(title=title)
        epoch_axis(axes, len(max(runs.values(), key=len)))
        axes.grid(alpha=0.3)
    if len(runs) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(runs), 6))
    _write(figure, path)


def examples(
    clean: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    clean_predictions: Tensor,
    adversarial_predictions: Tensor,
    path: str | Path,
) -> None:
    """Draw images, their adversarial versions and the amplified difference, with labels and predictions.

    Args:
        clean, adversarial: [N, C, H, W] in [0, 1], C of 1 or 3.
        labels, clean_predictions, adversarial_predictions: [N] class numbers.
        path: the PNG to write.

    Raises:
        ValueError: shapes that do not go together.
        OSError: the file cannot be written.

    >>> examples(x, x_adv, y, model(x).argmax(1), model(x_adv).argmax(1), "examples.png")
    """
    if clean.ndim != 4 or clean.shape[0] < 1 or clean.shape[1] not in (1, 3):
        raise ValueError(f"clean must be [N, C, H, W] with C of 1 or 3, got {list(clean.shape)}")
    if adversarial.shape != clean.shape:
        raise ValueError(f"adversarial must be {list(clean.shape)} like clean, got {list(adversarial.shape)}")
    clean, adversarial = clean.detach().cpu().float(), adversarial.detach().cpu().float()
    difference = adversarial - clean
    # Grey is no change; the largest change of any image becomes black or white.
    size = float(difference.abs().max())
    amplified = 0.5 + difference * (0.5 / size if size > 0 else 0.0)

    figure = Figure(figsize=(1.5 * len(clean) + 0.5, 5.2), layout="constrained")
    rows = figure.subplots(3, len(clean), squeeze=False)
    rows[0][0].set_ylabel("clean")
    rows[1][0].set_ylabel("adversarial")
    rows[2][0].set_ylabel(f"difference\n(largest: {size:.3g})")
    for column in range(len(clean)):
        label = int(labels[column])
        for row, image in zip(rows, (clean, adversarial, amplified), strict=True):
            _show(row[column], image[column])
        for row, predictions in zip(rows, (clean_predictions, adversarial_predictions), strict=False):
            prediction = int(predictions[column])
            color = "green" if prediction == label else "red"
            row[column].set_title(f"{label} → {prediction}", fontsize=9, color=color)
    figure.suptitle("label → prediction", fontsize=10)
    _write(figure, path)


def comparison(results: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path) -> None:
    """Draw mean accuracies of several methods as bars, with a mark for each seed.

    Args:
        results: by label of the method, by name of the accuracy, one value in [0, 1] a seed.
        path: the PNG to write.

    Raises:
        ValueError: no result.
        OSError: the file cannot be written.

    >>> comparison({"fast-at": {"SA": [0.80, 0.82], "RA": [0.45, 0.47]}}, "comparison.png")
    """
    if not results:
        raise ValueError("results must hold at least one method, got none")
    names = list(next(iter(results.values())))
    figure = Figure(figsize=(2 + 1.2 * len(results), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        for position, values in enumerate(results.values()):
            percent = [100 * value for value in values[name]]
            place = position + (number - (len(names) - 1) / 2) * width
            label = name if position == 0 else None
            axes.bar(place, sum(percent) / len(percent), width, color=f"C{number}", alpha=0.7, label=label)
            axes.plot([place] * len(percent), percent, "k_")
    axes.set_xticks(range(len(results)), list(results), rotation=20)
    axes.set(ylabel="accuracy (%)", ylim=(0, 100))
    axes.legend(ncols=len(names))
    axes.grid(alpha=0.3, axis="y")
    _write(figure, path)


def sparsity(accuracies: Points, dense: Sequence[float], path: str | Path) -> None:
    """Draw accuracy against the part of the weights that is pruned, a line for each method, with deviations.

    Args:
        accuracies: in [0, 1]; the seeds' mean and standard deviation are drawn.
        dense: those of the dense networks.
        path: the PNG to write.

    Raises:
        ValueError: no result.
        OSError: the file cannot be written.

    >>> sparsity({"omp": {0.1: [0.90, 0.92], 0.05: [0.85, 0.86]}}, [0.95, 0.96], "sparsity.png")
    """
    figure, axes = _accuracy_axes(accuracies, dense)
    for label, points in accuracies.items():
        means, deviations = _percent([*points.values()])
        axes.errorbar([*points], means, deviations, fmt=".-", capsize=3, label=label)
    densities = sorted({density for points in accuracies.values() for density in points})
    axes.set_xscale("log")  # from 90 to 95 % is as far as from 80 to 90 %
    axes.set_xticks(densities, [f"{100 - 100 * density:.4g}" for density in densities], minor=False)
    axes.set_xticks([], minor=True)
    axes.set(xlabel="weights pruned (%)")
    axes.invert_xaxis()
    axes.legend()
    _write(figure, path)


def minutes(accuracies: Points, minutes: Points, dense: Sequence[float], path: str | Path) -> None:
    """Draw accuracy against the minutes of pruning and training, a mark for each density, larger where more is kept.

    Args and Raises as :func:`sparsity`; minutes has the keys of accuracies.

    >>> minutes({"omp": {0.1: [0.90]}}, {"omp": {0.1: [2.5]}}, [0.95], "minutes.png")
    """
    figure, axes = _accuracy_axes(accuracies, dense)
    for number, (label, points) in enumerate(accuracies.items()):
        means, deviations = _percent([*points.values()])
        times = [statistics.fmean(minutes[label][density]) for density in points]
        axes.errorbar(times, means, deviations, fmt="-", alpha=0.4, capsize=3, color=f"C{number}")
        axes.scatter(
            times, means, [20 + 200 * density for density in points], color=f"C{number}", label=label
        )
    for density in sorted({density for points in accuracies.values() for density in points}, reverse=True):
        axes.scatter([], [], 20 + 200 * density, color="gray", label=f"{100 * density:.4g} % kept")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel="minutes of pruning and training")
    axes.legend()
    _write(figure, path)


def layers(kept: Mapping[float, Mapping[str, Mapping[str, float]]], path: str | Path) -> None:
    """Draw the part of each layer's weights that is kept, a panel for each density.

    Args:
        kept: by density, by label of the method, by layer, in [0, 1].
        path: the PNG to write.

    Raises:
        ValueError: no result.
        OSError: the file cannot be written.

    >>> layers({0.1: {"omp": {"stem.weight": 0.9, "head.weight": 0.05}}}, "layers.png")
    """
    if not kept or not all(kept.values()):
        raise ValueError(f"kept must hold at least one density with a method, got {dict(kept)}")
    names = list(next(iter(next(iter(kept.values())).values())))
    figure = Figure(figsize=(2 + len(kept) * max(3.0, 0.25 * len(names)), 4), layout="constrained")
    panels = figure.subplots(1, len(kept), sharey=True, squeeze=False)[0]
    for axes, (density, methods) in zip(panels, kept.items(), strict=True):
        for label, parts in methods.items():
            axes.plot(range(len(names)), [100 * parts[name] for name in names], ".-", label=label)
        axes.set_yscale("symlog", linthresh=0.1)  # a layer may have lost everything
        axes.set(title=f"{100 * density:.4g} % kept", ylim=(0, 110))
        axes.set_xticks(range(len(names)), [name.removesuffix(".weight") for name in names], rotation=90)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("weights kept in the layer (%)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=8)
    _write(figure, path)


def spectrum(density: SpectralDensity, size: int, title: str, path: str | Path) -> None:
    """Draw how the eigenvalues of a matrix are distributed, on a logarithmic scale down to a part of one eigenvalue.

    Args:
        density: the distribution.
        size: the matrix's rows.
        title: the matrix's name.
        path: the PNG to write.

    Raises:
        OSError: the file cannot be written.

    >>> hessian = HessianOperator(model, F.cross_entropy, loader)
    >>> spectrum(spectral_density(hessian), hessian.shape[0], "Hessian", "spectrum.png")
    """
    least, most = density.values.min().item(), density.values.max().item()
    reach = (most - least) or abs(most) or 1.0
    width = reach / 200
    points = torch.linspace(least - 0.05 * reach, most + 0.05 * reach, 1000, dtype=torch.float64)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    height = density(points, width)
    one = 1 / (size * width * math.sqrt(2 * math.pi))  # a single eigenvalue's peak
    axes.fill_between(points, height, alpha=0.3)
    axes.plot(points, height)
    axes.set_yscale("log")
    axes.set(title=title, xlabel="eigenvalue", ylabel="density", ylim=(one / 10, 2 * float(height.max())))
    axes.grid(alpha=0.3)
    figure.set_label("spectrum")  # told in the file, by which a later one knows that it may replace it
    _write(figure, path)


def epoch_axis(axes: Any, epochs: int) -> None:
    """Ticks at whole epochs, of a run of one epoch at that one.

    >>> epoch_axis(axes, 20)
    """
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if epochs == 1:
        axes.set_xticks([1])


def _accuracy_axes(accuracies: Points, dense: Sequence[float]) -> tuple[Figure, Any]:
    if not accuracies or not all(accuracies.values()):
        raise ValueError(f"accuracies must hold at least one method with a density, got {dict(accuracies)}")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100 * statistics.fmean(dense), color="black", linestyle="--", label="dense")
    axes.set(ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    return figure, axes


def _percent(groups: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Means and standard deviations, in percent."""
    deviations = [statistics.stdev(group) if len(group) > 1 else 0.0 for group in groups]
    return [100 * statistics.fmean(group) for group in groups], [100 * deviation for deviation in deviations]


def _show(axes: Any, image: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def _write(figure: Figure, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="png", dpi=110, metadata={"Software": f"blokern {figure.get_label()}".strip()}
    )
    write_atomically(path, buffer.getvalue())
