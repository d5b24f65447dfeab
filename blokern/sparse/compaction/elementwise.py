"""Ops that work element by element, and those that make tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from blokern.sparse.compaction.channels import Axis
from blokern.sparse.compaction.record import Call, Rule, Value

__all__ = ["RULES", "made", "pointwise"]


def pointwise(call: Call) -> Value:
    """Axes of operands that meet are the same; what all operands have constant is so in the result."""
    shape = tuple(call.result.shape)
    value = Value(_broadcast(call, shape), known=call.known)
    if not call.known:
        value.dim, value.constant = _constant(call, shape)
    return value


def _broadcast(call: Call, shape: tuple[int, ...]) -> list[Axis]:
    axes: list[Axis] = []
    for dim, size in enumerate(shape):
        meeting: list[Axis] = []
        for value, sizes in zip(call.values, call.shapes, strict=True):
            place = dim - len(shape) + len(sizes)
            if place < 0:
                continue
            if sizes[place] == size:
                meeting.append(value.axes[place])
            else:  # 1
                call.channels.pin(value.axes[place])
        axis = meeting[0] if meeting else None
        for other in meeting[1:]:
            axis = call.channels.same(axis, other)
        axes.append(axis)
    return axes


def _constant(call: Call, shape: tuple[int, ...]) -> tuple[int | None, Tensor | None]:
    """The dimension along which the result has constants, and these."""
    varying = [value for value in call.values if not value.known]
    dims = {
        value.dim - value_dims
        for value, value_dims in ((v, len(v.axes)) for v in varying)
        if value.constant is not None and value.dim is not None
    }
    if len(dims) != 1 or not call.result.is_floating_point():
        return None, None
    dim = dims.pop() + len(shape)
    vectors = [_vector(call, i, dim - len(shape)) for i in range(len(call.values))]
    if any(vector is None for vector in vectors):
        return None, None
    known = iter(vectors)
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda _: next(known).expand(shape[dim]).clone(), (call.args, dict(call.kwargs))
    )
    if "out" in kwargs:
        return None, None
    constant = call.func(*args, **kwargs).to(torch.float64)
    nan = torch.zeros(1, dtype=torch.bool)
    zero = nan
    for vector, value in zip(vectors, call.values, strict=True):
        if vector.is_floating_point():
            nan = nan | vector.isnan()
            zero = zero | (vector == 0) if not value.known else zero
    constant = constant.where(~nan, torch.nan)
    if call.name in ("mul", "mul_"):  # by whatever is not constant
        constant = constant.where(~zero, 0.0)
    return dim, constant


def _vector(call: Call, place: int, dim: int) -> Any:
    """An operand's constants along dimension `dim`, counted from the end, NaN where it varies; None: not to be told."""
    value, tensor = call.values[place], call.operands[place]
    if value.known:
        if any(tensor is written for written in call.written):
            return torch.full((1,), torch.nan, dtype=torch.float64)
        return _uniform(tensor, dim)
    if not tensor.is_floating_point():
        return None
    if value.constant is None:
        return torch.full((1,), torch.nan, dtype=torch.float64)
    return value.constant


def _uniform(tensor: Tensor, dim: int) -> Tensor | None:
    """What a tensor has along a dimension, counted from the end, where it is the same along all others."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float64)
    whole = tensor.dim() + dim < 0  # which is broadcast along it
    rows = tensor.reshape(1, -1) if whole else tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
    if rows.shape[1] == 0:
        return None
    first = rows[:, 0]
    if rows.shape[1] == 1:
        return first
    same = (rows == rows[:, :1]).all(1)
    if tensor.is_floating_point():
        return first.where(same, torch.nan)
    return first if same.all() else None


def made(call: Call) -> Value:
    """Tensors of a size that the forward asks for: their channels are whosever they meet."""
    axes: list[Axis] = [call.channels.new(size) for size in call.result.shape]
    blank = call.name in ("empty", "new_empty", "empty_strided", "new_empty_strided")
    random = torch.Tag.nondeterministic_seeded in call.func.tags
    return Value(axes, known=not blank and not random, blank=blank)


def like(call: Call) -> Value:
    """Tensors of another's shape whose values are their own."""
    random = torch.Tag.nondeterministic_seeded in call.func.tags
    blank = call.name == "empty_like"
    return Value(list(call.first.axes), known=not random and not blank, blank=blank)


def drawn(call: Call) -> Value | list[Value]:
    """Random numbers, one an element of the first tensor; for dropout, the mask too."""
    values = [Value(list(call.first.axes)) for _ in call.results]
    first = call.first
    if call.name == "native_dropout" and first.constant is not None:
        values[0].dim, values[0].constant = first.dim, first.constant.where(first.constant == 0, torch.nan)
    return values


def same(call: Call) -> Value:
    """The tensor again."""
    first = call.first
    return Value(
        list(first.axes), first.dim, first.constant, first.known, first.name, first.kept, first.blank
    )


def written_over(call: Call) -> Value:
    """copy_: the first operand becomes the second."""
    _, source = call.values
    shape, sizes = call.shapes
    value = Value(_broadcast(call, shape), known=source.known)
    if source.known:
        return value
    if source.dim is not None and source.constant is not None:
        value.dim = source.dim + len(shape) - len(sizes)
        value.constant = source.constant.expand(shape[value.dim])
    return value


def filled(call: Call) -> Value:
    """The first operand, with one number everywhere."""
    return Value(list(call.first.axes), known=len(call.values) == 1 or call.values[-1].known)


_SAME = ("clone", "_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "positive")
_MADE = (
    *("empty", "new_empty", "empty_strided", "new_empty_strided", "zeros", "new_zeros", "ones", "new_ones"),
    *("full", "new_full", "arange", "linspace", "rand", "randn", "randint", "scalar_tensor", "eye"),
)
_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
_DRAWN = ("bernoulli", "native_dropout", "uniform", "normal", "rrelu_with_noise", "exponential")
_POINTWISE = (  # without torch's tag
    *("hardswish", "_prelu_kernel", "rsub", "floor_divide", "masked_fill"),
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME, same),
    **dict.fromkeys(_MADE, made),
    **dict.fromkeys(_LIKE, like),
    **dict.fromkeys(_DRAWN, drawn),
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(("copy_", "copy"), written_over),
    **dict.fromkeys(("fill", "zero", "fill_", "zero_"), filled),
}
