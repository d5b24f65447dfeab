"""Losses of single entries: ρ of a residual, and binary cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blokern.curvature.op import Call, Maybe, Op, Rule, Single, add, fit, wide

__all__ = ["RULES"]

aten = torch.ops.aten


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


def _huber_first(d: Tensor, delta: float) -> Tensor:
    return d.clamp(-delta, delta)


def _smooth_first(d: Tensor, beta: float) -> Tensor:
    return torch.sgn(d) if beta == 0 else (d / beta).clamp(-1.0, 1.0)


RULES: dict[Any, Rule] = {
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
}
