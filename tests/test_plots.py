import pytest
import torch

from blokern import plots
from blokern.curvature import SpectralDensity

RECORDS = [
    {"epoch": epoch, "loss": 1 / epoch, "val_accuracy": 0.5, "val_robust_accuracy": 0.3}
    for epoch in (1, 2, 3)
]


def assert_png(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def draw_examples(path, shape=(3, 1, 8, 8), **changes):
    x = torch.rand(shape)
    y = torch.arange(shape[0])
    arguments = {"clean": x, "adversarial": 1 - x, "labels": y, "clean_predictions": y}
    plots.examples(**{**arguments, "adversarial_predictions": y + 1, "path": path, **changes})


@pytest.mark.parametrize("runs", [{"one": RECORDS}, {"one": RECORDS, "two": RECORDS[:1]}])
def test_curves(tmp_path, runs):
    plots.curves(runs, tmp_path / "curves.png")
    assert_png(tmp_path / "curves.png")


@pytest.mark.parametrize("shape", [(8, 1, 8, 8), (1, 3, 16, 12)])
def test_examples(tmp_path, shape):
    draw_examples(tmp_path / "examples.png", shape)
    assert_png(tmp_path / "examples.png")


def test_examples_without_any_change(tmp_path):
    x = torch.rand(2, 1, 8, 8)
    draw_examples(tmp_path / "examples.png", (2, 1, 8, 8), clean=x, adversarial=x)
    assert_png(tmp_path / "examples.png")


def test_comparison(tmp_path):
    results = {"fast-at": {"SA": [0.8], "RA": [0.4]}, "fast-bat": {"SA": [0.8, 0.9], "RA": [0.45, 0.5]}}
    plots.comparison(results, tmp_path / "comparison.png")
    assert_png(tmp_path / "comparison.png")


@pytest.mark.parametrize("values", [[-0.5, 0.0, 0.1, 20.0], [0.0], [3.0, 3.0]])
def test_spectrum(tmp_path, values):
    masses = torch.full((len(values),), 1 / len(values), dtype=torch.float64)
    density = SpectralDensity(torch.tensor(values, dtype=torch.float64), masses)
    plots.spectrum(density, 1000, "Hessian", tmp_path / "spectrum.png")
    assert_png(tmp_path / "spectrum.png")


ACCURACIES = {"omp": {0.1: [0.9, 0.92], 0.02: [0.8, 0.85]}, "bip": {0.1: [0.95], 0.02: [0.9]}}


def test_sparsity(tmp_path):
    plots.sparsity(ACCURACIES, [0.95, 0.96], tmp_path / "sparsity.png")
    assert_png(tmp_path / "sparsity.png")


def test_minutes(tmp_path):
    times = {label: {density: [2.0, 3.0] for density in points} for label, points in ACCURACIES.items()}
    plots.minutes(ACCURACIES, times, [0.95], tmp_path / "minutes.png")
    assert_png(tmp_path / "minutes.png")


def test_layers_even_without_weights(tmp_path):
    kept = {"omp": {"stem.weight": 0.9, "head.weight": 0.0}, "bip": {"stem.weight": 1.0, "head.weight": 0.01}}
    plots.layers({0.1: kept, 0.02: kept}, tmp_path / "layers.png")
    assert_png(tmp_path / "layers.png")


def test_wrong_calls_name_the_argument(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="runs must hold at least one run"):
        plots.curves({}, path)
    with pytest.raises(ValueError, match="runs must hold at least one run with records"):
        plots.curves({"a": []}, path)
    with pytest.raises(ValueError, match=r"clean must be .* with C of 1 or 3, got \[3, 2, 8, 8\]"):
        draw_examples(path, (3, 2, 8, 8))
    with pytest.raises(ValueError, match=r"adversarial must be \[3, 1, 8, 8\]"):
        draw_examples(path, adversarial=torch.rand(3, 1, 8, 9))
    with pytest.raises(ValueError, match="results must hold at least one method"):
        plots.comparison({}, path)
    for accuracies in ({}, {"omp": {}}):
        with pytest.raises(ValueError, match="accuracies must hold at least one method with a density"):
            plots.sparsity(accuracies, [0.9], path)
        with pytest.raises(ValueError, match="accuracies must hold at least one method with a density"):
            plots.minutes(accuracies, accuracies, [0.9], path)
    for kept in ({}, {0.1: {}}):
        with pytest.raises(ValueError, match="kept must hold at least one density with a method"):
            plots.layers(kept, path)
    assert not path.exists()
