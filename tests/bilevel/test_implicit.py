"""BiP's exact implicit gradient against a Hessian formed entry by entry."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from blokern.bilevel import BiP, BiPSettings
from blokern.bilevel.bip import cross_entropy
from blokern.bilevel.implicit import dense_grad, implicit_gradient
from blokern.curvature import cg_solve, neumann_solve
from blokern.sparse import masks_of, samples_innermost, sparsify

GAMMA = 5.0
SOLVERS = {
    "cg": partial(cg_solve, tol=1e-13),
    "neumann": partial(neumann_solve, scale=0.15, tol=1e-13, max_steps=400),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)
    return nn.Sequential(*layers).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 2, 4, 4, generator=generator, dtype=torch.float64), torch.arange(6) % 4


def random_masks(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    return {name: torch.rand(p.shape, generator=generator) < 0.4 for name, p in weights.items()}


def exact(
    model: nn.Module, masks: dict[str, Tensor], gamma: float = GAMMA
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """g, and θ ⊙ (g − H q) − g ⊙ q with the matrices themselves; of a copy of the model for every loss."""
    x, y = batch()
    theta = {name: model.get_parameter(name).detach() for name in masks}
    sizes = [t.numel() for t in theta.values()]

    def loss(w: Tensor) -> Tensor:
        parts = {n: part.view_as(theta[n]) for n, part in zip(masks, w.split(sizes), strict=True)}
        return F.cross_entropy(functional_call(deepcopy(model), parts, (x,)), y)

    m = torch.cat([mask.flatten() for mask in masks.values()]).double()
    t = torch.cat([t.flatten() for t in theta.values()])
    g = torch.autograd.functional.jacobian(loss, m * t)
    hessian = torch.autograd.functional.hessian(loss, m * t)
    q = torch.linalg.solve(m[:, None] * hessian * m + gamma * torch.eye(len(m)), m * g)
    along = t * (g - hessian @ q) - g * q

    def named(flat: Tensor) -> dict[str, Tensor]:
        return {name: part.view_as(theta[name]) for name, part in zip(masks, flat.split(sizes), strict=True)}

    return named(g), named(along)


@pytest.mark.parametrize("layout", [nn.Module.train, nn.Module.eval, samples_innermost])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_formula(solver: str, layout: Any) -> None:
    model = network()
    masks = random_masks(model)
    model.train(layout is not nn.Module.eval)
    g, want = exact(model, masks)
    theta = {name: model.get_parameter(name).detach().clone() for name in masks}
    sparse = layout(sparsify(model, masks))
    along, residual = implicit_gradient(
        sparse, cross_entropy, batch(), g, theta=theta, gamma=GAMMA, solve=SOLVERS[solver]
    )
    assert residual < 1e-12
    for name in masks:
        torch.testing.assert_close(along[name], want[name], rtol=1e-9, atol=1e-11)


def test_buffers_and_layers_stay_as_they_were() -> None:
    model = sparsify(network(), random_masks(network()))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with dense_grad([model[0], model[4]]):
        grads = torch.autograd.grad(
            cross_entropy(model, *batch())[0], [model[i].stored_weight for i in (0, 4)]
        )
    model.load_state_dict(before)
    g = dict(zip(masks_of(model), grads, strict=True))
    implicit_gradient(model, cross_entropy, batch(), g, gamma=GAMMA, solve=cg_solve)
    assert not model[0].dense_grad
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("implicit", SOLVERS)
def test_a_step_descends_along_it(implicit: Any) -> None:
    model = network()
    settings = BiPSettings(
        density=0.4, gamma=GAMMA, implicit=implicit, implicit_steps=400, implicit_scale=0.15
    )
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = BiP(model, frozen, settings)
    before = {name: t.clone() for name, t in rule.scores.items()}
    masks = {name: mask.to_dense() for name, mask in masks_of(model).items()}
    metrics = rule.step(batch(), batch()).metrics
    assert metrics["implicit_residual"] < 1e-4  # the solvers' own tolerance is 1e-5
    twin = network()
    _, along = exact(twin, masks)
    for name, score in rule.scores.items():
        torch.testing.assert_close(
            score, before[name] - settings.score_lr * along[name], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"implicit": "exact"}, "implicit must be .*'exact'"),
        ({"implicit": "cg", "mode": "released"}, 'implicit="cg" needs mode "paper" and a finite gamma'),
        ({"implicit": "cg", "gamma": float("inf")}, "finite gamma"),
        ({"implicit_steps": 0}, "implicit_steps must be"),
        ({"implicit_scale": 0.0}, "implicit_scale must be"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BiPSettings(**settings)


class Scaled(nn.Module):
    """The network with a constant buffer, and in train mode one that moves in every pass, as its inputs' mean does."""

    def __init__(self, moving: bool) -> None:
        super().__init__()
        self.net, self.moving = network(), moving
        self.register_buffer("scale", torch.tensor([1.0, 0.5, 2.0, 1.0]).double())
        self.register_buffer("mean", torch.ones(4).double())

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        if self.moving and self.training:
            with torch.no_grad():
                self.mean.mul_(0.5).add_(out.mean(0), alpha=0.5)
        return out * self.scale - self.mean * out.square()


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_networks_with_buffers(solver: str, moving: bool) -> None:
    solve = {"cg": SOLVERS["cg"], "neumann": partial(neumann_solve, scale=0.015, tol=1e-12, max_steps=900)}[
        solver
    ]
    model, masks = Scaled(moving), random_masks(Scaled(moving))
    g, want = exact(model, masks, gamma=50.0)
    theta = {name: model.get_parameter(name).detach().clone() for name in masks}
    sparse = sparsify(model, masks)
    before = {name: t.clone() for name, t in sparse.state_dict().items()}
    along, residual = implicit_gradient(
        sparse, cross_entropy, batch(), g, theta=theta, gamma=50.0, solve=solve
    )
    assert residual < 1e-11
    for name in masks:
        torch.testing.assert_close(along[name], want[name], rtol=1e-8, atol=1e-10)
    assert all(torch.equal(t, before[name]) for name, t in sparse.state_dict().items())


@pytest.mark.parametrize("implicit", ["bilinear", *SOLVERS])
@pytest.mark.parametrize("moving", [False, True])
def test_steps_of_networks_with_buffers(implicit: Any, moving: bool) -> None:
    model = Scaled(moving)
    settings = BiPSettings(density=0.4, gamma=50.0, implicit=implicit, implicit_scale=0.01)
    rule = BiP(model, torch.optim.SGD(model.parameters(), lr=0.01), settings)
    for _ in range(2):
        assert rule.step(batch(), batch()).loss.isfinite()


def test_wrong_gradients_are_named() -> None:
    model = sparsify(network(), random_masks(network()))
    g = {name: torch.zeros_like(model.get_parameter(name)) for name in masks_of(model)}
    call = partial(implicit_gradient, model, cross_entropy, batch(), solve=cg_solve)
    for gamma in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="gamma must be positive and finite"):
            call(g, gamma=gamma)
    for name, got in (
        ("9.weight", "no such module"),
        ("1.weight", "BatchNorm2d"),
        ("4.bias", "MaskedLinear"),
    ):
        with pytest.raises(
            ValueError, match=f"grads: '{name}' must be the weight of a masked layer, got {got}"
        ):
            call({name: torch.zeros(3)}, gamma=1.0)
    with pytest.raises(ValueError, match="b must be finite"):
        call({name: t + torch.nan for name, t in g.items()}, gamma=1.0)


def test_dense_gradients_end_as_they_began() -> None:
    model = sparsify(network(), random_masks(network()))
    model[4].dense_grad = True

    def fails() -> None:
        with dense_grad(iter([model[0], model[4]])):
            assert model[0].dense_grad
            with dense_grad([model[0]]):
                pass
            assert model[0].dense_grad
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert (model[0].dense_grad, model[4].dense_grad) == (False, True)
