"""Ops that lay elements out anew: views, repetition, resizing, reordering."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blokern.sparse.compaction.channels import Axis, Channels
from blokern.sparse.compaction.record import Call, Rule, Value

__all__ = ["RULES", "unknown_moved"]


def _moved(call: Call, value: Value, axes: Sequence[Axis], dim: int | None, constant: Tensor | None) -> Value:
    """The value after an op that moves its elements, of which the mask's move alike."""
    kept = None
    if value.kept is not None:
        args = [value.kept if arg is call.operands[0] else arg for arg in call.args]
        kept = call.func(*args, **call.kwargs)
    return Value(
        list(axes), dim, None if dim is None else constant, value.known, value.name, kept, value.blank
    )


def permute(call: Call) -> Value:
    value, rank = call.first, len(call.shapes[0])
    if call.name in ("t", "t_"):
        order = list(range(rank))[::-1]
    elif call.name in ("transpose", "transpose_"):
        order = list(range(rank))
        a, b = call["dim0"] % rank, call["dim1"] % rank
        order[a], order[b] = order[b], order[a]
    else:
        order = [d % rank for d in call["dims"]]
    dim = None if value.dim is None else order.index(value.dim)
    return _moved(call, value, [value.axes[d] for d in order], dim, value.constant)


def view(call: Call) -> Value:
    """Dimensions split and merge in blocks of as many elements; each is read for itself."""
    value, old, new = call.first, call.shapes[0], tuple(call.result.shape)
    if 0 in old or call.result.dtype != call.operands[0].dtype or (value.kept is not None and call.written):
        return unknown_moved(call)
    axes: list[Axis] = [None] * len(new)
    dim: int | None = None
    constant: Tensor | None = None
    for before, after in _blocks(old, new):
        found = _block(call.channels, value, old, before, [new[d] for d in after])
        for place, axis in zip(after, found.axes, strict=True):
            axes[place] = axis
        if found.dim is not None:
            dim, constant = after[found.dim], found.constant
    return _moved(call, value, axes, dim, constant)


def unknown_moved(call: Call) -> Value:
    call.pin_all()
    return Value([None] * call.result.dim(), known=call.known)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which dimensions become which: the finest runs of as many elements."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = [], []
        left = right = 1
        if i < len(old):
            before.append(i)
            left, i = old[i], i + 1
        if j < len(new) and (left != 1 or new[j] == 1 or not before):
            after.append(j)
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                before.append(i)
                left, i = left * old[i], i + 1
            else:
                after.append(j)
                right, j = right * new[j], j + 1
        blocks.append((before, after))
    return blocks


def _block(
    channels: Channels, value: Value, old: Sequence[int], before: Sequence[int], new: Sequence[int]
) -> Value:
    """What becomes of some dimensions of a value whose elements are laid out anew."""
    nothing = Value([None] * len(new))
    named = [d for d in before if old[d] > 1 and (value.axes[d] is not None or d == value.dim)]
    if len(named) != 1:
        for d in named:
            channels.pin(value.axes[d])
        if not named and len(before) == len(new) == 1:  # of size 1
            return Value([value.axes[before[0]]])
        return nothing
    source = named[0]
    if sum(size > 1 for size in new) == 1:
        place = next(i for i, size in enumerate(new) if size > 1)
        if new[place] == old[source]:  # with dimensions of size 1, that come or go
            moved = Value(list(nothing.axes), place if value.dim == source else None, value.constant)
            moved.axes[place] = value.axes[source]
            return moved
    inner = math.prod(old[d] for d in before if d > source)
    outer = math.prod(old[d] for d in before if d < source)
    axis = value.axes[source]
    constant = value.constant if value.dim == source else None
    numbers = _laid_out(torch.arange(old[source]) if axis is None else axis, outer, inner, new)
    place = _varying(numbers, new)
    found = Value(list(nothing.axes))
    rows = numbers.movedim(place, 0).reshape(new[place], -1)
    if axis is not None:
        first = rows[:, 0].contiguous()
        different = rows != first.unsqueeze(1)
        if different.any():  # a dimension split: what all its parts have alike may go
            channels.same(first.unsqueeze(1).expand_as(rows)[different], rows[different])
        found.axes[place] = first
    if constant is not None:
        parts = _laid_out(constant, outer, inner, new).movedim(place, 0).reshape(new[place], -1)
        found.dim = place
        found.constant = parts[:, 0].where((parts == parts[:, :1]).all(1), torch.nan)
    return found


def _laid_out(entries: Tensor, outer: int, inner: int, new: Sequence[int]) -> Tensor:
    return entries.view(1, -1, 1).expand(outer, -1, inner).reshape(*new)


def _varying(numbers: Tensor, sizes: Sequence[int]) -> int:
    """The dimension along which alone they differ; the last of size above 1 if there are several."""
    places = [i for i, size in enumerate(sizes) if size > 1]
    for place in places:
        rows = numbers.movedim(place, 0).reshape(sizes[place], -1)
        if (rows == rows[:, :1]).all():
            return place
    return places[-1] if places else 0


def unsqueeze(call: Call) -> Value:
    value, rank = call.first, len(call.shapes[0])
    place = call["dim"] % (rank + 1)
    axes = [*value.axes[:place], None, *value.axes[place:]]
    dim = value.dim if value.dim is None or value.dim < place else value.dim + 1
    return _moved(call, value, axes, dim, value.constant)


def squeeze(call: Call) -> Value:
    value, shape = call.first, call.shapes[0]
    given = call.get("dim")
    asked = range(len(shape)) if given is None else [given] if isinstance(given, int) else given
    gone = {d % len(shape) for d in asked if shape and shape[d] == 1}
    stay = [d for d in range(len(shape)) if d not in gone]
    dim = stay.index(value.dim) if value.dim in stay else None
    return _moved(call, value, [value.axes[d] for d in stay], dim, value.constant)


def expand(call: Call) -> Value:
    value, old, new = call.first, call.shapes[0], call.result.shape
    more = len(new) - len(old)
    axes: list[Axis] = [None] * more
    for axis, size, wanted in zip(value.axes, old, new[more:], strict=True):
        if size != wanted:
            call.channels.pin(axis)
        axes.append(axis if size == wanted else None)
    dim = None if value.dim is None else value.dim + more
    constant = value.constant
    if dim is not None and constant is not None:
        constant = constant.expand(new[dim]).contiguous()
    return _moved(call, value, axes, dim, constant)


def repeat(call: Call) -> Value:
    value, times = call.first, list(call["repeats"])
    more = len(times) - len(value.axes)
    axes: list[Axis] = [None] * more
    axes += [a if a is None else a.repeat(n) for a, n in zip(value.axes, times[more:], strict=True)]
    dim = None if value.dim is None else value.dim + more
    constant = None if value.constant is None or dim is None else value.constant.repeat(times[dim])
    return Value(axes, dim, constant, value.known)


def repeat_interleave(call: Call) -> Value:
    value, times, place = call.first, call.get("repeats"), call.get("dim")
    if not isinstance(times, int) or place is None:
        return unknown_moved(call)
    place %= len(value.axes)
    axes = list(value.axes)
    axes[place] = None if axes[place] is None else axes[place].repeat_interleave(times)
    constant = value.constant
    if constant is not None and value.dim == place:
        constant = constant.repeat_interleave(times)
    return Value(axes, value.dim, constant, value.known)


def framed(call: Call) -> Value:
    """Padding that repeats what is there, and resizing: of the last dimensions, which are no channels."""
    value = call.first
    outer = {"1": 1, "2": 2, "3": 3}[next(c for c in call.name if c in "123")]
    axes = list(value.axes)
    for place in range(len(axes) - outer, len(axes)):
        call.channels.pin(axes[place])
        axes[place] = None
    if value.dim is not None and value.dim >= len(axes) - outer:
        return Value(axes, known=value.known)
    return Value(axes, value.dim, value.constant, value.known)


def reordered(call: Call) -> Value:
    """flip and roll: what moves among the places of a dimension must find them all."""
    value = call.first
    axes = list(value.axes)
    dims = [d % len(axes) for d in call["dims"]] or range(len(axes))
    for d in dims:
        call.channels.pin(axes[d])
        axes[d] = None
    if value.dim in dims:
        return Value(axes, known=value.known)
    return replace(value, axes=axes, name=None, kept=None)


def pixel_shuffle(call: Call) -> Value:
    value, block = call.first, call["upscale_factor"] ** 2
    place = len(value.axes) - 3
    axes = [*value.axes[:place], None, None, None]
    for d in (place + 1, place + 2):
        call.channels.pin(value.axes[d])
    axis = value.axes[place]
    if axis is not None:
        rows = axis.view(-1, block)
        call.channels.same(rows[:, :1].expand_as(rows).flatten(), axis)
        axes[place] = rows[:, 0].contiguous()
    if value.dim != place or value.constant is None:
        return Value(axes, known=value.known)
    parts = value.constant.view(-1, block)
    return Value(axes, place, parts[:, 0].where((parts == parts[:, :1]).all(1), torch.nan), value.known)


def pixel_unshuffle(call: Call) -> Value:
    value, block = call.first, call["downscale_factor"] ** 2
    place = len(value.axes) - 3
    axes = [*value.axes[:place], None, None, None]
    for d in (place + 1, place + 2):
        call.channels.pin(value.axes[d])
    axis = value.axes[place]
    axes[place] = None if axis is None else axis.repeat_interleave(block)
    if value.dim != place or value.constant is None:
        return Value(axes, known=value.known)
    return Value(axes, place, value.constant.repeat_interleave(block), value.known)


def shuffled(call: Call) -> Value:
    """channel_shuffle: groups lose the same channels."""
    value, groups = call.first, call["groups"]
    axis = value.axes[1]
    if axis is None:
        return Value(list(value.axes), known=value.known)
    rows = axis.view(groups, -1)
    call.channels.same(rows[:1].expand_as(rows).flatten(), axis)
    axes = list(value.axes)
    axes[1] = rows.t().flatten()
    if value.dim != 1 or value.constant is None:
        return Value(axes, known=value.known)
    return Value(axes, 1, value.constant.view(groups, -1).t().flatten(), value.known)


def patches(call: Call) -> Value:
    """im2col: [N, C, H, W] → [N, C · taps, L]."""
    value = call.first
    if len(value.axes) != 4:
        return unknown_moved(call)
    taps = math.prod(call["kernel_size"])
    for axis in value.axes[2:]:
        call.channels.pin(axis)
    axis = value.axes[1]
    axes = [value.axes[0], None if axis is None else axis.repeat_interleave(taps), None]
    if value.dim != 1 or value.constant is None:
        return Value(axes, known=value.known)
    constant = value.constant.where(value.constant == 0, torch.nan)
    return Value(axes, 1, constant.repeat_interleave(taps), value.known)


_RESIZED = (
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d"),
    *("_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d"),
    *("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
_PADDED = tuple(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3))

RULES: dict[str, Rule] = {
    **dict.fromkeys(("permute", "t", "transpose"), permute),
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "_reshape_copy", "reshape"), view),
    **dict.fromkeys(("unsqueeze",), unsqueeze),
    **dict.fromkeys(("squeeze",), squeeze),
    **dict.fromkeys((*_RESIZED, *_PADDED), framed),
    **dict.fromkeys(("flip", "roll"), reordered),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), shuffled),
    "expand": expand,
    "repeat": repeat,
    "repeat_interleave": repeat_interleave,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "im2col": patches,
}
