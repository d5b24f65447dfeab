"""Elementwise ops that bend in two operands together, or in two halves of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blokern.curvature.op import Maybe, Op, Rule, Single, add

__all__ = ["RULES"]

aten = torch.ops.aten


class PReLU(Op):
    """y = a for a > 0, else w a; w broadcast."""

    def setup(self, out: Tensor, a: Tensor, w: Tensor) -> Sequence[Tensor]:
        return a, w

    def tangent(self, *tangents: Maybe) -> Maybe:
        a, w = self.saved
        a_dot, w_dot = tangents
        below = add(None if a_dot is None else w * a_dot, None if w_dot is None else w_dot * a)
        assert below is not None
        return self.to_output(torch.where(a > 0, 0.0 if a_dot is None else a_dot, below))

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        a, w = self.saved
        return (
            self.to_operand(torch.where(a > 0, grad, w * grad), 0) if wanted[0] else None,
            self.to_operand(torch.where(a > 0, 0.0, a * grad), 1) if wanted[1] else None,
        )

    def adjoint_tangent(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        by_a, by_w = (None, None) if grad_dot is None else self.adjoint(grad_dot, wanted)
        if grad is None:
            return by_a, by_w
        a_dot, w_dot = tangents
        below = self.saved[0] <= 0
        if wanted[0] and w_dot is not None:
            by_a = add(by_a, self.to_operand(torch.where(below, w_dot * grad, 0.0), 0))
        if wanted[1] and a_dot is not None:
            by_w = add(by_w, self.to_operand(torch.where(below, a_dot * grad, 0.0), 1))
        return by_a, by_w


class XLogY(Op):
    """y = a log b, 0 where a is; a or b may be a number."""

    def setup(self, out: Tensor, a: Any, b: Any) -> Sequence[Tensor]:
        like = a if isinstance(a, Tensor) else b
        return [t if isinstance(t, Tensor) else like.new_full((), t) for t in (a, b)]

    def _log(self) -> Tensor:
        a, b = self.saved
        return torch.where((a == 0) & (b <= 0), 0.0, torch.log(b))

    def tangent(self, *tangents: Maybe) -> Maybe:
        a, b = self.saved
        a_dot, b_dot = tangents
        total = add(None if a_dot is None else a_dot * self._log(), None if b_dot is None else b_dot * a / b)
        return None if total is None else self.to_output(total)

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        a, b = self.saved
        return (
            self.to_operand(grad * self._log(), 0) if wanted[0] else None,
            self.to_operand(grad * a / b, 1) if wanted[1] else None,
        )

    def adjoint_tangent(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        by_a, by_b = (None, None) if grad_dot is None else self.adjoint(grad_dot, wanted)
        if grad is None:
            return by_a, by_b
        (a, b), (a_dot, b_dot) = self.saved, tangents
        if wanted[0] and b_dot is not None:
            by_a = add(by_a, self.to_operand(grad * b_dot / b, 0))
        if wanted[1]:
            ratio_dot = add(a_dot, None if b_dot is None else -a * b_dot / b)
            by_b = by_b if ratio_dot is None else add(by_b, self.to_operand(grad * ratio_dot / b, 1))
        return by_a, by_b


class GLU(Single):
    """y = u σ(w), u and w the halves of a along a dimension."""

    def setup(self, out: Tensor, a: Tensor, dim: int = -1) -> Sequence[Tensor]:
        self.dim = dim % a.dim() - a.dim()  # from the end: a stack has a dimension more
        return (a,)

    def _halves(self, t: Tensor) -> tuple[Tensor, Tensor]:
        u, w = t.chunk(2, self.dim)
        return u, w

    def push(self, a_dot: Tensor) -> Tensor:
        (u, w), (u_dot, w_dot) = self._halves(self.saved[0]), self._halves(a_dot)
        s = torch.sigmoid(w)
        return s * (u_dot + u * (1.0 - s) * w_dot)

    def pull(self, g: Tensor) -> Tensor:
        u, w = self._halves(self.saved[0])
        s = torch.sigmoid(w)
        return torch.cat([s * g, s * (1.0 - s) * u * g], self.dim)

    def bend(self, g: Tensor, a_dot: Tensor) -> Tensor:
        (u, w), (u_dot, w_dot) = self._halves(self.saved[0]), self._halves(a_dot)
        s = torch.sigmoid(w)
        slope = s * (1.0 - s) * g
        return torch.cat([slope * w_dot, slope * (u_dot + u * (1.0 - 2.0 * s) * w_dot)], self.dim)


RULES: dict[Any, Rule] = {
    aten._prelu_kernel.default: PReLU,
    aten.xlogy.Tensor: XLogY,
    aten.xlogy.Scalar_Self: XLogY,
    aten.xlogy.Scalar_Other: XLogY,
    aten.glu.default: GLU,
}
