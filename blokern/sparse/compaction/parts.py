"""Ops that take parts of tensors, join them, and put something around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blokern.sparse.compaction.channels import Axis, Channels
from blokern.sparse.compaction.movement import unknown_moved
from blokern.sparse.compaction.record import Call, Rule, Value

__all__ = ["RULES"]


def _part(value: Value, place: int, part: slice) -> Value:
    """Some of a dimension's channels."""
    axes = list(value.axes)
    axis = axes[place]
    axes[place] = axis if axis is None or part == slice(0, len(axis), 1) else axis[part]
    constant = value.constant
    if constant is not None and value.dim == place:
        constant = constant[part]
    return Value(axes, value.dim, constant, value.known)


def slice_(call: Call) -> Value:
    value, shape = call.first, call.shapes[0]
    place = call["dim"] % len(shape)
    return _part(value, place, _bounds(call, shape[place]))


def _bounds(call: Call, size: int) -> slice:
    start, end, step = slice(call["start"], call["end"], call["step"]).indices(size)
    return slice(start, max(start, end), step)


def slice_scatter(call: Call) -> Value:
    value, source = call.values
    place = call["dim"] % len(value.axes)
    part = _part(value, place, _bounds(call, call.shapes[0][place]))
    for ours, theirs in zip(part.axes, source.axes, strict=True):
        call.channels.same(ours, theirs)
    return Value(list(value.axes), known=call.known)


def select(call: Call) -> Value:
    value = call.first
    place = call["dim"] % len(value.axes)
    call.channels.pin(value.axes[place])  # for the index is a number
    return _without(value, place)


def _without(value: Value, place: int) -> Value:
    axes = [axis for d, axis in enumerate(value.axes) if d != place]
    if value.dim is None or value.dim == place:
        return Value(axes, known=value.known)
    return Value(axes, value.dim - (value.dim > place), value.constant, value.known)


def unbind(call: Call) -> list[Value]:
    value = call.first
    place = call["dim"] % len(value.axes)
    call.channels.pin(value.axes[place])
    return [_without(value, place) for _ in call.results]


def split(call: Call) -> list[Value]:
    place = call.get("dim", 0) % len(call.shapes[0])
    values, start = [], 0
    for part in call.results:
        size = part.shape[place]
        values.append(_part(call.first, place, slice(start, start + size, 1)))
        start += size
    return values


def cat(call: Call) -> Value:
    parts = [
        (v, s) for v, s in zip(call.values, call.shapes, strict=True) if s != (0,)
    ]  # which torch leaves out
    if not parts:
        return unknown_moved(call)
    rank = call.result.dim()
    place = call.get("dim", 0) % rank
    axes = _alike(call.channels, [value.axes for value, _ in parts], but=place)
    if any(value.axes[place] is not None for value, _ in parts):
        whole = []
        for value, shape in parts:
            axis = value.axes[place]
            if axis is None:
                call.channels.pin(axis := call.channels.new(shape[place]))
            whole.append(axis)
        axes[place] = torch.cat(whole)
    dims = {value.dim for value, _ in parts if value.dim is not None and value.constant is not None}
    if len(dims) != 1 or call.known:
        return Value(axes, known=call.known)
    dim = dims.pop()
    assert dim is not None
    constants = [value.along(dim, shape[dim]) for value, shape in parts]
    return Value(axes, dim, torch.cat(constants) if dim == place else _agreed(constants))


def stack(call: Call) -> Value:
    place = call.get("dim", 0) % call.result.dim()
    axes = _alike(call.channels, [value.axes for value in call.values], but=None)
    axes.insert(place, None)
    dims = {value.dim for value in call.values if value.constant is not None}
    if call.known or len(dims) != 1 or (dim := dims.pop()) is None:
        return Value(axes, known=call.known)
    constants = [value.along(dim, shape[dim]) for value, shape in zip(call.values, call.shapes, strict=True)]
    return Value(axes, dim + (dim >= place), _agreed(constants))


def _alike(channels: Channels, parts: Sequence[Sequence[Axis]], but: int | None) -> list[Axis]:
    axes = list(parts[0])
    for other in parts[1:]:
        for d, axis in enumerate(other):
            if d != but:
                axes[d] = channels.same(axes[d], axis)
    if but is not None:
        axes[but] = None
    return axes


def _agreed(constants: Sequence[Tensor]) -> Tensor:
    first = constants[0]
    for other in constants[1:]:
        first = first.where(first == other, torch.nan)
    return first


def pad(call: Call) -> Value:
    """constant_pad_nd: new channels are constants that stay, for the forward says how many."""
    value, shape = call.first, call.shapes[0]
    sizes, fill = list(call["pad"]), call["value"]
    axes, constant = list(value.axes), value.constant
    for i in range(len(sizes) // 2):
        place = len(shape) - 1 - i
        before, after = sizes[2 * i], sizes[2 * i + 1]
        axis = axes[place]
        if (before, after) == (0, 0):
            continue
        if before < 0 or after < 0:
            call.channels.pin(axis)
            axes[place] = None
            constant = None
        elif axis is not None or value.dim == place:
            ends = [call.channels.new(before), call.channels.new(after)]
            for end in ends:
                call.channels.pin(end)
            if axis is not None:
                axes[place] = torch.cat([ends[0], axis, ends[1]])
            if value.dim == place and constant is not None:
                around = [constant.new_full((n,), float(fill)) for n in (before, after)]
                constant = torch.cat([around[0], constant, around[1]])
            elif constant is not None:
                constant = constant.where(constant == fill, torch.nan)
        elif constant is not None:
            constant = constant.where(constant == fill, torch.nan)
    return Value(axes, None if constant is None else value.dim, constant, value.known)


def indexed(call: Call) -> Value:
    """index_select, or index by one tensor of places: these places stay what they are."""
    value = call.first
    if call.name == "index_select":
        place, rank = call["dim"] % len(value.axes), 1
    else:
        given = [(d, index) for d, index in enumerate(call["indices"]) if index is not None]
        if len(given) != 1 or given[0][1].dtype == torch.bool:
            return unknown_moved(call)
        place, rank = given[0][0], given[0][1].dim()
    for other in call.values:
        if other is not value:
            for axis in other.axes:
                call.channels.pin(axis)
    call.channels.pin(value.axes[place])
    axes: list[Axis] = [*value.axes[:place], *[None] * rank, *value.axes[place + 1 :]]
    if value.dim is None or value.dim == place or call.known:
        return Value(axes, known=call.known)
    return Value(axes, value.dim + (rank - 1) * (value.dim > place), value.constant)


def embedding(call: Call) -> Value:
    weight, indices = call.values
    call.channels.pin(weight.axes[0])
    for axis in indices.axes:
        call.channels.pin(axis)
    return Value([*[None] * len(indices.axes), weight.axes[1]], known=call.known)


def windows(call: Call) -> Value:
    """Tensor.unfold: a dimension's windows, and their elements as a last dimension."""
    value = call.first
    place = call["dimension"] % len(value.axes)
    call.channels.pin(value.axes[place])
    axes = [*value.axes, None]
    axes[place] = None
    if value.dim is None or value.dim == place:
        return Value(axes, known=value.known)
    return Value(axes, value.dim, value.constant, value.known)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("slice",), slice_),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk"), split),
    **dict.fromkeys(("index_select", "index"), indexed),
    "slice_scatter": slice_scatter,
    "select": select,
    "unbind": unbind,
    "cat": cat,
    "stack": stack,
    "constant_pad_nd": pad,
    "embedding": embedding,
    "unfold": windows,
}
