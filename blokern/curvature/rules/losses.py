"""Softmax and what comes after it; losses; norms and variances: reductions that are not linear."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blokern import ops
from blokern.curvature.op import Call, Maybe, Op, Rule, Single, add, fit, wide
from blokern.curvature.rules.linear import Linear, unaveraged

__all__ = ["RULES"]

aten = torch.ops.aten


class Softmax(Single):
    """y = softmax(a): ẏ = y(ȧ − Σyȧ); adjoint y(g − Σyg)."""

    def setup(self, out: Tensor, a: Tensor, dim: int, *_: Any, **__: Any) -> Sequence[Tensor]:
        self.dim = dim
        return (out,)

    def push(self, a_dot: Tensor) -> Tensor:
        out: Tensor = aten._softmax_backward_data(a_dot, self.saved[0], self.dim, self.operand.dtype)
        return out

    def pull(self, g: Tensor) -> Tensor:
        return self.push(g)

    def bend(self, g: Tensor, a_dot: Tensor) -> Tensor:
        y, y_dot, wide_g = wide(self.saved[0]), wide(self.push(a_dot)), wide(g)
        bent = y_dot * (wide_g - (y * wide_g).sum(self.dim, keepdim=True))
        return (bent - y * (y_dot * wide_g).sum(self.dim, keepdim=True)).to(g.dtype)


class LogSoftmax(Single):
    """y = log softmax(a), p = eʸ: ẏ = ȧ − Σpȧ; adjoint g − p Σg."""

    def setup(self, out: Tensor, a: Tensor, dim: int, half_to_float: bool) -> Sequence[Tensor]:
        self.dim = dim
        return (out,)

    def _probabilities(self) -> Tensor:
        return torch.exp(wide(self.saved[0]))

    def push(self, a_dot: Tensor) -> Tensor:
        v = wide(a_dot)
        return (v - (self._probabilities() * v).sum(self.dim, keepdim=True)).to(self.meta.dtype)

    def pull(self, g: Tensor) -> Tensor:
        out: Tensor = aten._log_softmax_backward_data(g, self.saved[0], self.dim, self.operand.dtype)
        return out

    def bend(self, g: Tensor, a_dot: Tensor) -> Tensor:
        p_dot = self._probabilities() * wide(self.push(a_dot))
        return (-p_dot * wide(g).sum(self.dim, keepdim=True)).to(self.operand.dtype)

    def followed_by(self, later: Op) -> Op | None:
        (y,) = self.saved
        rows = y.dim() == 2 and self.dim in (1, -1) and y.dtype == self.operand.dtype
        return (
            SoftmaxCrossEntropy(self, later)
            if rows and isinstance(later, NllLoss) and later.fuses(y)
            else None
        )


class LogSumExp(Single):
    """y = log Σ eᵃ, p = e^(a − y): ẏ = Σpȧ; adjoint p g."""

    def setup(self, out: Tensor, a: Tensor, dim: Sequence[int], keepdim: bool = False) -> Sequence[Tensor]:
        self.dim, self.keepdim = [d % max(a.dim(), 1) for d in dim], keepdim
        return a, out

    def _kept(self, t: Tensor) -> Tensor:
        return wide(t) if self.keepdim else _unsqueezed(wide(t), self.dim)

    def _probabilities(self) -> Tensor:
        a, y = self.saved
        return torch.exp(wide(a) - self._kept(y))

    def push(self, a_dot: Tensor) -> Tensor:
        return (self._probabilities() * wide(a_dot)).sum(self.dim, keepdim=self.keepdim).to(self.meta.dtype)

    def pull(self, g: Tensor) -> Tensor:
        return (self._probabilities() * self._kept(g)).to(g.dtype)

    def bend(self, g: Tensor, a_dot: Tensor) -> Tensor:
        p, v = self._probabilities(), wide(a_dot)
        p_dot = p * (v - (p * v).sum(self.dim, keepdim=True))
        return (p_dot * self._kept(g)).to(g.dtype)


def _unsqueezed(t: Tensor, dims: Sequence[int]) -> Tensor:
    for d in sorted(dims):
        t = t.unsqueeze(d)
    return t


class NllLoss(Single):
    """−Σ weight[target]·a[target], perhaps over the weights' sum: linear in a."""

    curved = False

    def __init__(self, call: Call, forward: Any, backward: Any) -> None:
        self.forward, self.backward = forward, backward
        out, self.total = call.out
        super().__init__(call._replace(out=out))

    def setup(
        self, out: Tensor, a: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
    ) -> Sequence[Tensor]:
        self.how = (reduction, ignore_index)
        return (target, self.total) if weight is None else (target, self.total, weight)

    def settle(self) -> None:
        del self.total  # saved by now

    def weight(self) -> Maybe:
        return self.saved[2] if len(self.saved) > 2 else None

    def fuses(self, a: Tensor) -> bool:
        """Whether the kernel of both has the same meaning."""
        return a.device.type == "cpu" and self.forward is aten.nll_loss_forward and self.how[0] != 0

    def push(self, a_dot: Tensor) -> Tensor:
        out: Tensor = self.forward(a_dot, self.saved[0], self.weight(), *self.how)[0]
        return out

    def pull(self, g: Tensor) -> Tensor:
        a = g.new_empty(self.operand.shape)  # lends its shape
        out: Tensor = self.backward(g, a, self.saved[0], self.weight(), *self.how, self.saved[1])
        return out


class SoftmaxCrossEntropy(Single):
    """A log-softmax of rows and the loss of its labels: the Hessian's product in one pass."""

    stacks = True

    def __init__(self, softmax: LogSoftmax, nll: NllLoss) -> None:
        self.how = nll.how
        self.func, self.meta = nll.func, nll.meta
        self.operand, self.metas = softmax.operand, softmax.metas
        # log-softmax of log-softmax is itself, so that the output does for the logits.
        self.saved = [*softmax.saved, *nll.saved]

    def _results(self, a_dot: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient and the Hessian's product, for an adjoint of 1."""
        y, target, _, *weight = self.saved
        reduction, ignore_index = self.how
        _, grad, product = ops.softmax_cross_entropy_hvp(
            y,
            a_dot,
            target,
            weight=weight[0] if weight else None,
            ignore_index=ignore_index,
            reduction="mean" if reduction == 1 else "sum",
        )
        return grad, product

    def push(self, a_dot: Tensor) -> Tensor:
        one = torch.ones(self.meta.shape, dtype=self.meta.dtype, device=a_dot.device)
        return (self.pull(one) * a_dot).sum((-2, -1))

    def pull(self, g: Tensor) -> Tensor:
        if g.dim() > 0:
            return g[:, None, None] * self.pull(torch.ones_like(g[0]))
        y, target, total, *weight = self.saved
        by_y = aten.nll_loss_backward(g, y, target, weight[0] if weight else None, *self.how, total)
        out: Tensor = aten._log_softmax_backward_data(by_y, y, 1, y.dtype)
        return out

    def bend(self, g: Tensor, a_dot: Tensor) -> Tensor:
        if a_dot.dim() > 2:
            return torch.stack([self.bend(g, t) for t in a_dot])
        return g * self._results(a_dot)[1]

    def both(
        self,
        grad: Tensor,
        grad_dot: Maybe,
        tangents: Sequence[Maybe],
        inner: Sequence[bool],
        wanted: Sequence[bool],
    ) -> tuple[Sequence[Maybe], Sequence[Maybe]]:
        (a_dot, *_) = tangents
        if a_dot is None or a_dot.dim() > 2 or grad_dot is not None:
            return super().both(grad, grad_dot, tangents, inner, wanted)
        own, product = self._results(a_dot)
        return (grad * own,), (grad * product,)


def _reduced(t: Tensor, reduction: int) -> Tensor:
    """As torch numbers them: each, the mean, the sum."""
    return t if reduction == 0 else t.mean() if reduction == 1 else t.sum()


def _spread(g: Tensor, reduction: int, count: int) -> Tensor:
    """The transpose of `_reduced`, but for the broadcast."""
    return wide(g) / count if reduction == 1 else wide(g)


class Residual(Op):
    """Σ ρ(a − b), the mean, or each: ρ given by its first and second derivative."""

    differentiable = (0, 1)

    def __init__(
        self,
        call: Call,
        first: Callable[..., Tensor],
        second: Callable[..., Tensor],
    ) -> None:
        self.first, self.second = first, second
        super().__init__(call)

    def setup(
        self, out: Tensor, a: Tensor, b: Tensor, reduction: int = 1, parameter: float = 1.0
    ) -> Sequence[Tensor]:
        self.reduction, self.parameter = reduction, parameter
        return a, b

    def _difference(self) -> Tensor:
        a, b = self.saved
        return wide(a) - wide(b)

    def _spread(self, g: Tensor, d: Tensor) -> Tensor:
        return _spread(g, self.reduction, d.numel())

    def _both(self, by_difference: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        return (
            self.to_operand(by_difference, 0) if wanted[0] else None,
            self.to_operand(-by_difference, 1) if wanted[1] else None,
        )

    def _dot(self, tangents: Sequence[Maybe]) -> Maybe:
        a, b = tangents[:2]
        return add(None if a is None else wide(a), None if b is None else -wide(b))

    def tangent(self, *tangents: Maybe) -> Maybe:
        dot = self._dot(tangents)
        if dot is None:
            return None
        return _reduced(self.first(self._difference(), self.parameter) * dot, self.reduction).to(
            self.meta.dtype
        )

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        d = self._difference()
        return self._both(self.first(d, self.parameter) * self._spread(grad, d), wanted)

    def adjoint_tangent(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        d, dot = self._difference(), self._dot(tangents)
        bent = None
        if grad is not None and dot is not None:
            bent = self.second(d, self.parameter) * dot * self._spread(grad, d)
        moved = None if grad_dot is None else self.first(d, self.parameter) * self._spread(grad_dot, d)
        total = add(bent, moved)
        return (None, None) if total is None else self._both(total, wanted)


class BinaryCrossEntropy(Single):
    """Binary cross-entropy of probabilities, or of logits, with a constant target."""

    def __init__(self, call: Call, logits: bool) -> None:
        self.logits = logits
        super().__init__(call)

    def setup(
        self, out: Tensor, a: Tensor, target: Tensor, weight: Tensor | None = None, *rest: Any
    ) -> Sequence[Tensor]:
        # of probabilities: (reduction); of logits: (pos_weight, reduction)
        self.reduction: int = next((r for r in rest if isinstance(r, int)), 1)
        pos_weight = next((r for r in rest if isinstance(r, Tensor)), None)
        self.weighted, self.pos_weighted = weight is not None, pos_weight is not None
        return [t for t in (a, target, weight, pos_weight) if t is not None]

    def _derivatives(self) -> tuple[Tensor, Tensor]:
        """The first and the second, of each term."""
        a, target, *rest = map(wide, self.saved)
        weight = rest.pop(0) if self.weighted else 1.0
        if self.logits:
            positive = 1.0 + (rest[0] - 1.0) * target if self.pos_weighted else torch.ones_like(target)
            s = torch.sigmoid(a)
            return weight * (1.0 - target - positive * (1.0 - s)), weight * positive * s * (1.0 - s)
        variance = (a * (1.0 - a)).clamp(min=1e-12)  # as torch
        first = (a - target) / variance
        return weight * first, weight * (1.0 - first * (1.0 - 2.0 * a)) / variance

    def push(self, a_dot: Tensor) -> Tensor:
        first, _ = self._derivatives()
        return _reduced(first * wide(a_dot), self.reduction).to(self.meta.dtype)

    def pull(self, g: Tensor) -> Tensor:
        first, _ = self._derivatives()
        return fit(first * _spread(g, self.reduction, first.numel()), self.operand)

    def bend(self, g: Tensor, a_dot: Tensor) -> Tensor:
        _, second = self._derivatives()
        return fit(second * wide(a_dot) * _spread(g, self.reduction, second.numel()), self.operand)


class Norm(Single):
    """y = ‖a‖₂ over some dimensions: ẏ = ⟨n, ȧ⟩ with n = a / y, zero where y is."""

    #: y over the norm.
    factor = 1.0
    dim: list[int]
    keepdim: bool

    def setup(
        self,
        out: Tensor,
        a: Tensor,
        ord: float = 2,
        dim: Any = None,
        keepdim: bool = False,
        *,
        dtype: Any = None,
    ) -> Sequence[Tensor]:
        self.dim = [*range(a.dim())] if dim is None else [d % a.dim() for d in dim]
        self.keepdim = keepdim
        return a, out

    def _kept(self, t: Tensor) -> Tensor:
        return wide(t) if self.keepdim else _unsqueezed(wide(t), self.dim)

    def _centred(self, a: Tensor) -> Tensor:
        return wide(a)

    def _direction(self) -> tuple[Tensor, Tensor]:
        a, y = self.saved
        length = self._kept(y) / self.factor
        return torch.where(length == 0, 0.0, self._centred(a) / length), length

    def push(self, a_dot: Tensor) -> Tensor:
        n, _ = self._direction()
        return (self.factor * (n * wide(a_dot)).sum(self.dim, keepdim=self.keepdim)).to(self.meta.dtype)

    def pull(self, g: Tensor) -> Tensor:
        n, _ = self._direction()
        return fit(self.factor * n * self._kept(g), self.operand)

    def bend(self, g: Tensor, a_dot: Tensor) -> Tensor:
        n, length = self._direction()
        v = self._centred(a_dot)
        n_dot = torch.where(length == 0, 0.0, (v - n * (n * v).sum(self.dim, keepdim=True)) / length)
        return fit(self.factor * n_dot * self._kept(g), self.operand)


class Deviation(Norm):
    """y = (Σ (a − ⟨a⟩)² / (n − correction))^½, a norm of what is centred."""

    def setup(  # type: ignore[override]
        self, out: Tensor, a: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
    ) -> Sequence[Tensor]:
        self.dim, self.keepdim = [d % a.dim() for d in dim or range(a.dim())], keepdim
        self.freedom = _freedom(a, self.dim, correction)
        self.factor = self.freedom**-0.5 if self.freedom else math.inf
        return a, out

    def _centred(self, a: Tensor) -> Tensor:
        return wide(a) - wide(a).mean(self.dim, keepdim=True)


class Variance(Deviation):
    """y = Σ (a − ⟨a⟩)² / (n − correction)."""

    def push(self, a_dot: Tensor) -> Tensor:
        terms = self._centred(self.saved[0]) * wide(a_dot)
        return (2.0 / self.freedom * terms.sum(self.dim, keepdim=self.keepdim)).to(self.meta.dtype)

    def pull(self, g: Tensor) -> Tensor:
        return fit(2.0 / self.freedom * self._centred(self.saved[0]) * self._kept(g), self.operand)

    def bend(self, g: Tensor, a_dot: Tensor) -> Tensor:
        return fit(2.0 / self.freedom * self._centred(a_dot) * self._kept(g), self.operand)


def _freedom(a: Tensor, dims: Sequence[int], correction: float | None) -> float:
    count = 1
    for d in dims:
        count *= a.shape[d]
    return max(count - (1.0 if correction is None else correction), 0.0)


def _norm(call: Call) -> Op | None:
    return Norm(call) if (*call.args, 2)[1] == 2 else None


def _var_mean(call: Call) -> list[Op]:
    variance, mean = call.out
    a, dim = call.args[0], (*call.args, None)[1]
    keepdim = call.kwargs.get("keepdim", False)
    dims = dim or [*range(a.dim())]
    return [
        Variance(call._replace(out=variance)),
        Linear(Call(aten.mean.dim, (a, dims, keepdim), {}, mean), unaveraged),
    ]


def _huber_first(d: Tensor, delta: float) -> Tensor:
    return d.clamp(-delta, delta)


def _smooth_first(d: Tensor, beta: float) -> Tensor:
    return torch.sgn(d) if beta == 0 else (d / beta).clamp(-1.0, 1.0)


RULES: dict[Any, Rule] = {
    aten._softmax.default: Softmax,
    aten._safe_softmax.default: Softmax,
    aten._log_softmax.default: LogSoftmax,
    aten.logsumexp.default: LogSumExp,
    aten.nll_loss_forward.default: partial(
        NllLoss, forward=aten.nll_loss_forward, backward=aten.nll_loss_backward
    ),
    aten.nll_loss2d_forward.default: partial(
        NllLoss, forward=aten.nll_loss2d_forward, backward=aten.nll_loss2d_backward
    ),
    aten.mse_loss.default: partial(
        Residual, first=lambda d, _: 2.0 * d, second=lambda d, _: torch.full_like(d, 2.0)
    ),
    aten.huber_loss.default: partial(
        Residual, first=_huber_first, second=lambda d, delta: (d.abs() <= delta).to(d.dtype)
    ),
    aten.smooth_l1_loss.default: partial(
        Residual,
        first=_smooth_first,
        second=lambda d, beta: (d.abs() < beta).to(d.dtype) / (beta or 1.0),
    ),
    aten.binary_cross_entropy.default: partial(BinaryCrossEntropy, logits=False),
    aten.binary_cross_entropy_with_logits.default: partial(BinaryCrossEntropy, logits=True),
    aten.linalg_vector_norm.default: _norm,
    aten.var.correction: Variance,
    aten.std.correction: Deviation,
    aten.var_mean.correction: _var_mean,
}
