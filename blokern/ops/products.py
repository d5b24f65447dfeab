"""Products with a masked weight that do work for the kept entries only, and read no other weight.

float64, float32, bfloat16 or float16 (sums in float32), any strides. Differentiable any number of times: the two
products are each other's derivatives. Under transforms of torch.func, and in forward mode, they are their definitions
in torch's ops (definitions.py). A row's sum has one order, whatever the number of threads; only where a mask keeps so
much that the dense product is faster, which on CUDA is from a few percent on, torch multiplies, the masked weights
being zeros, with what its products promise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from blokern.ops.definitions import is_transformed, sddmm_definition, spmm_definition, with_definition
from blokern.ops.mask import SparseMask, as_mask, check_mask
from blokern.ops.masked_weight import mark_masked

__all__ = ["masked_linear", "sddmm", "spmm", "spmm_like"]


def spmm(weight: Tensor, mask: Tensor | SparseMask, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """(weight ⊙ mask) @ x, + bias [rows, 1]: a new [rows, samples], laid out like x.

    weight: [rows, cols]; mask: bool of that shape, or a SparseMask, which keeps what a bool mask costs at every call;
    x: [cols, samples]; bias: [rows]. A masked weight may hold anything, NaN too. Raises ValueError or TypeError,
    naming the argument, for shapes, dtypes or devices that do not fit.

    >>> spmm(torch.eye(2), torch.tensor([[True, False], [False, False]]), torch.ones(2, 3))
    tensor([[1., 1., 1.],
            [0., 0., 0.]])
    """
    mask = as_mask(mask)
    check_mask(mask, weight, "weight")
    return _spmm(weight, mask, x, bias)


def sddmm(a: Tensor, b: Tensor, mask: Tensor | SparseMask) -> Tensor:
    """(a @ b.T) ⊙ mask, dense [rows, cols], with zeros where the mask is 0.

    a: [rows, samples]; b: [cols, samples]; mask as in :func:`spmm`, and so are the errors.

    >>> sddmm(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([[True, False], [False, False]]))
    tensor([[3., 0.],
            [0., 0.]])
    """
    mask = as_mask(mask)
    if a.dim() == 2 and b.dim() == 2 and (mask.rows, mask.cols) != (len(a), len(b)):
        raise ValueError(f"mask must have shape {(len(a), len(b))} to fit a and b, got {tuple(mask.shape)}")
    out: Tensor
    if is_transformed():
        out = sddmm_definition(a, b, mask.words)
    elif torch.compiler.is_compiling():
        out = torch.ops.blokern.traced_sddmm(a, b, mask.words, False)
    else:
        out = torch.ops.blokern.sddmm(a, b, *_streams(mask, a, b))
    return out


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | SparseMask,
    bias: Tensor | None = None,
    *,
    dense_grad: bool = False,
) -> Tensor:
    """F.linear(x, weight ⊙ mask, bias), and a gradient of weight that is zero where the mask is 0.

    x: [..., in]; weight: [out, in]; mask and errors as in :func:`spmm`; bias: [out]. With dense_grad, derivatives of
    any order are those by w = weight ⊙ mask itself, as if the mask were not ("straight-through"): weight's gradient
    is the dense product, also where the mask is 0.

    >>> masked_linear(torch.ones(1, 2), torch.eye(2), torch.tensor([[True, False], [False, False]]))
    tensor([[1., 0.]])
    """
    if x.dim() == 0:
        raise ValueError("x must have a dimension of features, [..., in], got a scalar tensor")
    mask = as_mask(mask)
    check_mask(mask, weight, "weight")
    samples = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).t()
    y = _spmm(weight, mask, samples, bias, dense_grad).t()
    return y.reshape(*x.shape[:-1], y.shape[1])


def _spmm(
    weight: Tensor, mask: SparseMask, x: Tensor, bias: Tensor | None, dense_grad: bool = False
) -> Tensor:
    y: Tensor
    if is_transformed():
        y = spmm_definition(weight, x, bias, mask.words, dense_grad)
    elif torch.compiler.is_compiling():
        y = torch.ops.blokern.traced_spmm(weight, x, bias, mask.words, False, dense_grad)
    else:
        y = torch.ops.blokern.spmm(weight, x, bias, *_streams(mask, weight, x), dense_grad)
    return y


def _streams(mask: SparseMask, *factors: Tensor) -> tuple[Any, ...]:
    """The mask as the ops take it; its transpose serves derivatives alone."""
    if torch.is_grad_enabled() and any(factor.requires_grad for factor in factors):
        return *mask.stream(), *mask.stream(transposed=True)
    return *mask.stream(), None, None, 0, None


# ---- Fakes and derivatives. `streams` is (start, column, block, words) of the mask and of its transpose.


def _save_spmm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, x, _, *streams, ctx.dense_grad = inputs
    _save(ctx, (weight, x, *streams), output)


def _turned(streams: tuple[Any, ...]) -> tuple[Any, ...]:
    return streams[4:] + streams[:4]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, start, column, block, words, start_t, column_t, block_t, words_t = inputs
    ctx.save_for_backward(first, second, start, column, words, start_t, column_t, words_t)
    ctx.blocks = block, block_t


def _saved(ctx: Any) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    first, second, start, column, words, start_t, column_t, words_t = ctx.saved_tensors
    block, block_t = ctx.blocks
    return first, second, (start, column, block, words, start_t, column_t, block_t, words_t)


def _spmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, x, streams = _saved(ctx)
    needs_weight, needs_x, needs_bias = ctx.needs_input_grad[:3]
    by_weight = None
    if needs_weight:
        by_weight = grad @ x.t() if ctx.dense_grad else _sddmm_op(grad, x, *streams)
        if not ctx.dense_grad:
            mark_masked(by_weight, streams[3])
    turned = (*_turned(streams), ctx.dense_grad)
    return (
        by_weight,
        _spmm_op(weight.t(), grad, None, *turned) if needs_x else None,
        grad.sum(1) if needs_bias else None,
        *[None] * 9,
    )


def _sddmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, streams = _saved(ctx)
    needs_a, needs_b = ctx.needs_input_grad[:2]
    return (
        _spmm_op(grad, b, None, *streams, False) if needs_a else None,
        _spmm_op(grad.t(), a, None, *_turned(streams), False) if needs_b else None,
        *[None] * 8,
    )


def spmm_like(weight: Tensor, x: Tensor, *_: object) -> Tensor:
    """A result of spmm, not filled."""
    rows, samples = weight.shape[0], x.shape[1]
    if x.stride(0) == 1 and x.stride(1) != 1:
        return x.new_empty(samples, rows).t()
    return x.new_empty(rows, samples)


def _fake_sddmm(a: Tensor, b: Tensor, *_: object) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


torch.library.register_fake("blokern::spmm", spmm_like)
torch.library.register_fake("blokern::sddmm", _fake_sddmm)
torch.library.register_autograd("blokern::spmm", _spmm_backward, setup_context=_save_spmm)
torch.library.register_autograd("blokern::sddmm", _sddmm_backward, setup_context=_save)


def _spmm_defined(weight: Tensor, x: Tensor, bias: Tensor | None, *streams: Any) -> Tensor:
    return spmm_definition(weight, x, bias, streams[3], *streams[8:])


def _sddmm_defined(a: Tensor, b: Tensor, *streams: Any) -> Tensor:
    return sddmm_definition(a, b, streams[3])


_spmm_op = with_definition("spmm", _spmm_defined)
_sddmm_op = with_definition("sddmm", _sddmm_defined)
