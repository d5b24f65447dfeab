"""Which rule an op has."""

from __future__ import annotations

import torch

from blokern.sparse.compaction import elementwise, movement, parts, products, reductions
from blokern.sparse.compaction.record import Call, Rule, Value

__all__ = ["rule_of"]

_RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **movement.RULES,
    **parts.RULES,
    **products.RULES,
    **reductions.RULES,
}


def rule_of(call: Call) -> Rule:
    """The rule of an op by its name, in place or not; for ops without one, all that they touch stays."""
    for name in (call.name, call.name.removesuffix("_"), call.name.removesuffix("_copy")):
        if name in _RULES:
            return _RULES[name]
    if torch.Tag.pointwise in call.func.tags and len(call.results) == 1:
        return elementwise.pointwise
    return unknown


def unknown(call: Call) -> list[Value]:
    call.pin_all()
    random = torch.Tag.nondeterministic_seeded in call.func.tags
    return [Value([None] * tensor.dim(), known=call.known and not random) for tensor in call.results]
