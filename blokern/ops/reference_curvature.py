"""Plain-torch oracles of the curvature ops, as :mod:`blokern.ops.reference` is of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "activation_adjoint_tangent",
    "batch_norm_adjoint",
    "batch_norm_adjoint_tangent",
    "batch_norm_tangent",
    "cg_update_",
    "layer_norm_adjoint_tangent",
    "layer_norm_tangent",
    "multi_tensor_axpby_",
    "multi_tensor_dot",
    "softmax_cross_entropy_hvp",
]


def activation_adjoint_tangent(
    activation: str,
    grad: Tensor,
    grad_dot: Tensor,
    saved: Tensor,
    x_dot: Tensor,
    *parameters: float,
    adjoint: bool = False,
) -> tuple[Tensor, Tensor]:
    """By forward differentiation of torch's own slope."""
    if activation in ("tanh", "sigmoid"):
        x = torch.atanh(saved) if activation == "tanh" else torch.logit(saved)
    else:
        x = saved
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "softplus": lambda x: F.softplus(x, *parameters),
        "elu": lambda x: torch.ops.aten.elu(x, *parameters),
    }
    f = known[activation]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), x, materialize_grads=True)
    slope = slope.detach()
    own = slope * grad if adjoint else saved.new_empty(0)
    return own, slope * grad_dot + second * x_dot * grad


def softmax_cross_entropy_hvp(
    logits: Tensor,
    tangent: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    p = logits.softmax(1)
    weights = torch.ones_like(p) if weight is None else weight.to(p.dtype).expand_as(p)
    counts = torch.ones_like(p[:, 0])
    if target.is_floating_point():
        hard = target * weights
    else:
        used = target != ignore_index
        labels = torch.where(used, target, 0)
        hard = weights * F.one_hot(labels, logits.shape[1])
        counts = torch.where(used, hard.sum(1), 0.0)
        hard, weights = hard * used[:, None], weights * used[:, None]
    q = (1.0 - label_smoothing) * hard + label_smoothing / logits.shape[1] * weights
    scale = 1.0 / counts.sum() if reduction == "mean" else 1.0
    total = q.sum(1, keepdim=True)
    loss = -(q * logits.log_softmax(1)).sum()
    hvp = total * p * (tangent - (p * tangent).sum(1, keepdim=True))
    return scale * loss, scale * (total * p - q), scale * hvp


def batch_norm_tangent(
    x: Tensor,
    x_dot: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    weight_dot: Tensor | None = None,
    bias_dot: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    train: bool = True,
) -> Tensor:
    normal, gamma = _normal(x, mean, rstd), _weight(x, weight)
    y_dot = gamma * _channel(rstd, x) * _project(x_dot, normal, train)
    if weight_dot is not None:
        y_dot = y_dot + _channel(weight_dot, x) * normal
    if bias_dot is not None:
        y_dot = y_dot + _channel(bias_dot, x)
    return y_dot if gate is None else torch.where(gate > 0, y_dot, 0.0)


def batch_norm_adjoint(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    train: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    g = grad if gate is None else torch.where(gate > 0, grad, 0.0)
    normal, gamma = _normal(x, mean, rstd), _weight(x, weight)
    x_bar = _channel(rstd, x) * _project(gamma * g, normal, train)
    dims = _but_channels(x)
    return x_bar, (g * normal).sum(dims).double(), g.sum(dims).double()


def batch_norm_adjoint_tangent(
    grad: Tensor,
    grad_dot: Tensor,
    x: Tensor,
    x_dot: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    weight_dot: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    train: bool = True,
    adjoint: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By forward differentiation of `batch_norm_adjoint`, with the statistics as functions of x."""

    def bars(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at_mean, at_rstd = mean, rstd
        if train:  # eps is what the given rstd says it is
            dims = _but_channels(x)
            eps = rstd**-2 - x.detach().var(dims, correction=0)
            at_mean, at_rstd = x.mean(dims), (x.var(dims, correction=0) + eps) ** -0.5
        return batch_norm_adjoint(grad, x, at_mean, at_rstd, weight, gate=gate, train=train)

    gamma = torch.ones_like(mean) if weight is None else weight
    gamma_dot = torch.zeros_like(gamma) if weight_dot is None else weight_dot
    own, moved, *_ = torch.func.jvp(bars, (x, gamma, grad), (x_dot, gamma_dot, grad_dot))
    return own[0] if adjoint else x.new_empty(0), *moved


def layer_norm_tangent(
    x: Tensor,
    x_dot: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    weight_dot: Tensor | None = None,
    bias_dot: Tensor | None = None,
) -> Tensor:
    """By forward differentiation of the normalisation, with the statistics as functions of x."""

    def y(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _normal_rows(x, rstd) * _rows(weight, x) + _rows(bias, x)

    zero = x.new_zeros(1, x.shape[1])
    gamma = zero + 1.0 if weight is None else weight
    dots = [torch.zeros_like(gamma) if t is None else t for t in (weight_dot, bias_dot)]
    out: Tensor = torch.func.jvp(y, (x, gamma, torch.zeros_like(gamma)), (x_dot, *dots))[1]
    return out


def layer_norm_adjoint_tangent(
    grad: Tensor,
    grad_dot: Tensor,
    x: Tensor,
    x_dot: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    weight_dot: Tensor | None = None,
    *,
    adjoint: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By forward differentiation of torch's gradients."""
    gamma = x.new_ones(1, x.shape[1]) if weight is None else weight
    gamma_dot = torch.zeros_like(gamma) if weight_dot is None else weight_dot

    def bars(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def y(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return _normal_rows(x, rstd) * _rows(weight, x) + _rows(bias, x)

        found: tuple[Tensor, Tensor, Tensor] = torch.func.vjp(y, x, weight, torch.zeros_like(weight))[1](grad)
        return found

    own, moved, *_ = torch.func.jvp(bars, (x, gamma, grad), (x_dot, gamma_dot, grad_dot))
    return own[0] if adjoint else x.new_empty(0), *moved


def _rows(weight: Tensor, x: Tensor) -> Tensor:
    """Of each row of x, its own of the kinds of weights."""
    return weight.repeat(len(x) // len(weight), 1)


def _normal_rows(x: Tensor, rstd: Tensor) -> Tensor:
    """x̂; eps is what the given rstd says it is."""
    eps = rstd[:, None] ** -2 - x.detach().var(1, correction=0, keepdim=True)
    return (x - x.mean(1, keepdim=True)) * (x.var(1, correction=0, keepdim=True) + eps) ** -0.5


def _but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _channel(t: Tensor, x: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (x.dim() - 2))


def _weight(x: Tensor, weight: Tensor | None) -> Tensor:
    return x.new_ones(()) if weight is None else _channel(weight, x)


def _normal(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x - _channel(mean, x)) * _channel(rstd, x)


def _project(a: Tensor, normal: Tensor, train: bool) -> Tensor:
    """a without what the batch's own mean and variance take of it."""
    if not train:
        return a
    dims = _but_channels(a)
    return a - a.mean(dims, keepdim=True) - normal * (normal * a).mean(dims, keepdim=True)


def multi_tensor_dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    products = [(s.double() * t.double())[..., None].flatten(1).sum(1) for s, t in zip(a, b, strict=True)]
    return torch.stack(products).sum(0)


def multi_tensor_axpby_(y: Sequence[Tensor], x: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
    for s, t in zip(y, x, strict=True):
        s.copy_(_scaled(t, a) + _scaled(s, b))


def cg_update_(
    x: Sequence[Tensor], r: Sequence[Tensor], p: Sequence[Tensor], ap: Sequence[Tensor], alpha: Tensor
) -> Tensor:
    one = torch.ones_like(alpha)
    multi_tensor_axpby_(x, p, alpha, one)
    multi_tensor_axpby_(r, ap, -alpha, one)
    return multi_tensor_dot(r, r)


def _scaled(t: Tensor, by: Tensor) -> Tensor:
    """Column by column; 0 where the factor is 0."""
    factor = by.reshape(-1, *[1] * (t.dim() - 1))
    return torch.where(factor != 0, factor * t.double(), 0.0)
