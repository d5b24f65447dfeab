"""Ops that sum up: means and maxima, pooling, normalisation, softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from blokern.sparse.compaction.channels import Axis
from blokern.sparse.compaction.record import Call, Rule, Value

__all__ = ["RULES"]


def reduced(call: Call) -> list[Value]:
    """A dimension that is summed up needs all of its channels."""
    value, shape = call.first, call.shapes[0]
    dims = _dims(call.get("dim"), len(shape))
    keep = call.result.dim() == len(shape) and len(dims) > 0
    axes: list[Axis] = []
    for d, axis in enumerate(value.axes):
        if d in dims:
            call.channels.pin(axis)
        if d not in dims or keep:
            axes.append(None if d in dims else axis)
    found = Value(axes, known=call.known)
    if value.dim is not None and value.dim not in dims and value.constant is not None:
        constant = _summed(call.name, value.constant, math.prod(shape[d] for d in dims))
        if constant is not None:
            found.dim = value.dim if keep else value.dim - sum(d < value.dim for d in dims)
            found.constant = constant
    return [found, *(Value(list(axes), known=call.known) for _ in call.results[1:])]


def _dims(given: Any, rank: int) -> set[int]:
    if given is None or given == []:
        return set(range(rank))
    return {d % rank for d in ([given] if isinstance(given, int) else given)} if rank else set()


def _summed(name: str, constant: Tensor, count: int) -> Tensor | None:
    if name in ("mean", "amax", "amin", "max", "min", "median"):
        return constant
    return constant * count if name == "sum" else None


def mixed(call: Call) -> list[Value]:
    """softmax, cumsum, sort and others whose results along a dimension need all of it."""
    axes = list(call.first.axes)
    place = call.get("dim", -1)
    if axes and isinstance(place, int):
        call.channels.pin(axes[place])
        axes[place] = None
    return [
        Value(list(axes) if tensor.dim() == len(axes) else [None] * tensor.dim(), known=call.known)
        for tensor in call.results
    ]


def gated(call: Call) -> Value:
    """glu: one half of the channels times a gate of the other."""
    value = call.first
    axes = list(value.axes)
    place = call["dim"] % len(axes)
    axis = axes[place]
    if axis is not None:
        half = len(axis) // 2
        axes[place] = call.channels.same(axis[:half], axis[half:])
    if value.dim != place or value.constant is None:
        return Value(axes, known=call.known)
    first, second = value.constant.chunk(2)
    return Value(axes, place, (first * second.sigmoid()).masked_fill(first == 0, 0.0), call.known)


def pooled(call: Call) -> list[Value]:
    """Pooling of the last dimensions, which are no channels: of what is constant, a constant."""
    value = call.first
    outer = next(int(c) for c in call.name if c in "123")
    axes = list(value.axes)
    for place in range(len(axes) - outer, len(axes)):
        call.channels.pin(axes[place])
        axes[place] = None
    found = Value(axes, known=call.known)
    if value.dim is not None and value.dim < len(axes) - outer and value.constant is not None:
        found.dim, found.constant = value.dim, value.constant
        if not _averages_whole(call):
            found.constant = value.constant.where(value.constant == 0, torch.nan)
    return [found, *(Value(list(axes), known=call.known) for _ in call.results[1:])]


def _averages_whole(call: Call) -> bool:
    """Whether no zeros of a padding count in an average."""
    if not call.name.startswith("avg_pool"):
        return True
    pads = any(call["padding"]) and call["count_include_pad"]
    return not pads and call.get("divisor_override") is None


def batch_norm(call: Call) -> list[Value]:
    value = call.value("input")
    assert value is not None
    size = call.shapes[0][1]
    axis = value.axes[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (parameter := call.value(name)) is not None:
            axis = call.channels.same(axis, parameter.axes[0])
    training = bool(call.get("training", call.name.endswith(("_legit", "_with_update"))))
    axes = list(value.axes)
    axes[1] = axis
    if training:  # whatever else has channels is summed up
        for d in range(len(axes)):
            if d != 1:
                call.channels.pin(axes[d])
                axes[d] = None
    found = Value(axes, known=call.known)
    if value.dim == 1 and value.constant is not None:
        found.dim, found.constant = 1, _normalized(call, value.constant, training)
    more = [Value([axis] if tuple(t.shape) == (size,) else [None] * t.dim()) for t in call.results[1:]]
    return [found, *more]


def _normalized(call: Call, constant: Tensor, training: bool) -> Tensor:
    """What BatchNorm in its mode makes of constant channels."""

    if training or call.get("running_mean") is None:
        normalized = torch.zeros_like(constant)  # its own mean
    else:
        eps = call.get("eps", call.get("epsilon"))
        normalized = (constant - _double(call["running_mean"])) * (_double(call["running_var"]) + eps).rsqrt()
    return _affine(call, normalized).where(~constant.isnan(), torch.nan)


def _affine(call: Call, normalized: Tensor) -> Tensor:
    if call["weight"] is not None:
        normalized = normalized * _double(call["weight"])
    if call["bias"] is not None:
        normalized = normalized + _double(call["bias"])
    return normalized


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def group_norm(call: Call) -> list[Value]:
    """Groups go as a whole: the statistics of what stays are its own."""
    value, groups = call.first, call["group"]
    axis = value.axes[1]
    for name in ("weight", "bias"):
        if (parameter := call.value(name)) is not None:
            axis = call.channels.same(axis, parameter.axes[0])
    by_group = None
    if axis is not None:
        rows = axis.view(groups, -1)
        call.channels.same(rows[:, :1].expand_as(rows).flatten(), axis)
        by_group = rows[:, 0].contiguous()
    axes = list(value.axes)
    axes[1] = axis
    found = Value(axes, known=call.known)
    if value.dim == 1 and value.constant is not None:
        found.dim, found.constant = 1, _standardised(call, value.constant.view(groups, -1))
    return [found, *(Value([axes[0], by_group]) for _ in call.results[1:])]


def _standardised(call: Call, constant: Tensor) -> Tensor:
    """What GroupNorm makes of groups all of whose channels are constant; of the others, NaN."""
    variance, mean = torch.var_mean(constant, 1, correction=0, keepdim=True)
    normalized = ((constant - mean) * (variance + call["eps"]).rsqrt()).flatten()
    return _affine(call, normalized)


def layer_norm(call: Call) -> list[Value]:
    value = call.first
    axes = list(value.axes)
    inner = len(call["normalized_shape"])
    for place in range(len(axes) - inner, len(axes)):
        call.channels.pin(axes[place])
        axes[place] = None
    for name in ("weight", "bias"):
        if (parameter := call.value(name)) is not None:
            for axis in parameter.axes:
                call.channels.pin(axis)
    statistics = [
        Value([a if s == n else None for a, s, n in zip(axes, t.shape, call.shapes[0], strict=False)])
        for t in call.results[1:]
    ]
    return [Value(axes, known=call.known), *statistics]


_REDUCED = (
    *("mean", "sum", "amax", "amin", "max", "min", "median", "prod", "var", "std", "var_mean", "std_mean"),
    *("logsumexp", "linalg_vector_norm", "norm", "any", "all", "argmax", "argmin", "nansum"),
)
_MIXED = ("_softmax", "_log_softmax", "cumsum", "cumprod", "cummax", "sort", "topk", "_safe_softmax")
_POOLS = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
)
_BATCH_NORMS = (
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    *("_native_batch_norm_legit_functional", "_batch_norm_with_update", "_batch_norm_no_update"),
    *("cudnn_batch_norm", "miopen_batch_norm"),
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_REDUCED, reduced),
    **dict.fromkeys(_MIXED, mixed),
    **dict.fromkeys(_POOLS, pooled),
    **dict.fromkeys(_BATCH_NORMS, batch_norm),
    "glu": gated,
    "native_group_norm": group_norm,
    "native_layer_norm": layer_norm,
}
