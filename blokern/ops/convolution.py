"""Convolution with a masked weight, for the kept entries only: csrc/sparse/conv.h says how.

Where a mask keeps so much, or a batch is so small, that the dense product is faster, torch makes it: as in products.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blokern.ops.definitions import ConvolutionDefinition, dense_arguments, is_transformed, with_definition
from blokern.ops.mask import SparseMask, as_mask, block_of, check_mask
from blokern.ops.masked_weight import mark_masked

__all__ = ["Geometry", "Plan", "conv2d_like", "kept_plan", "masked_conv2d", "plan_of"]


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | SparseMask,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    dense_grad: bool = False,
) -> Tensor:
    """F.conv2d(x, weight ⊙ mask, bias, stride, padding, dilation, groups), for the kept entries only.

    float64, float32, bfloat16 or float16 (sums in float32), one dtype for all. Under a transform of torch.func, and in
    forward mode, it is that very expression in torch's ops.

    x: [N, in, H, W] or [in, H, W]; weight: [out, in/groups, kh, kw]; mask: bool of that shape, or a SparseMask, which
    keeps what a bool mask costs at every call; bias: [out]; padding also "same" (stride 1) or "valid". A masked weight
    may hold anything, NaN too, and its gradient is zero. Samples innermost (strides (1, HWN, WN, N)) is the fastest
    layout on the CPU, channels_last on CUDA, and the result then has it too; else it is contiguous. With dense_grad,
    derivatives are those by w = weight ⊙ mask itself, as in :func:`masked_linear`. Raises ValueError or TypeError,
    naming the argument.

    >>> mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    >>> masked_conv2d(torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 1), 3.0), mask)
    tensor([[[[3., 3.]]]])
    """
    mask = as_mask(mask)
    if weight.dim() != 4:
        raise ValueError(f"weight must be [out, in/groups, kh, kw], got shape {tuple(weight.shape)}")
    check_mask(mask, weight, "weight")
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [N, in, H, W] or [in, H, W], got shape {tuple(x.shape)}")
    shape = Geometry.of(x, weight, stride, padding, dilation, groups)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    y: Tensor
    if is_transformed():
        definition = ConvolutionDefinition(mask.words, shape.how)
        y = definition.forward(images, weight, bias, (shape.rows, *shape.out), dense_grad)
    elif torch.compiler.is_compiling():
        y = torch.ops.blokern.traced_conv2d(images, weight, bias, mask.words, shape.numbers, dense_grad)
    else:
        y = torch.ops.blokern.masked_conv2d(images, weight, bias, *kept_plan(mask, shape), dense_grad)
    return y if x.dim() == 4 else y.squeeze(0)


# Of csrc/sparse/register_conv_cpu.cpp.
_RUN_POSITIONS = 16


class Geometry(NamedTuple):
    """All that a plan depends on besides the mask: sizes and numbers along height and width."""

    rows: int
    channels: int
    groups: int
    taps: tuple[int, int]
    size: tuple[int, int]  # of the input
    out: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]  # zeros above and to the left
    dilation: tuple[int, int]

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry:
        rows, own, *taps = weight.shape
        strides = _pair(stride, "stride", 1)
        dilations = _pair(dilation, "dilation", 1)
        if groups < 1 or rows % groups != 0:
            raise ValueError(f"groups must divide the {rows} output channels, got {groups}")
        if x.shape[-3] != own * groups:
            raise ValueError(
                f"x must have {own * groups} channels, weight's {own} · {groups} groups, got {x.shape[-3]}"
            )
        reach = [d * (k - 1) for d, k in zip(dilations, taps, strict=True)]
        if padding == "same":
            if strides != (1, 1):
                raise ValueError(f'padding="same" needs stride 1, got {strides}')
            before, around = tuple(r // 2 for r in reach), tuple(reach)
        else:
            before = _pair(0 if padding == "valid" else padding, "padding", 0)
            around = tuple(2 * p for p in before)
        size = (x.shape[-2], x.shape[-1])
        out = tuple((n + a - r - 1) // s + 1 for n, a, r, s in zip(size, around, reach, strides, strict=True))
        if min(out) < 1:
            raise ValueError(
                f"x is too small: {tuple(x.shape)} for a kernel of {tuple(taps)} leaves no output"
            )
        return cls(rows, own * groups, groups, tuple(taps), size, out, strides, before, dilations)  # type: ignore[arg-type]

    @property
    def numbers(self) -> list[int]:
        """In a row, as an op takes them."""
        return [n for part in self for n in (part if isinstance(part, tuple) else (part,))]

    @property
    def how(self) -> list[int]:
        """Stride, zeros before, dilation and groups: a Plan's `numbers`."""
        return [*self.stride, *self.before, *self.dilation, self.groups]

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> Geometry:
        """The inverse of `numbers`."""
        return cls(*numbers[:3], *zip(numbers[3::2], numbers[4::2], strict=True))  # type: ignore[arg-type]


class Plan(NamedTuple):
    """A convolution as the ops take it, and (…_t) its gradient by the input, a convolution as well.

    streams: start, source (the entries' places in the weight) and offset (in a tile of the input) of each piece;
    geometry: csrc/sparse/register_conv_cpu.cpp reads it in this order. numbers: stride, zeros before, dilation and
    groups, and words, the mask's, are for dense products.
    """

    streams: list[Tensor]
    streams_t: list[Tensor]
    geometry: list[int]
    geometry_t: list[int]
    numbers: list[int]
    words: Tensor


def kept_plan(mask: SparseMask, shape: Geometry) -> Plan:
    """The plan, which the mask keeps."""
    return mask.cached(("conv2d", shape), lambda: plan_of(mask, shape))


def plan_of(mask: SparseMask, shape: Geometry) -> Plan:
    """The plan, made anew. On CUDA, where products are dense, and for shapes alone, without streams."""
    numbers = shape.how
    if mask.device.type != "cpu":
        sizes = [shape.rows, *shape.out, shape.channels], [shape.channels, *shape.size, shape.rows]
        return Plan([], [], *sizes, numbers, mask.words)
    if shape.taps == (1, 1) and shape.stride == (1, 1) and shape.before == (0, 0):
        # Tiles are runs of pixels, not rows of images.
        run = shape._replace(size=(1, _RUN_POSITIONS), out=(1, _RUN_POSITIONS))
        forward, backward = _forward(mask, run), _backward(mask, run)
        for geometry in (forward[1], backward[1]):
            geometry[1:3] = shape.out
    else:
        forward, backward = _forward(mask, shape), _backward(mask, shape)
    return Plan(forward[0], backward[0], forward[1], backward[1], numbers, mask.words)


def _forward(mask: SparseMask, shape: Geometry) -> tuple[list[Tensor], list[int]]:
    reach = [d * (k - 1) for d, k in zip(shape.dilation, shape.taps, strict=True)]
    height = _tile_height(shape.out[0], reach[0])
    rows, width = (
        (n - 1) * s + r + 1 for n, s, r in zip((height, shape.out[1]), shape.stride, reach, strict=True)
    )
    shifts = _outer(
        [[d * k for k in range(taps)] for d, taps in zip(shape.dilation, shape.taps, strict=True)], width
    )
    _check_offsets(shape.channels, rows, width)
    block = block_of(mask.cols, mask.density)
    entries = _entries(mask, shape, shifts, rows * width, block, transposed=False)
    tiling = [shape.channels, *shape.before, rows, width, height, shape.stride[0]]
    piece = [block, 0, 0, 1, 1, *shape.out, shape.stride[1]]
    return [*entries], [shape.rows, *shape.out, *tiling, *piece]


def _backward(mask: SparseMask, shape: Geometry) -> tuple[list[Tensor], list[int]]:
    """An input position meets only the taps with its remainder by the stride: a piece for each remainder."""
    phases = [[*_phases(shape, axis)] for axis in (0, 1)]
    reads = [[shift for phase in axis for shift in phase.shifts] for axis in phases]
    before = [max([0, *(-shift for shift in axis)]) for axis in reads]
    after = [max([0, *axis]) for axis in reads]
    height = _tile_height(phases[0][0].length, before[0] + after[0])
    rows, width = (b + n + a for b, n, a in zip(before, (height, phases[1][0].length), after, strict=True))
    _check_offsets(shape.rows, rows, width)
    taps = shape.taps[0] * shape.taps[1]
    streams: list[Tensor] = []
    geometry = [shape.channels, *shape.size, shape.rows, *before, rows, width, height, 1]
    for high in phases[0]:
        for wide in phases[1]:
            tap = [h * shape.taps[1] + w for h in high.taps for w in wide.taps]
            shifts = _outer(
                [[s + before[0] for s in high.shifts], [s + before[1] for s in wide.shifts]], width
            )
            block = block_of(shape.rows // shape.groups * taps, mask.density * len(tap) / taps)
            place = [-1] * taps
            for t, shift in zip(tap, shifts, strict=True):
                place[t] = shift
            streams += _entries(mask, shape, place, rows * width, block, transposed=True)
            geometry += [block, high.first, wide.first, *shape.stride, high.length, wide.length, 1]
    return streams, geometry


def _tile_height(height: int, reach: int) -> int:
    """Output rows a tile: its rows of input, `reach` more, are then read at most one and a half times."""
    return min(height, max(4, 2 * reach))


def _check_offsets(channels: int, rows: int, width: int) -> None:
    if channels * rows * width >= 2**31:
        raise ValueError(
            f"x is too large: {channels} channels of {rows} · {width} pixels, the input of a few rows of output, are "
            "2^31 or more"
        )


class _Phase(NamedTuple):
    """Input positions first, first + stride, …, length of them, along one axis, and the taps that reach them: the
    t-th position meets the output's gradient at t + shift."""

    first: int
    length: int
    taps: list[int]
    shifts: list[int]


def _phases(shape: Geometry, axis: int) -> Iterator[_Phase]:
    stride, before, dilation = shape.stride[axis], shape.before[axis], shape.dilation[axis]
    for first in range(min(stride, shape.size[axis])):
        taps = [k for k in range(shape.taps[axis]) if (first + before - k * dilation) % stride == 0]
        shifts = [(first + before - k * dilation) // stride for k in taps]
        yield _Phase(first, (shape.size[axis] - first + stride - 1) // stride, taps, shifts)


def _outer(shifts: list[list[int]], width: int) -> list[int]:
    """Shifts along both axes as one offset each in a plane of this width, a tap each."""
    return [high * width + wide for high in shifts[0] for wide in shifts[1]]


def _entries(
    mask: SparseMask, shape: Geometry, place: list[int], plane: int, block: int, *, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Start, source and offset of the entries whose tap has a place, in a tile's plane of that size."""
    weight = [shape.rows, shape.channels // shape.groups, len(place)]
    entries: tuple[Tensor, Tensor, Tensor] = torch.ops.blokern.conv2d_entries(
        mask.words, weight, shape.groups, place, plane, block, transposed
    )
    return entries


def _pair(value: Any, name: str, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name} must be one or two integers >= {least}, got {value!r}")
    return pair


# ---- Fakes and derivatives: each of the three is the derivative of the other two.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # Last comes dense_grad, or the weight's shape where there is no other gradient to choose.
    *_, streams, streams_t, geometry, geometry_t, numbers, words, ctx.dense_grad = inputs
    ctx.save_for_backward(*inputs[:2], *streams, *streams_t, words)
    ctx.split, ctx.numbers = len(streams), (geometry, geometry_t, numbers)


def _saved(ctx: Any) -> tuple[Tensor, Tensor, Plan]:
    first, second, *streams, words = ctx.saved_tensors
    geometry, geometry_t, numbers = ctx.numbers
    split = ctx.split
    return first, second, Plan(streams[:split], streams[split:], geometry, geometry_t, numbers, words)


def _no_grads(plan: Plan) -> tuple[Any, ...]:
    return [None] * len(plan.streams), [None] * len(plan.streams_t), *[None] * 5


def _by_weight(grad: Tensor, x: Tensor, weight: Tensor, plan: Plan, dense_grad: bool) -> Tensor:
    if not dense_grad:
        product = _weight_op(grad, x, *plan, weight.shape)
        mark_masked(product, plan.words)
        return product
    return _dense_weight_op(grad, x, plan.geometry, weight.shape, plan.numbers)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, plan = _saved(ctx)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dense = ctx.dense_grad
    return (
        _input_op(grad, weight, *plan, dense) if needs_x else None,
        _by_weight(grad, x, weight, plan, dense) if needs_weight else None,
        grad.sum((0, 2, 3)) if needs_bias else None,
        *_no_grads(plan),
    )


def _input_backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    grad, weight, plan = _saved(ctx)
    needs_grad, needs_weight = ctx.needs_input_grad[:2]
    dense = ctx.dense_grad
    return (
        _conv2d_op(cotangent, weight, None, *plan, dense) if needs_grad else None,
        _by_weight(grad, cotangent, weight, plan, dense) if needs_weight else None,
        *_no_grads(plan),
    )


def _weight_backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    grad, x, plan = _saved(ctx)
    needs_grad, needs_x = ctx.needs_input_grad[:2]
    return (
        _conv2d_op(x, cotangent, None, *plan, False) if needs_grad else None,
        _input_op(grad, cotangent, *plan, False) if needs_x else None,
        *_no_grads(plan),
    )


def _save_dense_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, _, ctx.weight_shape, ctx.numbers = inputs
    ctx.save_for_backward(grad, x)


def _dense_weight_backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    grad, x = ctx.saved_tensors
    pad, how = dense_arguments(x.shape, grad.shape, ctx.weight_shape, ctx.numbers)
    padded = torch.nn.functional.pad(x, pad)
    by_grad = by_x = None
    if ctx.needs_input_grad[0]:
        by_grad = torch.ops.aten.convolution(padded, cotangent, None, *how)
    if ctx.needs_input_grad[1]:
        product = torch.ops.aten.convolution_backward(
            grad, padded, cotangent, None, *how, [True, False, False]
        )[0]
        by_x = product.narrow(2, 0, x.shape[2]).narrow(3, 0, x.shape[3])
    return by_grad, by_x, None, None, None


def conv2d_like(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """A result of these sizes, [C, H, W], for x or a gradient that lies like it; not filled."""
    rows, height, width = sizes
    samples = x.shape[0]
    if x.stride(0) == 1 and samples > 1:
        return x.new_empty(*sizes, samples).permute(3, 0, 1, 2)
    if (
        x.device.type == "cuda"
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return x.new_empty(samples, height, width, rows).permute(0, 3, 1, 2)
    return x.new_empty(samples, rows, height, width)


def _fake_entries(
    words: Tensor, weight: list[int], groups: int, place: list[int], plane: int, block: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, own, taps = weight
    size = (groups * own, rows // groups * taps) if transposed else (rows, own * taps)
    start = words.new_empty(-(-size[1] // block) * size[0] + 1, dtype=torch.int32)
    kept = torch.library.get_ctx().new_dynamic_size()
    return start, start.new_empty(kept), start.new_empty(kept)


def _fake_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *plan: Any) -> Tensor:
    return conv2d_like(x, plan[2][:3])


def _fake_input(grad: Tensor, weight: Tensor, *plan: Any) -> Tensor:
    return conv2d_like(grad, plan[3][:3])


def _fake_weight(grad: Tensor, x: Tensor, *plan: Any) -> Tensor:
    return x.new_empty(plan[-1])


def _fake_dense_weight(grad: Tensor, x: Tensor, geometry: list[int], shape: list[int], _: Any) -> Tensor:
    return x.new_empty(shape)


for _name, _fake, _backward_of in (
    ("masked_conv2d", _fake_conv2d, _conv2d_backward),
    ("masked_conv2d_input", _fake_input, _input_backward),
    ("masked_conv2d_weight", _fake_weight, _weight_backward),
):
    torch.library.register_fake(f"blokern::{_name}", _fake)
    torch.library.register_autograd(f"blokern::{_name}", _backward_of, setup_context=_save)
torch.library.register_fake("blokern::conv2d_entries", _fake_entries)
torch.library.register_fake("blokern::conv2d_weight", _fake_dense_weight)
torch.library.register_autograd(
    "blokern::conv2d_weight", _dense_weight_backward, setup_context=_save_dense_weight
)


def _conv2d_defined(x: Tensor, weight: Tensor, bias: Tensor | None, *plan: Any) -> Tensor:
    *_, geometry, _, numbers, words, dense_grad = plan
    return ConvolutionDefinition(words, numbers).forward(x, weight, bias, geometry[:3], dense_grad)


def _input_defined(grad: Tensor, weight: Tensor, *plan: Any) -> Tensor:
    *_, geometry_t, numbers, words, dense_grad = plan
    return ConvolutionDefinition(words, numbers).by_input(grad, weight, geometry_t[:3], dense_grad)


def _weight_defined(grad: Tensor, x: Tensor, *plan: Any) -> Tensor:
    *_, numbers, words, shape = plan
    return ConvolutionDefinition(words, numbers).by_weight(grad, x, shape)


def _dense_weight_defined(
    grad: Tensor, x: Tensor, _: Any, shape: Sequence[int], numbers: Sequence[int]
) -> Tensor:
    return ConvolutionDefinition(None, numbers).by_weight(grad, x, shape)


_conv2d_op = with_definition("masked_conv2d", _conv2d_defined)
_input_op = with_definition("masked_conv2d_input", _input_defined)
_weight_op = with_definition("masked_conv2d_weight", _weight_defined)
_dense_weight_op = with_definition("conv2d_weight", _dense_weight_defined)
