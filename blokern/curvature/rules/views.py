"""The same elements under another shape, order, dtype or layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blokern.curvature.op import Call, Meta, Op, Rule
from blokern.curvature.rules.linear import Linear
from blokern.curvature.rules.products import MatrixProduct

__all__ = ["RULES"]

aten = torch.ops.aten


class Reshape(Linear):
    """The same elements in the same order under another shape; for any strides."""

    stacks = True

    def push(self, a_dot: Tensor) -> Tensor:
        return a_dot.reshape((*_stack(a_dot, self.operand), *self.meta.shape))

    def pull(self, g: Tensor) -> Tensor:
        return g.reshape((*_stack(g, self.meta), *self.operand.shape))


def _stack(t: Tensor, meta: Meta) -> torch.Size:
    """The leading dimension that t has and meta has not."""
    return t.shape[: t.dim() - len(meta.shape)]


def _restrided(call: Call) -> Op | None:
    """as_strided where it does no more than say other strides for dimensions of size one, as global pooling does."""
    a, size, stride = call.args[:3]
    same = tuple(size) == a.shape and call.args[3:] in ((), (None,), (a.storage_offset(),))
    same = same and all(n == 1 or s == t for n, s, t in zip(size, stride, a.stride(), strict=True))
    return Reshape(call) if same else None


class Cast(Linear):
    """The same values in another dtype, layout or place in memory; a stack has no use for the layout."""

    stacks = True

    def push(self, a_dot: Tensor) -> Tensor:
        return a_dot.to(self.meta.dtype) if _stack(a_dot, self.meta) else super().push(a_dot)

    def pull(self, g: Tensor) -> Tensor:
        return g.to(self.operand.dtype)


class Permute(Linear):
    stacks = True

    def __init__(self, call: Call, order: Callable[..., list[int]]) -> None:
        self.order = order(call.args[0].dim(), *call.args[1:])
        super().__init__(call)

    def followed_by(self, later: Op, slot: int) -> Op | None:
        dim = len(self.order)
        if not isinstance(later, MatrixProduct) or slot != later.slot_b or self.order != _swap(dim, -2, -1):
            return None
        later.turn()
        return later

    def push(self, a_dot: Tensor) -> Tensor:
        return _permuted(a_dot, self.order)

    def pull(self, g: Tensor) -> Tensor:
        return _permuted(g, [self.order.index(d) for d in range(len(self.order))])


def _permuted(t: Tensor, order: list[int]) -> Tensor:
    extra = t.dim() - len(order)
    return t.permute((*range(extra), *(d + extra for d in order)))


def _order(dim: int, dims: Sequence[int]) -> list[int]:
    return [d % dim for d in dims]


def _swap(dim: int, first: int = 0, second: int = 1) -> list[int]:
    order = [*range(dim)]
    if dim > 0:
        order[first], order[second] = order[second], order[first]
    return order


def _swap_last(dim: int) -> list[int]:
    return [*range(dim)] if dim < 2 else _swap(dim)


RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            aten.alias.default,
            aten.view.default,
            aten._unsafe_view.default,
            aten._reshape_alias.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
        ),
        Reshape,
    ),
    **dict.fromkeys((aten.clone.default, aten._to_copy.default), Cast),
    aten.as_strided.default: _restrided,
    aten.permute.default: partial(Permute, order=_order),
    aten.transpose.int: partial(Permute, order=_swap),
    aten.t.default: partial(Permute, order=_swap_last),
}
