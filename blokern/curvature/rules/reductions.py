"""Reductions that are not linear: log-sum-exp, norms, variances, extremes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blokern.curvature.op import Call, Op, Rule, Single, fit, wide
from blokern.curvature.rules.derived import Derived
from blokern.curvature.rules.linear import Linear, unaveraged

__all__ = ["RULES"]

aten = torch.ops.aten


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


class Norm(Single):
    """y = ‖a‖₂ over some dimensions: ẏ = ⟨n, ȧ⟩ with n = a / y, zero where y is.

    There the second derivative is infinite: NaN, but where the adjoint of y is zero and asks for none of it.
    """

    #: y over the norm.
    factor = 1.0
    #: The second derivative where the norm is zero.
    at_zero = math.nan
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
        n_dot = torch.where(length == 0, self.at_zero, (v - n * (n * v).sum(self.dim, keepdim=True)) / length)
        kept = self.factor * self._kept(g)
        return fit(torch.where(kept == 0, 0.0, n_dot * kept), self.operand)


class Deviation(Norm):
    """y = (Σ (a − ⟨a⟩)² / (n − correction))^½, a norm of what is centred. Its derivatives at zero are torch's."""

    at_zero = 0.0

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


class Peak(Single):
    """y = the largest or smallest over some dimensions; where several are, each has its share, as in torch."""

    curved = False

    def setup(
        self, out: Tensor, a: Tensor, dim: Sequence[int] = (), keepdim: bool = False
    ) -> Sequence[Tensor]:
        self.dim, self.keepdim = [d % max(a.dim(), 1) for d in dim or range(a.dim())], keepdim
        return a, out

    def _kept(self, t: Tensor) -> Tensor:
        return t if self.keepdim else _unsqueezed(t, self.dim)

    def _shares(self) -> Tensor:
        a, y = self.saved
        chosen = (a == self._kept(y)).to(a.dtype)
        return chosen / chosen.sum(self.dim, keepdim=True)

    def push(self, a_dot: Tensor) -> Tensor:
        return (self._shares() * a_dot).sum(self.dim, keepdim=self.keepdim)

    def pull(self, g: Tensor) -> Tensor:
        return self._shares() * self._kept(g)


def _freedom(a: Tensor, dims: Sequence[int], correction: float | None) -> float:
    count = 1
    for d in dims:
        count *= a.shape[d]
    return max(count - (1.0 if correction is None else correction), 0.0)


def _norm(call: Call) -> Op:
    return Norm(call) if (*call.args, 2)[1] == 2 else Derived(call)


def _with_mean(call: Call, spread: type[Deviation]) -> list[Op]:
    """var_mean and std_mean."""
    out, mean = call.out
    a, dim = call.args[0], (*call.args, None)[1]
    keepdim = call.kwargs.get("keepdim", False)
    dims = dim or [*range(a.dim())]
    return [
        spread(call._replace(out=out)),
        Linear(Call(aten.mean.dim, (a, dims, keepdim), {}, mean), unaveraged),
    ]


def _unsqueezed(t: Tensor, dims: Sequence[int]) -> Tensor:
    for d in sorted(dims):
        t = t.unsqueeze(d)
    return t


RULES: dict[Any, Rule] = {
    aten.logsumexp.default: LogSumExp,
    aten.linalg_vector_norm.default: _norm,
    aten.norm.Scalar: _norm,
    aten.norm.ScalarOpt_dim: _norm,
    aten.amax.default: Peak,
    aten.amin.default: Peak,
    aten.max.default: Peak,
    aten.min.default: Peak,
    aten.std.correction: Deviation,
    aten.var.correction: Variance,
    aten.var_mean.correction: partial(_with_mean, spread=Variance),
    aten.std_mean.correction: partial(_with_mean, spread=Deviation),
}
