"""Our own products with a masked weight.

With dense_grad derivatives are those by the masked weight itself, as if the mask were not: directions and gradients of
the weight are then dense, and products with them torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blokern.curvature.op import Rule, held, restored
from blokern.curvature.rules.products import Bilinear
from blokern.ops.convolution import Plan
from blokern.ops.definitions import dense_arguments
from blokern.ops.handles import (
    CONV2D_WEIGHT,
    MASKED_CONV2D,
    MASKED_CONV2D_INPUT,
    MASKED_CONV2D_WEIGHT,
    SDDMM,
    SPMM,
)

__all__ = ["RULES"]

aten = torch.ops.aten


class MaskedProduct(Bilinear):
    """spmm: weight @ x for the mask's entries, + bias along the columns."""

    slot_a, slot_b, slot_c = 0, 1, 2
    differentiable = (0, 1, 2)
    loops = True

    def setup(self, out: Tensor, weight: Tensor, x: Tensor, bias: Any, *how: Any) -> Sequence[Tensor]:
        tensors = [weight, x]
        self._streams, self.dense = held(how[:8], tensors), how[8:] == (True,)
        return tensors

    @property
    def streams(self) -> list[Any]:
        """Of the mask, and of its transpose."""
        found: list[Any] = restored(self._streams, self.saved)
        return found

    def _is_dense(self, weight: Tensor) -> bool:
        """Of the weight or a direction in its space."""
        return self.dense and weight is not self.saved[0]

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b if self._is_dense(a) else SPMM(a, b, None, *self.streams)

    def by_a(self, grad: Tensor, b: Tensor) -> Tensor:
        return grad @ b.mT if self.dense else SDDMM(grad, b, *self.streams)

    def by_b(self, grad: Tensor, a: Tensor) -> Tensor:
        turned = self.streams[4:] + self.streams[:4]
        return a.mT @ grad if self._is_dense(a) else SPMM(a.mT, grad, None, *turned)

    def by_term(self, grad: Tensor) -> Tensor:
        return grad.sum(1)

    def as_output(self, c: Tensor) -> Tensor:
        return c.unsqueeze(1)


class MaskedConvolution(Bilinear):
    """masked_conv2d of x and a weight, + bias along the channels."""

    slot_a, slot_b, slot_c = 0, 1, 2
    differentiable = (0, 1, 2)
    loops = True

    def setup(self, out: Tensor, x: Tensor, weight: Tensor, bias: Any, *how: Any) -> Sequence[Tensor]:
        tensors = [x, weight]
        self._plan, self.dense = held(how[:6], tensors), how[6]
        self.pad, self.how = dense_arguments(x.shape, out.shape, weight.shape, Plan(*how[:6]).numbers)
        return tensors

    @property
    def plan(self) -> Plan:
        return Plan(*restored(self._plan, self.saved))

    def _is_dense(self, weight: Tensor) -> bool:
        return self.dense and weight is not self.saved[1]

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if self._is_dense(b):
            return aten.convolution(_padded(a, self.pad), b, None, *self.how)  # type: ignore[no-any-return]
        return MASKED_CONV2D(a, b, None, *self.plan, False)  # type: ignore[no-any-return]

    def by_a(self, grad: Tensor, b: Tensor) -> Tensor:
        if self._is_dense(b):
            x = _padded(self.saved[0], self.pad)  # for its shape
            wanted = (True, False, False)
            by_padded = aten.convolution_backward(grad, x, b, None, *self.how, wanted)[0]
            return _padded(by_padded, [-p for p in self.pad])
        return MASKED_CONV2D_INPUT(grad, b, *self.plan, False)  # type: ignore[no-any-return]

    def by_b(self, grad: Tensor, a: Tensor) -> Tensor:
        weight = self.saved[1]
        if self.dense:
            return CONV2D_WEIGHT(grad, a, self.plan.geometry, weight.shape, self.plan.numbers)  # type: ignore[no-any-return]
        return MASKED_CONV2D_WEIGHT(grad, a, *self.plan, weight.shape)  # type: ignore[no-any-return]

    def by_term(self, grad: Tensor) -> Tensor:
        return grad.sum((0, 2, 3))

    def as_output(self, c: Tensor) -> Tensor:
        return c.view(-1, 1, 1)


def _padded(x: Tensor, pad: list[int]) -> Tensor:
    """F.pad, which copies where there is nothing to pad, too."""
    return F.pad(x, pad) if any(pad) else x


RULES: dict[Any, Rule] = {SPMM: MaskedProduct, MASKED_CONV2D: MaskedConvolution}
