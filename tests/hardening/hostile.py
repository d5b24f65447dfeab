"""Calls that no caller makes: the arguments that an op gets inside a good call, a few of them replaced. It must work or
refuse; what it must not do, read or write out of bounds, is for the sanitizers to see (`make sanitize`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from arbitrary import FLOATS, Draw
from op_cases import CASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: What a refusal is; RuntimeError is torch's own, for a type that no schema knows, or memory that there is not.
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError)

Call = tuple[Callable[..., Any], list[Any]]


class Recorder(TorchDispatchMode):
    """Notes the calls of blokern's ops, the derivatives' too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "blokern":
            given = {
                **dict(zip((a.name for a in func._schema.arguments), args, strict=False)),
                **(kwargs or {}),
            }
            defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
            names = [a.name for a in func._schema.arguments]
            self.calls.append((func, [{**defaults, **given}[name] for name in names]))
        return func(*args, **(kwargs or {}))


def recorded(draw: Draw, case: str) -> list[Call]:
    with Recorder() as recorder:
        CASES[case](draw)
    return recorder.calls


def other_tensor(draw: Draw, t: Tensor) -> Any:
    """Like t, but for one thing or all."""
    kind = draw.source.randrange(10)
    if kind == 0:
        return None
    if kind == 1:  # another type
        return t.to(draw.one_of([*FLOATS, torch.int64, torch.int32, torch.bool]))
    if kind == 2 and t.dim():  # another size
        dim = draw.source.randrange(t.dim())
        shape = [*t.shape]
        shape[dim] = max(0, draw.one_of((0, 1, shape[dim] - 1, shape[dim] + 1, 2 * shape[dim], 65)))
        return t.new_zeros(shape)
    if kind == 3:  # another number of dimensions
        return draw.one_of((t.flatten(), t.unsqueeze(0), t.new_zeros(()), t.new_zeros(0)))
    if kind == 4 and t.dim():  # one place for many elements
        return t[:1].expand(t.shape) if len(t) else t
    if kind == 5 and t.numel():  # windows that overlap
        return torch.as_strided(t.flatten(), t.shape, [1] * t.dim()) if sum(t.shape) <= t.numel() else t
    if kind == 6:  # not contiguous
        return torch.stack([t, t], -1)[..., 0]
    if kind == 7 and t.dim() > 1:
        return t.transpose(0, 1)
    if t.is_floating_point():
        return draw.specials(t.shape, t.dtype)
    info = (0, 1) if t.dtype == torch.bool else (torch.iinfo(t.dtype).min, torch.iinfo(t.dtype).max)
    low, high = draw.one_of((info, (-3, 70), (0, 2)))
    new = torch.randint(max(low, info[0]), min(high, info[1]), t.shape, generator=draw.generator).to(t.dtype)
    if draw.chance(0.5):  # only one element
        index, flat = draw.source.randrange(max(1, t.numel())), t.clone().flatten()
        flat[index : index + 1] = new.flatten()[index : index + 1]
        return flat.view(t.shape)
    return new


def other_number(draw: Draw, value: float) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        near = (value - 1, value + 1, 2 * value, -value, value // 2)
        return draw.one_of((*near, 0, 1, -1, 3, 64, 100, 5000, 2**31, 2**40, 2**62, -(2**62)))
    return draw.one_of((0.0, -1.0, 2.0, 1e300, float("nan"), float("inf"), -float("inf")))


def replaced(draw: Draw, value: Any) -> Any:
    if isinstance(value, Tensor):
        return other_tensor(draw, value)
    if isinstance(value, list | tuple):
        new = list(value)
        kind = draw.source.randrange(6)
        if not new or kind == 0:
            return []
        index = draw.source.randrange(len(new))
        if kind == 1:
            del new[index]
        elif kind == 2:
            new.insert(index, new[index])
        else:
            new[index] = replaced(draw, new[index])
        return new
    if isinstance(value, int | float):
        return other_number(draw, value)
    return value


def attack(draw: Draw, call: Call) -> None:
    """One hostile variant of a call."""
    func, args = call
    args = list(args)
    tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    for _ in range(draw.one_of((1, 1, 1, 2, 3))):
        index = draw.source.randrange(len(args))
        if len(tensors) > 1 and draw.chance(0.1):  # an argument twice, or a part of another
            other = args[draw.one_of(tensors)]
            args[index] = draw.one_of(
                (other, other[1:] if isinstance(other, Tensor) and other.dim() else other)
            )
        else:
            args[index] = replaced(draw, args[index])
    refusal = ""
    try:
        with torch.no_grad():
            func(*args)
    except REFUSALS as error:
        refusal = str(error)
    assert "INTERNAL ASSERT" not in refusal, refusal
