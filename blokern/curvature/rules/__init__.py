"""The table: every op that a tape can hold, and its rules."""

from typing import Any

from blokern.curvature.op import Rule
from blokern.curvature.rules import (
    derived,
    elementwise,
    linear,
    losses,
    normalization,
    pairs,
    products,
    reductions,
    softmax,
    sparse,
    views,
)

__all__ = ["RULES"]

#: From an op, as the dispatcher names it, to what makes its entry on the tape.
RULES: dict[Any, Rule] = {
    **derived.RULES,
    **elementwise.RULES,
    **linear.RULES,
    **losses.RULES,
    **normalization.RULES,
    **pairs.RULES,
    **products.RULES,
    **reductions.RULES,
    **softmax.RULES,
    **sparse.RULES,
    **views.RULES,
}
