"""Curvature products in plain autograd, at any cost, and models small enough for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blokern.curvature import Linearization, LossFn
from blokern.curvature.linearization import record
from blokern.curvature.sweeps import TapeProducts

Vector = dict[str, Tensor]


def trainable(model: nn.Module) -> Vector:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_vector(model: nn.Module, stack: int | None = None) -> Vector:
    lead = () if stack is None else (stack,)
    return {name: torch.randn((*lead, *p.shape), dtype=p.dtype) for name, p in trainable(model).items()}


def flat(v: Vector) -> Tensor:
    return torch.cat([t.flatten() for t in v.values()])


def element(v: Any, i: int) -> Any:
    return v[i] if isinstance(v, Tensor) else {name: t[i] for name, t in v.items()}


def _gradients(of: Tensor, by: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(of, by, create_graph=True, materialize_grads=True)


def hvp(model: nn.Module, loss_fn: LossFn, x: Any, y: Any, v: Vector) -> Vector:
    parameters = trainable(model)
    gradient = _gradients(loss_fn(model(x), y), [*parameters.values()])
    inner = sum((g * v[name]).sum() for name, g in zip(parameters, gradient, strict=True))
    return dict(zip(parameters, _gradients(inner, [*parameters.values()]), strict=True))


def mixed_hvp(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Any, u: Tensor) -> Vector:
    parameters, x = trainable(model), x.detach().requires_grad_()
    (gradient,) = _gradients(loss_fn(model(x), y), [x])
    return dict(zip(parameters, _gradients((gradient * u).sum(), [*parameters.values()]), strict=True))


def mixed_hvp_transpose(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Any, v: Vector) -> Tensor:
    parameters, x = trainable(model), x.detach().requires_grad_()
    gradient = _gradients(loss_fn(model(x), y), [*parameters.values()])
    inner = sum((g * v[name]).sum() for name, g in zip(parameters, gradient, strict=True))
    return _gradients(inner, [x])[0]


def ggnvp(model: nn.Module, loss_fn: LossFn, x: Any, y: Any, v: Vector) -> Vector:
    """By the Jacobian, row by row, and the Hessian of the loss by the output."""
    parameters = trainable(model)
    out = model(x)
    rows = [_gradients(o, [*parameters.values()]) for o in out.flatten()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    hessian = torch.autograd.functional.hessian(lambda o: loss_fn(o, y), out.detach())
    curved = hessian.reshape(out.numel(), -1) @ (jacobian @ flat(v))
    product = (jacobian.T @ curved).split([p.numel() for p in parameters.values()])
    return {name: t.view_as(p) for (name, p), t in zip(parameters.items(), product, strict=True)}


def on_tape(
    model: nn.Module, loss_fn: LossFn, x: Any, y: Any, *, input_gradient: bool = True
) -> Linearization:
    """`record`, which must not have fallen back."""
    at = record(model, loss_fn, x, y, input_gradient=input_gradient)
    assert isinstance(at._products, TapeProducts)
    return at


def assert_close(actual: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def check_products(
    model: nn.Module,
    loss_fn: LossFn,
    x: Tensor,
    y: Any,
    rtol: float = 1e-9,
    atol: float = 1e-11,
    twin: nn.Module | None = None,
) -> None:
    """Every product, one-off and cached, single and stacked, against the oracles, of a twin if that is given."""
    torch.manual_seed(1)
    v, u = random_vector(model), torch.randn_like(x)
    vs, us = random_vector(model, 2), torch.randn(2, *x.shape, dtype=x.dtype)

    def close(actual: Any, expected: Any) -> None:
        assert_close(actual, expected, rtol, atol)

    at_x = on_tape(model, loss_fn, x, y)
    products: dict[str, tuple[Callable[..., Any], Any, Any]] = {
        "hvp": (hvp, v, vs),
        "ggnvp": (ggnvp, v, vs),
        "mixed_hvp": (mixed_hvp, u, us),
        "mixed_hvp_transpose": (mixed_hvp_transpose, v, vs),
    }
    expected = {}
    for name, (oracle, one, stack) in products.items():
        product = partial(getattr(at_x, name), retain_graph=True)
        expected[name] = oracle(twin or model, loss_fn, x, y, one)
        close(product(one), expected[name])
        close(product(stack), _stacked([product(element(stack, i)) for i in range(2)]))
    for name in ("hvp", "ggnvp"):
        one_off = on_tape(model, loss_fn, x, y, input_gradient=False)
        close(getattr(one_off, name)(v), expected[name])


def _stacked(products: list[Any]) -> Any:
    if isinstance(products[0], Tensor):
        return torch.stack(products)
    return {name: torch.stack([product[name] for product in products]) for name in products[0]}
