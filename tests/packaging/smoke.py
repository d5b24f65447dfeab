"""The installed package, in a folder that has nothing of this tree: `python smoke.py` says what it found, or fails."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import blokern
from blokern import attack, curvature, models, ops, sparse
from blokern._backend import build_info


def attack_step() -> None:
    x, grad = torch.rand(5, 3, 7, 7, dtype=torch.float64), torch.randn(5, 3, 7, 7, dtype=torch.float64)
    step = ops.pgd_step(x, x, grad, step_size=0.1, eps=0.05, norm="linf")
    assert torch.equal(step, (x + 0.1 * grad.sign()).clamp(x - 0.05, x + 0.05).clamp(0, 1))


def masked_layer() -> None:
    weight, x = torch.randn(33, 65), torch.randn(9, 65)
    mask = ops.topk_mask([weight.abs()], density=0.1)[0]
    found = ops.masked_linear(x, weight, sparse.SparseMask(mask))
    torch.testing.assert_close(found, x @ (weight * mask).T)


def products_of_the_hessian() -> None:
    model, (x, y) = models.build("small_cnn", in_channels=1, num_classes=10).eval(), images()
    named, loss_fn = dict(model.named_parameters()), torch.nn.functional.cross_entropy
    v = {name: torch.randn_like(parameter) for name, parameter in named.items()}
    grads = torch.autograd.grad(loss_fn(model(x), y), [*named.values()], create_graph=True)
    expected = torch.autograd.grad(grads, [*named.values()], [*v.values()])
    found = curvature.hvp(model, loss_fn, x, y, v)
    for name, theirs in zip(named, expected, strict=True):
        torch.testing.assert_close(found[name], theirs, rtol=1e-3, atol=1e-4)


def attack_on_a_network() -> None:
    model, (x, y) = models.build("small_cnn", in_channels=1, num_classes=10).eval(), images()
    moved = attack.PGD(model, eps=0.1, steps=3)(x, y) - x
    assert 0 < moved.abs().max() <= 0.1 + 1e-6


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(4, 1, 8, 8), torch.arange(4)


def command_line() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = [
            sys.executable,
            "-m",
            "blokern",
            "train",
            "fast-bat",
            "--data",
            "digits",
            "--model",
            "small_cnn",
        ]
        subprocess.run(
            [*run, "--eps", "0.1", "--epochs", "1", "--out", f"{folder}/run"], check=True, capture_output=True
        )
        assert Path(folder, "run", "best.pt").exists()


def main() -> None:
    torch.manual_seed(0)
    for check in (attack_step, masked_layer, products_of_the_hessian, attack_on_a_network, command_line):
        check()
    facts = {"blokern": blokern.__version__, "python": platform.python_version(), "torch": torch.__version__}
    print(json.dumps(facts | {"kernels": str(build_info())}))


if __name__ == "__main__":
    main()
