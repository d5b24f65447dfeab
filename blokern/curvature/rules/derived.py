"""Ops whose rules are torch's own derivatives of them, taken twice: those that are too rare for formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from blokern.curvature.op import Maybe, Op, Rule, add, held, restored

__all__ = ["RULES", "Derived"]

aten = torch.ops.aten


class Derived(Op):
    """y = f(a, b, …), with adjoints by torch.func.vjp; tangents and the adjoints' tangents are vjps of these.

    For ops of which torch has right second derivatives, as the tests find. Each rule runs f again.
    """

    def setup(self, out: Tensor, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        tensors: list[Tensor] = []
        self._args, self.kwargs = held(args, tensors), kwargs
        return tensors

    def _at(self, slots: Sequence[int]) -> tuple[Callable[..., Tensor], list[Tensor]]:
        """f as a function of some slots, and what these have."""
        args = restored(self._args, self.saved)

        def f(*given: Tensor) -> Tensor:
            at = [*args]
            for slot, t in zip(slots, given, strict=True):
                at[slot] = t
            out: Tensor = self.func(*at, **self.kwargs)
            return out

        return f, [args[slot] for slot in slots]

    def tangent(self, *tangents: Maybe) -> Maybe:
        slots = [slot for slot, t in enumerate(tangents) if t is not None]
        f, at = self._at(slots)
        y, pull, *_ = torch.func.vjp(f, *at)
        # pull is linear, and push its transpose; but some pulls know no derivative at zero.
        _, push, *_ = torch.func.vjp(pull, torch.ones_like(y))
        y_dot: Tensor = push(tuple(tangents[slot] for slot in slots))[0]
        return y_dot

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        slots = [slot for slot, want in enumerate(wanted) if want]
        f, at = self._at(slots)
        return self._by_slot(slots, torch.func.vjp(f, *at)[1](grad))

    def adjoint_tangent(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        found: Sequence[Maybe] = [None] * len(wanted)
        if grad is not None and any(t is not None for t in tangents):
            moved = [slot for slot, t in enumerate(tangents) if t is not None]
            slots = sorted({*moved, *(slot for slot, want in enumerate(wanted) if want)})
            f, at = self._at(slots)

            def gradient(*given: Tensor) -> tuple[Tensor, ...]:
                by = torch.func.vjp(f, *given)[1](grad)
                return tuple(by[slots.index(slot)] for slot in moved)

            # The second derivative of ⟨f, g⟩ is symmetric.
            found = self._by_slot(
                slots, torch.func.vjp(gradient, *at)[1](tuple(tangents[slot] for slot in moved))
            )
        pulled = [None] * len(wanted) if grad_dot is None else self.adjoint(grad_dot, wanted)
        return [
            add(bent, moved) if want else None
            for bent, moved, want in zip(found, pulled, wanted, strict=True)
        ]

    def _by_slot(self, slots: Sequence[int], found: Sequence[Tensor]) -> list[Maybe]:
        at = dict(zip(slots, found, strict=True))
        return [at.get(slot) for slot in range(len(self.metas))]


class LoopedDerived(Derived):
    """One whose derivatives cannot be vmapped."""

    loops = True


RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            aten.acos.default,
            aten.acosh.default,
            aten.addcdiv.default,
            aten.addcmul.default,
            aten.addmv.default,
            aten.asin.default,
            aten.asinh.default,
            aten.atan2.default,
            aten.atanh.default,
            aten.clamp.Tensor,
            aten.clamp_max.Tensor,
            aten.clamp_min.Tensor,
            aten.cumprod.default,
            aten.erfc.default,
            aten.exp2.default,
            aten.hypot.default,
            aten.index_add.default,
            aten.index_copy.default,
            aten.index_put.default,
            aten.index_fill.int_Scalar,
            aten.lerp.Scalar,
            aten.lerp.Tensor,
            aten.lgamma.default,
            aten.logaddexp.default,
            aten.logcumsumexp.default,
            aten.logit.default,
            aten.pow.Scalar,
            aten.pow.Tensor_Tensor,
            aten.prod.default,
            aten.prod.dim_int,
            aten.scatter.src,
            aten.scatter.value,
            aten.scatter_add.default,
            aten.soft_margin_loss.default,
            aten._trilinear.default,
        ),
        Derived,
    ),
    **dict.fromkeys((aten.grid_sampler_2d.default, aten.grid_sampler_3d.default), LoopedDerived),
}
