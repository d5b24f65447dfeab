"""A loss linearised at one batch, and the products read off it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from blokern.curvature.double_backward import LeanDoubleBackward

__all__ = ["Linearization", "LossFn", "linearize", "mixed_hvp"]

#: (model output, target) -> scalar loss.
LossFn = Callable[[Tensor, Tensor], Tensor]


class Linearization:
    """A loss and its input gradient at one batch, kept so that products can be taken; see `linearize`.

    loss: scalar, detached. grad_input: ∇ₓℓ, detached, shape and dtype of x.
    """

    def __init__(self, loss: Tensor, grad_input: Tensor, parameters: dict[str, Tensor]) -> None:
        self.loss = loss.detach()
        self.grad_input = grad_input.detach()
        self._parameters = parameters
        self._graph: Tensor | None = grad_input

    def mixed_hvp(self, u: Tensor, *, retain_graph: bool = False) -> dict[str, Tensor]:
        """∇_θ⟨∇ₓℓ, u⟩, the adjoint of the mixed second derivative ∇²_{xθ}ℓ applied to u. Four sweeps.

        u: shape, dtype and device of x. Returns a dict keyed like `model.named_parameters()`, with the
        parameters that required a gradient in `linearize`; zeros where the loss does not use one. The graph
        is freed on the way unless `retain_graph` is true.

        Raises ValueError or TypeError if u's shape or dtype is not x's, and RuntimeError if an earlier
        call has freed the graph.

        >>> at_x = linearize(model, torch.nn.functional.cross_entropy, x, y)
        >>> products = at_x.mixed_hvp(torch.ones_like(x))
        """
        if u.shape != self.grad_input.shape:
            raise ValueError(
                f"u must have the shape of x, {tuple(self.grad_input.shape)}, got {tuple(u.shape)}"
            )
        if u.dtype != self.grad_input.dtype:
            raise TypeError(f"u must have the dtype of x, {self.grad_input.dtype}, got {u.dtype}")
        grad_input = self._graph
        if grad_input is None:
            raise RuntimeError(
                "mixed_hvp: an earlier call has freed the graph; that call must have retain_graph=True"
            )
        if not retain_graph:
            self._graph = None
        if not self._parameters or not grad_input.requires_grad:  # ∇ₓℓ does not depend on θ
            return {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        with torch.autocast(u.device.type, enabled=False):
            products = torch.autograd.grad(
                grad_input,
                tuple(self._parameters.values()),
                u,
                retain_graph=retain_graph,
                materialize_grads=True,
            )
        return dict(zip(self._parameters, products, strict=True))


def linearize(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor) -> Linearization:
    """ℓ = loss_fn(model(x), y) and ∇ₓℓ, ready for products. Two sweeps, no weight gradient among them.

    x: floating point, [N, ...]; y: whatever loss_fn takes; loss_fn returns a scalar. The model runs once, in
    its own mode (in train mode BatchNorm moves its running statistics) and under the caller's autocast;
    backward sweeps run outside of autocast, as torch advises. Modules under `torch.compile` run eagerly here,
    because compiled graphs refuse a second differentiation. Do not change the parameters in place before the
    last product.

    Raises TypeError if x is not floating point and ValueError if the loss is not a scalar.

    Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994; here by double backward.

    >>> at_x = linearize(model, torch.nn.functional.cross_entropy, x, y)
    >>> at_x.loss, at_x.grad_input, at_x.mixed_hvp(u)
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating-point, got {x.dtype}")
    x = x.detach().requires_grad_()
    parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        with torch.compiler.set_stance("force_eager"), LeanDoubleBackward():
            loss = loss_fn(model(x), y)
        if loss.dim() != 0:
            raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            (grad_input,) = torch.autograd.grad(loss, x, create_graph=True, materialize_grads=True)
    return Linearization(loss, grad_input, parameters)


def mixed_hvp(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor, u: Tensor) -> dict[str, Tensor]:
    """∇_θ⟨∇ₓℓ, u⟩ at one batch for one u: `linearize(model, loss_fn, x, y).mixed_hvp(u)`. Six sweeps.

    Arguments, result and errors are those of `linearize` and `Linearization.mixed_hvp`.

    >>> products = mixed_hvp(model, torch.nn.functional.cross_entropy, x, y, u)
    >>> products["fc.weight"].shape == model.fc.weight.shape
    """
    return linearize(model, loss_fn, x, y).mixed_hvp(u)
