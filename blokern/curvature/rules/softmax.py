"""Softmax, and the cross-entropy that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blokern import ops
from blokern.curvature.op import Call, Maybe, Op, Rule, Single, wide
from blokern.ops.curvature import has_kernels

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

    def followed_by(self, later: Op, slot: int) -> Op | None:
        (y,) = self.saved
        rows = y.dim() == 2 and self.dim in (1, -1) and y.dtype == self.operand.dtype
        return (
            SoftmaxCrossEntropy(self, later)
            if rows and isinstance(later, NllLoss) and later.fuses(y)
            else None
        )


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
        labels = self.forward is aten.nll_loss_forward and self.saved[0].dtype == torch.int64
        return has_kernels(a.device) and labels and self.how[0] != 0

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
        self.metas = softmax.metas
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


RULES: dict[Any, Rule] = {
    aten._softmax.default: Softmax,
    aten._safe_softmax.default: Softmax,
    aten._log_softmax.default: LogSoftmax,
    aten.nll_loss_forward.default: partial(
        NllLoss, forward=aten.nll_loss_forward, backward=aten.nll_loss_backward
    ),
    aten.nll_loss2d_forward.default: partial(
        NllLoss, forward=aten.nll_loss2d_forward, backward=aten.nll_loss2d_backward
    ),
}
