"""A masked weight as a tensor, for those who read it themselves: its values, and its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blokern.ops.definitions import straight_through
from blokern.ops.mask import SparseMask, check_mask, is_jit_traced

__all__ = ["GradientMask", "clear_masked_", "mark_masked", "masked_weight"]


def masked_weight(weight: Tensor, mask: SparseMask, *, dense_grad: bool = False) -> Tensor:
    """weight ⊙ mask, of any dtype, a new tensor with zeros where the mask is 0, whatever lies there.

    In torch's ops: it has derivatives of any order and mode, and is traced, compiled and vmapped as they are. With
    dense_grad they are those by the result ("straight-through"). Raises ValueError for a mask of another shape.

    >>> masked_weight(torch.ones(1, 2), SparseMask(torch.tensor([[True, False]])))
    tensor([[1., 0.]])
    """
    if not is_jit_traced():  # which would warn of it
        check_mask(mask, weight, "weight")
    kept = mask.to_dense()
    if dense_grad:
        return straight_through(weight, kept)
    return torch.where(kept, weight, 0)


def clear_masked_(weight: Tensor, mask: SparseMask) -> None:
    """Zeros into the weight where the mask is 0, written only where something else lies.

    No autograd graph notices, and none needs to: what it has saved of a masked weight are zeros there, or is never
    read. Raises ValueError for a mask of another shape, or whose bits are damaged.

    >>> clear_masked_(weight := torch.ones(1, 2), SparseMask(torch.tensor([[True, False]])))
    >>> weight
    tensor([[1., 0.]])
    """
    check_mask(mask, weight, "weight")
    if weight.is_meta:
        return
    data = weight.data
    if data.is_cpu and data.is_contiguous():
        torch.ops.blokern.clear_masked_(data, mask.valid().words)
    else:
        data.masked_fill_(~mask.to_dense(), 0)


class GradientMask:
    """A hook of a leaf tensor whose gradient is zero where a mask is 0, whoever makes it.

    mask: a weak reference to what gives the mask now, or None for no mask.

    >>> mask, weight = SparseMask(torch.tensor([[True, False]])), torch.ones(1, 2, requires_grad=True)
    >>> handle = weight.register_hook(GradientMask(lambda: lambda: mask))
    >>> torch.autograd.grad(weight.sum(), weight)
    (tensor([[1., 0.]]),)
    """

    def __init__(self, mask: Callable[[], Callable[[], SparseMask | None] | None]) -> None:
        self._mask = mask

    @property
    def owner(self) -> object:
        """Whose method gives the mask; None if it is gone."""
        return getattr(self._mask(), "__self__", None)

    def __call__(self, grad: Tensor) -> Tensor | None:
        give = self._mask()
        mask = None if give is None else give()
        if mask is None or _is_marked(grad, mask):
            return None
        return masked_weight(grad, mask)


def mark_masked(grad: Tensor, words: Tensor) -> Tensor:
    """The gradient, which a product has masked by these words: GradientMask then has nothing to do.

    >>> grad = mark_masked(torch.zeros(1, 2), SparseMask(torch.tensor([[True, False]])).words)
    """
    grad._masked_by = (words, grad._version)  # type: ignore[attr-defined]
    return grad


def _is_marked(grad: Tensor, mask: SparseMask) -> bool:
    """Sums with other gradients are new tensors, or have another version."""
    words, version = getattr(grad, "_masked_by", (None, None))
    return words is mask.words and version == grad._version


def _fake_clear(weight: Tensor, words: Tensor) -> None:
    return None


torch.library.register_fake("blokern::clear_masked_", _fake_clear)
