"""The scripts in examples/ run, shortened, and come to what they are there to show."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from blokern.curvature import HessianOperator

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, **shorter):
    """What an example's main returns."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**shorter)


def test_every_example_is_run_here():
    tested = {"pgd_training", "fast_bat", "bip_inference", "hessian_eigenvalues"}
    tested |= {"adversarial_training", "pruning", "lightning_fast_bat"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("name", ["pgd_training", "fast_bat"])
def test_training_makes_the_network_robust(capsys, name):
    result = run(name, epochs=4)
    printed = capsys.readouterr().out
    assert printed.count("epoch ") == 4
    assert f"RA {result.robust_accuracy:.1%} under PGD-20" in printed
    assert 0.3 < result.robust_accuracy < result.clean_accuracy
    assert result.clean_accuracy > 0.6


def test_the_step_is_that_of_the_lines_it_replaces():
    example = runpy.run_path(str(EXAMPLES / "pgd_training.py"))
    eps, step = example["EPS"], example["STEP"]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    x, y = torch.rand(5, 1, 8, 8), torch.arange(5)
    torch.manual_seed(1)
    ours = example["attacked"](model, x, y)
    torch.manual_seed(1)
    x_adv = example["ops"].random_start(x, eps)
    for _ in range(example["STEPS"]):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = x_adv.detach() + step * grad.sign()
        x_adv = torch.clamp(torch.min(torch.max(x_adv, x - eps), x + eps), 0, 1)
    torch.testing.assert_close(ours, x_adv)


def test_a_pruned_network_is_still_right(capsys):
    before, after = run("bip_inference", epochs=3, width=16)
    assert before > 0.85
    assert after > before - 0.05
    assert " times faster" in capsys.readouterr().out


def test_the_eigenvalue_is_one(capsys):
    model, loader, values = run("hessian_eigenvalues", epochs=2, images=128, steps=20)
    assert torch.equal(values, values.sort(descending=True).values)
    hessian = HessianOperator(model, F.cross_entropy, loader)
    v = {
        name: torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        for name, p in model.named_parameters()
    }
    for _ in range(30):  # power iteration: the largest in size, which the top one is here
        norm = torch.sqrt(sum(part.square().sum() for part in v.values()))
        v = hessian @ {name: part / norm for name, part in v.items()}
    norm = torch.sqrt(sum(part.square().sum() for part in v.values()))
    torch.testing.assert_close(values[0].float(), norm, rtol=0.02, atol=0.0)
    assert capsys.readouterr().out.count("training: ") == 1


def test_every_rule_trains(capsys):
    results = run("adversarial_training", epochs=2, width=8)
    assert len(capsys.readouterr().out.splitlines()) == len(results) == 6
    for name, result in results.items():
        assert 0.02 < result.robust_accuracy < result.clean_accuracy, name


def test_every_method_prunes(capsys):
    results = run("pruning", epochs=2, width=8)
    assert len(capsys.readouterr().out.splitlines()) == len(results) == 7
    assert all(accuracy > 0.3 for accuracy in results.values()), results
    assert results["SNIP"] > 0.8


def test_lightning_trains(tmp_path):
    pytest.importorskip("lightning")
    quietly = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    metrics = run("lightning_fast_bat", epochs=3, **quietly)
    assert 0.3 < metrics["val_robust_accuracy"] < metrics["val_accuracy"]
