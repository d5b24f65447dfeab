"""A good call of every op that the library has, so that no new one can be forgotten: op_cases.py must call it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from arbitrary import Draw
from hostile import Call, recorded
from op_cases import CASES
from torch import Tensor

import blokern.ops  # noqa: F401  registers them

#: An argument's place in a call, or in a list that is one.
Place = tuple[int, int | None]
#: Draws until all are found, at most; with this seed two are enough.
_DRAWS, _SEED = 30, 27


def names() -> list[str]:
    """As the dispatcher has them, overloads too; without the traced ones, which are Python that calls those."""
    ours = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("blokern::"))
    return sorted(name for name in ours if not name.startswith("blokern::traced_"))


@cache
def calls() -> dict[str, Call]:
    """One call of each op, of tensors of some elements; without those that no case calls."""
    found: dict[str, Call] = {}
    for number in range(_DRAWS):
        for case in CASES:
            for call in recorded(Draw(random.Random(_SEED + number)), case):
                is_ample = all(t.numel() > 3 for _, t in written(call) or tensors(call)[:1])
                if is_ample:
                    found.setdefault(call[0].name(), call)
        if len(found) == len(names()):
            break
    return found


def tensors(call: Call) -> list[tuple[Place, Tensor]]:
    """The call's tensors, those in lists too."""
    return [*_tensors(call[1])]


def written(call: Call) -> list[tuple[Place, Tensor]]:
    """Those that the op writes, as its schema says."""
    is_written = [a.alias_info is not None and a.alias_info.is_write for a in call[0]._schema.arguments]
    return [(place, t) for place, t in tensors(call) if is_written[place[0]]]


def _tensors(args: list[Any]) -> Iterator[tuple[Place, Tensor]]:
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor):
            yield (i, None), arg
        elif isinstance(arg, list | tuple):
            yield from (((i, j), t) for j, t in enumerate(arg) if isinstance(t, Tensor))


def run(call: Call, replaced: dict[Place, Tensor] | None = None) -> list[Tensor]:
    """Call it with some tensors replaced and all others copied; what it returns, and what it has written."""
    func, args = call
    replaced = replaced or {}
    fresh = [_copied(arg) for arg in args]
    for (i, j), t in replaced.items():
        if j is None:
            fresh[i] = t
        else:
            fresh[i][j] = t
    with torch.no_grad():
        result = func(*fresh)
    out = result if isinstance(result, list | tuple) else [] if result is None else [result]
    return [*out, *(t for _, t in written((func, fresh)))]


def same(one: list[Any], two: list[Any]) -> bool:
    """Bit for bit, but for the kinds of NaN."""
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, Tensor) else a == b
        for a, b in zip(one, two, strict=True)
    )


def _copied(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.detach().clone()
    if isinstance(arg, torch.Generator):
        return torch.Generator().manual_seed(3)
    return [_copied(a) for a in arg] if isinstance(arg, list | tuple) else arg
