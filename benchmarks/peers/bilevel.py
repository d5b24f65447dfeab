"""The gradient of pruning's upper level by its scores m, through the lower level's solution: blokern, Betty, TorchOpt.

Lower level: ℓ(m ⊙ θ) + γ/2 ‖θ‖² over θ; upper level: ℓ(m ⊙ θ), of the same batch. At a θ that is taken for the solution
the gradient is θ ⊙ (g − H q) − g ⊙ q with (M H M + γ I) q = m ⊙ g, which all solve by the same number of conjugate
gradient steps, the forward pass for g within. m is zero or one: blokern's layers are masked, the peers' weights are
multiplied.

Betty's recurrence makes its next direction of the residual before the step instead of the one after it, so that it
solves another system than the one asked for; on the small network that is lost in γ, on the large one it is a result
0.92 off (blokern and TorchOpt agree to 1e-15 there in float64), and Betty is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torchopt
from betty.hypergradient.cg import cg as betty_cg
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torchopt.diff.implicit import custom_root

from benchmarks.networks import images, network
from benchmarks.peers.contest import Contest, Run, close, flat
from blokern.bilevel import OMP, OMPSettings
from blokern.bilevel.implicit import dense_grad, implicit_gradient
from blokern.bilevel.masking import prunable
from blokern.curvature import cg_solve
from blokern.sparse import samples_innermost, sparsify

GAMMA = 100.0  # above the most negative eigenvalue, so that all systems are definite
STEPS = 5
DENSITY = 0.1


def cases() -> Iterator[Contest]:
    yield _implicit("small_cnn", 128, betty=True)
    yield _implicit("preact_resnet18", 32, betty=False)


def _implicit(name: str, batch: int, betty: bool) -> Contest:
    x, y = images(batch)
    dense = network(name, x)[0].eval()
    masks = OMP(OMPSettings(density=DENSITY)).masks(dense, [])
    names = [*masks]
    theta = {key: weight.detach().clone() for key, weight in prunable(dense).items()}
    m = {key: masks[key].to_dense().to(x.dtype) for key in names}

    def loss(m: dict[str, Tensor], theta: dict[str, Tensor]) -> Tensor:
        masked = {key: m[key] * theta[key] for key in names}
        return F.cross_entropy(functional_call(dense, masked, (x,)), y)

    def lower(m: dict[str, Tensor], theta: dict[str, Tensor]) -> Tensor:
        return loss(m, theta) + 0.5 * GAMMA * torch.stack([t.square().sum() for t in theta.values()]).sum()

    rivals: dict[str, Run] = {
        "blokern": _ours(name, x, y, masks),
        "TorchOpt": lambda: _torchopt(loss, lower, m, theta),
    }
    if betty:
        rivals["Betty"] = lambda: _betty(loss, lower, m, theta)
    return Contest(
        f"{name}, batch {batch}, {1 - DENSITY:.0%} sparse: implicit gradient, {STEPS} steps of CG",
        rivals,
        "blokern",
        close("blokern", 2e-3),
        rounds=5,
    )


def _ours(name: str, x: Tensor, y: Tensor, masks: Any) -> Run:
    model = sparsify(network(name, x)[0].eval(), masks)
    samples_innermost(model)
    weights = {key: model.get_parameter(key) for key in masks}

    def model_loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return F.cross_entropy(logits, y), logits

    def run() -> Tensor:
        layers: list[Any] = [model.get_submodule(key.rpartition(".")[0]) for key in masks]
        with dense_grad(layers):
            found = torch.autograd.grad(model_loss(model, x, y)[0], [*weights.values()])
        grads = dict(zip(masks, found, strict=True))

        def solve(operator: Any, b: Any) -> Any:
            return cg_solve(operator, b, tol=0.0, max_steps=STEPS)

        along, _ = implicit_gradient(model, model_loss, (x, y), grads, gamma=GAMMA, solve=solve)
        return flat(along)

    return run


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t.detach().clone().requires_grad_() for key, t in tensors.items()}


def _betty(loss: Any, lower: Any, m: dict[str, Tensor], theta: dict[str, Tensor]) -> Tensor:
    m, theta = _leaves(m), _leaves(theta)
    direct = torch.autograd.grad(loss(m, theta), [*m.values(), *theta.values()])
    by_m, vector = direct[: len(m)], direct[len(m) :]
    above = SimpleNamespace(trainable_parameters=lambda: [*m.values()])
    below = SimpleNamespace(
        config=SimpleNamespace(cg_iterations=STEPS, cg_alpha=1.0),
        paths=[],
        cur_batch=None,
        training_step_exec=lambda batch: lower(m, theta),
        parameters=lambda: [*theta.values()],
        trainable_parameters=lambda: [*theta.values()],
    )
    implicit = betty_cg(vector, below, above)
    return flat(a + b for a, b in zip(by_m, implicit, strict=True))


def _torchopt(loss: Any, lower: Any, m: dict[str, Tensor], theta: dict[str, Tensor]) -> Tensor:
    m = _leaves(m)
    names = [*m]

    def optimality(theta: tuple[Tensor, ...], scores: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        def objective(theta: tuple[Tensor, ...]) -> Tensor:
            return lower(dict(zip(names, scores, strict=True)), dict(zip(names, theta, strict=True)))

        gradient: tuple[Tensor, ...] = torch.func.grad(objective)(theta)
        return gradient

    @custom_root(
        optimality, argnums=1, solve=torchopt.linear_solve.solve_cg(maxiter=STEPS, rtol=0.0, atol=0.0)
    )
    def solution(start: tuple[Tensor, ...], scores: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return start

    solved = solution(tuple(t.detach().clone() for t in theta.values()), tuple(m.values()))
    return flat(torch.autograd.grad(loss(m, dict(zip(names, solved, strict=True))), [*m.values()]))
