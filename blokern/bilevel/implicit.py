"""BiP's implicit gradient with the lower level's Hessian, which the method itself takes for zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

from blokern.bilevel.loss import LossModule, ModelLoss
from blokern.curvature import HessianOperator, Operator, Solution
from blokern.sparse import MaskedConv2d, MaskedLinear

__all__ = ["MaskedLayer", "ModelLoss", "Solver", "dense_grad", "implicit_gradient"]

MaskedLayer: TypeAlias = MaskedConv2d | MaskedLinear
#: (A, b) → x with A x = b, such as cg_solve.
Solver: TypeAlias = Callable[[Operator, Mapping[str, Tensor]], Solution]


def implicit_gradient(
    model: nn.Module,
    loss_fn: ModelLoss,
    batch: tuple[Any, Any],
    grads: Mapping[str, Tensor],
    *,
    theta: Mapping[str, Tensor] | None = None,
    gamma: float,
    solve: Solver,
    average_: Callable[[Iterable[Tensor]], None] = lambda tensors: None,
) -> tuple[dict[str, Tensor], Tensor]:
    """θ ⊙ (g − H q) − g ⊙ q with q = (M H M + γ I)⁻¹ (m ⊙ g), and the system's relative residual, a scalar.

    grads: g by the names of masked weights, dense; theta: θ by these names, None for zeros where m is 0; H is ∇²_w ℓ of
    the batch, by the model as it is: what a pass changes in it is put back. The solver's products with H and one more.
    average_: of each product over the processes that have a part of the batch, in place. ValueError for a name that is
    no masked layer's weight, or a gamma that is not positive and finite, and as the solver raises.

    Zhang et al., "Advancing Model Pruning via Bi-level Optimization", NeurIPS 2022, before H is taken for zero.

    >>> along, residual = implicit_gradient(model, cross_entropy, (x, y), grads, gamma=1.0, solve=cg_solve)
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    layers: dict[str, MaskedLayer] = {name: _layer(model, name) for name in grads}
    names, data = [*map(_inner, grads)], [(batch, batch[1])]
    b = {_inner(name): grad * layers[name].mask.to_dense() for name, grad in grads.items()}
    # Of vectors within the masks, M H M is the Hessian that the masked weights have themselves, of sparse products.
    system = HessianOperator(
        _OfBatch(model, loss_fn), _first, data, parameters=names, damping=gamma, keep=True
    )
    solution = solve(_Averaged(system, average_), b)
    del system  # with what it keeps of the forward pass
    with dense_grad(layers.values()):
        hessian = HessianOperator(_OfBatch(model, loss_fn), _first, data, parameters=names)
        product = _Averaged(hessian, average_) @ solution.x
    along = {}
    for name, g in grads.items():
        q, h_q = solution.x[_inner(name)], product[_inner(name)]
        weight = layers[name].stored_weight.detach() if theta is None else theta[name]
        along[name] = weight * (g - h_q) - g * q
    return along, solution.residual


@contextmanager
def dense_grad(layers: Iterable[MaskedLayer]) -> Iterator[None]:
    """Inside, derivatives of the layers are those by m ⊙ θ; outside, what they were.

    >>> with dense_grad(layers):
    ...     grads = torch.autograd.grad(loss(), [layer.weight for layer in layers])
    """
    before = [(layer, layer.dense_grad) for layer in layers]
    try:
        for layer, _ in before:
            layer.dense_grad = True
        yield
    finally:
        for layer, dense in before:
            layer.dense_grad = dense


class _Averaged:
    """An operator whose products are averaged over the processes."""

    def __init__(self, operator: HessianOperator, average_: Callable[[Iterable[Tensor]], None]) -> None:
        self._operator, self._average_ = operator, average_

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self._operator.parameters

    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        product = self._operator @ v
        self._average_(product.values())
        return product


class _OfBatch(LossModule):
    """Of a batch as one argument, which curvature's operators hand over."""

    def forward(self, batch: tuple[Any, Any]) -> Tensor:  # type: ignore[override]
        return super().forward(*batch)


def _inner(name: str) -> str:
    """A parameter's name in `_OfBatch`."""
    return f"model.{name}"


def _first(loss: Tensor, y: Tensor) -> Tensor:
    return loss


def _layer(model: nn.Module, name: str) -> MaskedLayer:
    path, _, leaf = name.rpartition(".")
    layer = dict(model.named_modules()).get(path)
    if leaf != "weight" or not isinstance(layer, MaskedConv2d | MaskedLinear):
        got = "no such module" if layer is None else type(layer).__name__
        raise ValueError(f"grads: {name!r} must be the weight of a masked layer, got {got}")
    return layer
