"""Products with masks as torch.compile and torch.export see them: a mask is its bits.

What the kernels walk has another length for every mask, and blocks that are chosen by its density: a graph of that
would be compiled anew with each. So in a graph there are the ops below: when they run, they find what is walked, and
keep it, by the bits' tensor, until the bits change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from blokern.ops.convolution import Geometry, Plan, conv2d_like, kept_plan
from blokern.ops.mask import SparseMask
from blokern.ops.products import spmm_like

__all__: list[str] = []

#: Masks by their bits' tensor, with the version that the bits had. A mask's own tensor is another on the same memory,
#: or no entry would ever go.
_MASKS: Any = WeakTensorKeyDictionary()


def _mask(words: Tensor, shape: Sequence[int]) -> SparseMask:
    size = torch.Size(shape)
    if words.is_inference():  # made in the graph itself, and without a version
        with torch.inference_mode(False):
            return SparseMask.of_words(words.clone(), size)
    found: tuple[int, SparseMask] | None = _MASKS.get(words)
    if found is None or found[0] != words._version or found[1].shape != size:
        found = _MASKS[words] = words._version, SparseMask.of_words(words.detach(), size)
    return found[1]


# ---- Matrices. transposed: `weight` is [cols, rows], and `words` are those of its transpose.


@torch.library.custom_op("blokern::traced_spmm", mutates_args=())
def _spmm(
    weight: Tensor, x: Tensor, bias: Tensor | None, words: Tensor, transposed: bool, dense_grad: bool
) -> Tensor:
    mask = _mask(words, weight.shape[::-1] if transposed else weight.shape)
    stream = mask.stream(transposed=transposed)
    y: Tensor = torch.ops.blokern.spmm(weight, x, bias, *stream, None, None, 0, None, dense_grad)
    return y


@torch.library.custom_op("blokern::traced_sddmm", mutates_args=())
def _sddmm(a: Tensor, b: Tensor, words: Tensor, transposed: bool) -> Tensor:
    shape = (len(b), len(a)) if transposed else (len(a), len(b))
    stream = _mask(words, shape).stream(transposed=transposed)
    product: Tensor = torch.ops.blokern.sddmm(a, b, *stream, None, None, 0, None)
    return product


@_spmm.register_fake
def _(weight: Tensor, x: Tensor, bias: Tensor | None, words: Tensor, *_: object) -> Tensor:
    return spmm_like(weight, x)


@_sddmm.register_fake
def _(a: Tensor, b: Tensor, words: Tensor, transposed: bool) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


def _save_spmm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, x, _, words, ctx.transposed, ctx.dense_grad = inputs
    ctx.save_for_backward(weight, x, words)


def _spmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, x, words = ctx.saved_tensors
    needs_weight, needs_x, needs_bias = ctx.needs_input_grad[:3]
    by_weight = by_x = None
    if needs_weight:
        by_weight = grad @ x.t() if ctx.dense_grad else _sddmm(grad, x, words, ctx.transposed)
    if needs_x:
        by_x = _spmm(weight.t(), grad, None, words, not ctx.transposed, ctx.dense_grad)
    return by_weight, by_x, grad.sum(1) if needs_bias else None, None, None, None


def _save_sddmm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, words, ctx.transposed = inputs
    ctx.save_for_backward(a, b, words)


def _sddmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, words = ctx.saved_tensors
    needs_a, needs_b = ctx.needs_input_grad[:2]
    return (
        _spmm(grad, b, None, words, ctx.transposed, False) if needs_a else None,
        _spmm(grad.t(), a, None, words, not ctx.transposed, False) if needs_b else None,
        None,
        None,
    )


_spmm.register_autograd(_spmm_backward, setup_context=_save_spmm)
_sddmm.register_autograd(_sddmm_backward, setup_context=_save_sddmm)


# ---- Convolutions. geometry: Geometry's numbers in a row.


def _plan(words: Tensor, geometry: Sequence[int]) -> tuple[Plan, list[int]]:
    """The plan, and the weight's shape."""
    shape = Geometry.of_numbers(geometry)
    weight = [shape.rows, shape.channels // shape.groups, *shape.taps]
    return kept_plan(_mask(words, weight), shape), weight


@torch.library.custom_op("blokern::traced_conv2d", mutates_args=())
def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, words: Tensor, geometry: Sequence[int], dense_grad: bool
) -> Tensor:
    y: Tensor = torch.ops.blokern.masked_conv2d(x, weight, bias, *_plan(words, geometry)[0], dense_grad)
    return y


@torch.library.custom_op("blokern::traced_conv2d_input", mutates_args=())
def _conv2d_input(
    grad: Tensor, weight: Tensor, words: Tensor, geometry: Sequence[int], dense_grad: bool
) -> Tensor:
    y: Tensor = torch.ops.blokern.masked_conv2d_input(grad, weight, *_plan(words, geometry)[0], dense_grad)
    return y


@torch.library.custom_op("blokern::traced_conv2d_weight", mutates_args=())
def _conv2d_weight(
    grad: Tensor, x: Tensor, words: Tensor, geometry: Sequence[int], dense_grad: bool
) -> Tensor:
    plan, shape = _plan(words, geometry)
    product: Tensor
    if dense_grad:
        product = torch.ops.blokern.conv2d_weight(grad, x, plan.geometry, shape, plan.numbers)
    else:
        product = torch.ops.blokern.masked_conv2d_weight(grad, x, *plan, shape)
    return product


@_conv2d.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, words: Tensor, geometry: Sequence[int], _: bool
) -> Tensor:
    shape = Geometry.of_numbers(geometry)
    return conv2d_like(x, [shape.rows, *shape.out])


@_conv2d_input.register_fake
def _(grad: Tensor, weight: Tensor, words: Tensor, geometry: Sequence[int], _: bool) -> Tensor:
    shape = Geometry.of_numbers(geometry)
    return conv2d_like(grad, [shape.channels, *shape.size])


@_conv2d_weight.register_fake
def _(grad: Tensor, x: Tensor, words: Tensor, geometry: Sequence[int], _: bool) -> Tensor:
    shape = Geometry.of_numbers(geometry)
    return x.new_empty(shape.rows, shape.channels // shape.groups, *shape.taps)


def _save_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, words, ctx.geometry, ctx.dense_grad = inputs
    ctx.save_for_backward(x, weight, words)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, words = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    how = (words, ctx.geometry, ctx.dense_grad)
    return (
        _conv2d_input(grad, weight, *how) if needs_x else None,
        _conv2d_weight(grad, x, *how) if needs_weight else None,
        grad.sum((0, 2, 3)) if needs_bias else None,
        None,
        None,
        None,
    )


_conv2d.register_autograd(_conv2d_backward, setup_context=_save_conv2d)
