"""Ops that are linear in their tensors: ẏ is the op of ȧ, and the adjoint the op's transpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blokern.curvature.op import Call, Maybe, Meta, Op, Rule, Single, fit, held, restored

__all__ = ["RULES", "Linear", "unaveraged"]

aten = torch.ops.aten


class Linear(Single):
    """y = L a, for an op that is linear in its first argument.

    transpose(g, meta of a, *args) = Lᵀg; None: autograd's, of the op at zero.
    """

    curved = False

    def __init__(self, call: Call, transpose: Callable[..., Tensor] | None = None) -> None:
        self.transpose = transpose
        super().__init__(call)

    def setup(self, out: Tensor, a: Tensor, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        tensors: list[Tensor] = []  # indices and the like
        self._args, self.kwargs = held(args, tensors), kwargs
        return tensors

    @property
    def args(self) -> Sequence[Any]:
        """The arguments after the first."""
        found: Sequence[Any] = restored(self._args, self.saved) if self.saved else self._args
        return found

    def push(self, a_dot: Tensor) -> Tensor:
        out: Tensor = self.func(a_dot, *self.args, **self.kwargs)
        return out

    def pull(self, g: Tensor) -> Tensor:
        if self.transpose is not None:
            return self.transpose(g, self.operand, *self.args, **self.kwargs).to(self.operand.dtype)
        zero = torch.zeros((), dtype=self.operand.dtype, device=g.device).expand(self.operand.shape)
        adjoint: Tensor = torch.func.vjp(self.push, zero)[1](g)[0]
        return adjoint


def _of(transpose: Callable[..., Tensor]) -> Rule:
    return partial(Linear, transpose=transpose)


class Concatenate(Op):
    curved = False

    @staticmethod
    def slots(args: tuple[Any, ...]) -> Sequence[Any]:
        tensors: Sequence[Any] = args[0]
        return tensors

    def setup(self, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Sequence[Tensor]:
        self.dim = dim % out.dim()
        # An empty vector may stand beside tensors of any shape.
        self.sizes = [0 if t.dim() == 1 and out.dim() > 1 else t.shape[self.dim] for t in tensors]
        return ()

    def _parts(self, tangents: Sequence[Maybe]) -> list[Tensor]:
        like = next(t for t in tangents if t is not None)
        shape = list(self.meta.shape)
        parts = []
        for tangent, size in zip(tangents, self.sizes, strict=True):
            shape[self.dim] = size
            parts.append(
                like.new_zeros(shape, dtype=self.meta.dtype)
                if tangent is None
                else tangent.to(self.meta.dtype)
            )
        return parts

    def tangent(self, *tangents: Maybe) -> Maybe:
        return torch.cat(self._parts(tangents), self.dim)

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        parts = torch.split(grad, self.sizes, self.dim)
        return [
            part.reshape(meta.shape).to(meta.dtype) if want and meta is not None else None
            for part, want, meta in zip(parts, wanted, self.metas, strict=True)
        ]


class Stack(Concatenate):
    """stack, as the concatenation of slices of size one."""

    def setup(self, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Sequence[Tensor]:
        self.dim = dim % out.dim()
        self.sizes = [1] * len(tensors)
        return ()

    def _parts(self, tangents: Sequence[Maybe]) -> list[Tensor]:
        return super()._parts([None if t is None else t.unsqueeze(self.dim) for t in tangents])


class Pick(Single):
    """y = a at the indices that an op has found, along a dimension or along the last `folded` ones taken as one."""

    curved = False

    def __init__(self, call: Call, indices: Tensor, dim: int, folded: int = 1) -> None:
        self.indices, self.dim, self.folded = indices, dim, folded
        super().__init__(call)

    def setup(self, out: Tensor, a: Tensor, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        return (self.indices,)

    def settle(self) -> None:
        del self.indices  # saved by now

    def _fold(self, t: Tensor) -> Tensor:
        return t.flatten(-self.folded) if self.folded > 1 else t

    def push(self, a_dot: Tensor) -> Tensor:
        return self._fold(a_dot).gather(self.dim, self._fold(self.saved[0])).reshape(self.meta.shape)

    def pull(self, g: Tensor) -> Tensor:
        (indices,) = self.saved
        zero, grads = self._fold(g.new_zeros(self.operand.shape)), self._fold(g.reshape(indices.shape))
        return zero.scatter_add(self.dim, self._fold(indices), grads).reshape(self.operand.shape)


class Dropout(Single):
    """native_dropout, which says what it has kept."""

    curved = False

    def __init__(self, call: Call) -> None:
        out, self.mask = call.out
        super().__init__(call._replace(out=out))

    def setup(self, out: Tensor, a: Tensor, p: float, train: bool | None) -> Sequence[Tensor]:
        self.scale = 1.0 if train is False else 1.0 / (1.0 - p) if p < 1 else 0.0
        return (self.mask,)

    def settle(self) -> None:
        del self.mask  # saved by now

    def push(self, a_dot: Tensor) -> Tensor:
        return a_dot * self.saved[0] * self.scale

    def pull(self, g: Tensor) -> Tensor:
        return self.push(g)


def _pooled(call: Call, folded: int) -> Op:
    out, indices = call.out
    return Pick(call._replace(out=out), indices, -1, folded)


def _picked(call: Call, dim_at: int, default: int = -1) -> Op:
    """max.dim and its like; the result may lack the dimension."""
    out, indices = call.out
    dim = call.args[dim_at] if len(call.args) > dim_at else default
    if indices.dim() < call.args[0].dim():
        indices = indices.unsqueeze(dim)
    return Pick(call._replace(out=out), indices, dim)


def _sum_dims(dim: Any, count: int) -> list[int]:
    if dim is None or dim == []:
        return [*range(count)]
    return sorted(d % count for d in ([dim] if isinstance(dim, int) else dim)) if count else []


def _unsummed(g: Tensor, meta: Meta, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if not keepdim:
        for d in _sum_dims(dim, len(meta.shape)):
            g = g.unsqueeze(d)
    return g.expand(meta.shape)


def unaveraged(g: Tensor, meta: Meta, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """The transpose of mean."""
    count = 1
    for d in _sum_dims(dim, len(meta.shape)):
        count *= meta.shape[d]
    return _unsummed(g, meta, dim, keepdim) / count


def _sliced(g: Tensor, meta: Meta, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    size = meta.shape[dim]
    start, end, _ = slice(start, end, step).indices(size)
    out: Tensor = aten.slice_backward(g, meta.shape, dim, start, end, step)
    return out


def _padded(g: Tensor, meta: Meta, pad: Sequence[int], value: float = 0) -> Tensor:
    out: Tensor = aten.constant_pad_nd(g, [-p for p in pad])
    return out


def _blank(g: Tensor, meta: Meta) -> Tensor:
    """In the place of a that a backward op takes for its shape alone."""
    return g.new_empty(meta.shape, dtype=meta.dtype)


def _unexpanded(g: Tensor, meta: Meta, *args: Any, **kwargs: Any) -> Tensor:
    return fit(g, meta)


def _average_pool(backward: Any) -> Rule:
    def transpose(
        g: Tensor,
        meta: Meta,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: Any = None,
    ) -> Tensor:
        how = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        out: Tensor = backward(g, _blank(g, meta), *how)
        return out

    return _of(transpose)


def _adaptive_average_pool(backward: Any) -> Rule:
    return _of(lambda g, meta, size: backward(g, _blank(g, meta)))


class Padding(Linear):
    """constant_pad_nd; the constant has no tangent."""

    def push(self, a_dot: Tensor) -> Tensor:
        out: Tensor = aten.constant_pad_nd(a_dot, self.args[0])
        return out


class Embedding(Single):
    """Rows of a table; linear in the table."""

    curved = False

    def setup(
        self,
        out: Tensor,
        weight: Tensor,
        indices: Tensor,
        padding_idx: int = -1,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Sequence[Tensor]:
        self.how = (weight.shape[0], padding_idx, scale_grad_by_freq)
        return (indices,)

    def push(self, a_dot: Tensor) -> Tensor:
        (indices,), padding_idx = self.saved, self.how[1]
        rows = torch.nn.functional.embedding(indices, a_dot)
        # torch gives the row of padding_idx no gradient; without a tangent either the product is symmetric.
        return rows if padding_idx < 0 else rows.masked_fill((indices == padding_idx).unsqueeze(-1), 0.0)

    def pull(self, g: Tensor) -> Tensor:
        table: Tensor = aten.embedding_dense_backward(g, self.saved[0], *self.how)
        return table


def _embedding(call: Call) -> Op | None:
    """None for gradients that are sparse or scaled by counts."""
    return None if any(call.args[3:]) else Embedding(call)


def _split(call: Call) -> list[Op]:
    """Each part is a slice of its own."""
    dim = call.args[2] if len(call.args) > 2 else 0
    ops: list[Op] = []
    start = 0
    for part in call.out:
        end = start + part.shape[dim]
        ops.append(Linear(Call(aten.slice.Tensor, (call.args[0], dim, start, end), {}, part), _sliced))
        start = end
    return ops


def _unbind(call: Call) -> list[Op]:
    dim = call.args[1] if len(call.args) > 1 else 0
    return [
        Linear(Call(aten.select.int, (call.args[0], dim, index), {}, part), _selected)
        for index, part in enumerate(call.out)
    ]


def _selected(g: Tensor, meta: Meta, dim: int, index: int) -> Tensor:
    out: Tensor = aten.select_backward(g, meta.shape, dim, index)
    return out


RULES: dict[Any, Rule] = {
    aten.expand.default: _of(_unexpanded),
    aten.slice.Tensor: _of(_sliced),
    aten.select.int: _of(_selected),
    aten.sum.default: _of(_unsummed),
    aten.sum.dim_IntList: _of(_unsummed),
    aten.mean.default: _of(unaveraged),
    aten.mean.dim: _of(unaveraged),
    aten.avg_pool2d.default: _average_pool(aten.avg_pool2d_backward),
    aten.avg_pool3d.default: _average_pool(aten.avg_pool3d_backward),
    aten._adaptive_avg_pool2d.default: _adaptive_average_pool(aten._adaptive_avg_pool2d_backward),
    aten._adaptive_avg_pool3d.default: _adaptive_average_pool(aten._adaptive_avg_pool3d_backward),
    aten.max_pool2d_with_indices.default: partial(_pooled, folded=2),
    aten.max_pool3d_with_indices.default: partial(_pooled, folded=3),
    aten.adaptive_max_pool2d.default: partial(_pooled, folded=2),
    aten.adaptive_max_pool3d.default: partial(_pooled, folded=3),
    aten.max.dim: partial(_picked, dim_at=1),
    aten.min.dim: partial(_picked, dim_at=1),
    aten.sort.default: partial(_picked, dim_at=1),
    aten.topk.default: partial(_picked, dim_at=2),
    aten.cummax.default: partial(_picked, dim_at=1),
    aten.cummin.default: partial(_picked, dim_at=1),
    aten.kthvalue.default: partial(_picked, dim_at=2),
    aten.median.dim: partial(_picked, dim_at=1),
    aten.native_dropout.default: Dropout,
    aten.constant_pad_nd.default: partial(Padding, transpose=_padded),
    aten.cat.default: Concatenate,
    aten.stack.default: Stack,
    aten.split.Tensor: _split,
    aten.unsafe_split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten.embedding.default: _embedding,
    **dict.fromkeys(
        (
            aten.index.Tensor,
            aten.index_select.default,
            aten.gather.default,
            aten.roll.default,
            aten.flip.default,
            aten.cumsum.default,
            aten.tril.default,
            aten.triu.default,
            aten.diagonal.default,
            aten.repeat.default,
            aten.unfold.default,
            aten.im2col.default,
            aten.col2im.default,
            aten.pixel_shuffle.default,
            aten.pixel_unshuffle.default,
            aten.channel_shuffle.default,
            aten.affine_grid_generator.default,
            aten.max_unpool2d.default,
            aten.max_unpool3d.default,
            aten.reflection_pad1d.default,
            aten.reflection_pad2d.default,
            aten.reflection_pad3d.default,
            aten.replication_pad1d.default,
            aten.replication_pad2d.default,
            aten.replication_pad3d.default,
            aten.upsample_nearest1d.default,
            aten.upsample_nearest2d.default,
            aten.upsample_nearest3d.default,
            aten._upsample_nearest_exact1d.default,
            aten._upsample_nearest_exact2d.default,
            aten._upsample_nearest_exact3d.default,
            aten.upsample_linear1d.default,
            aten.upsample_bilinear2d.default,
            aten._upsample_bilinear2d_aa.default,
            aten.upsample_trilinear3d.default,
            aten.upsample_bicubic2d.default,
            aten._upsample_bicubic2d_aa.default,
        ),
        Linear,
    ),
}
