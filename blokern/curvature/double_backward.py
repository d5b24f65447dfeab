"""The products by autograd's own graph of the forward pass: where there is no tape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blokern.curvature.op import Maybe

__all__ = ["DoubleBackward"]


class DoubleBackward:
    """`TapeProducts` by differentiating twice.

    Several vectors are one product each; nothing is freed before the last.
    """

    def __init__(
        self, loss: Tensor, outputs: Sequence[Tensor], parameters: dict[str, Tensor], x: Maybe
    ) -> None:
        self._loss = loss
        self._outputs = [t for t in outputs if t.requires_grad]
        self._parameters = parameters
        self._x = x
        self._gradients: dict[str, tuple[Maybe, ...]] = {}

    def input_gradient(self) -> Maybe:
        if self._x is None:
            return None
        (grad,) = self._gradient("x", [self._x])
        return None if grad is None else grad.detach()

    def hvp(self, v: dict[str, Tensor], keep: bool, stack: bool) -> dict[str, Tensor]:
        gradient = self._gradient("parameters", self._leaves())
        return self._by_parameters(gradient, [v[name] for name in self._parameters], stack)

    def mixed_hvp(self, u: Tensor, keep: bool, stack: bool) -> dict[str, Tensor]:
        assert self._x is not None
        return self._by_parameters(self._gradient("x", [self._x]), [u], stack)

    def mixed_hvp_transpose(self, v: dict[str, Tensor], keep: bool, stack: bool) -> Maybe:
        assert self._x is not None
        gradient = self._gradient("parameters", self._leaves())
        (found,) = _products(gradient, [self._x], [v[name] for name in self._parameters], stack)
        return found

    def ggnvp(self, v: dict[str, Tensor], keep: bool, stack: bool) -> dict[str, Tensor]:
        if not self._outputs:
            return {}
        # Jw is linear in w, so its derivative along v is Jᵀ's transpose: the product J v.
        probes = [torch.zeros_like(t, requires_grad=True) for t in self._outputs]
        pulled = _grad(self._outputs, self._leaves(), probes, create_graph=True)
        pushed = _products(pulled, probes, [v[name] for name in self._parameters], stack)
        by_outputs = _grad([self._loss], self._outputs, None, create_graph=True)
        curved = _products(by_outputs, self._outputs, pushed, stack)
        return self._by_parameters(self._outputs, curved, stack)

    def _leaves(self) -> list[Tensor]:
        return [*self._parameters.values()]

    def _gradient(self, name: str, leaves: Sequence[Tensor]) -> tuple[Maybe, ...]:
        if name not in self._gradients:
            self._gradients[name] = _grad([self._loss], leaves, None, create_graph=True)
        return self._gradients[name]

    def _by_parameters(self, of: Sequence[Maybe], along: Sequence[Maybe], stack: bool) -> dict[str, Tensor]:
        found = _products(of, self._leaves(), along, stack)
        return {name: t for name, t in zip(self._parameters, found, strict=True) if t is not None}


def _grad(
    of: Sequence[Tensor], by: Sequence[Tensor], along: Sequence[Tensor] | None, create_graph: bool = False
) -> tuple[Maybe, ...]:
    """torch.autograd.grad that takes nothing for granted and frees nothing."""
    with torch.enable_grad(), torch.autocast(by[0].device.type, enabled=False):
        return torch.autograd.grad(
            of, by, along, create_graph=create_graph, retain_graph=True, allow_unused=True
        )


def _products(of: Sequence[Maybe], by: Sequence[Tensor], along: Sequence[Maybe], stack: bool) -> list[Maybe]:
    """The gradients by `by` of ⟨of, along⟩, for each element of a stack if it is one."""
    pairs = [
        (t, a) for t, a in zip(of, along, strict=True) if t is not None and a is not None and t.requires_grad
    ]
    if not pairs or not by:
        return [None] * len(by)
    if not stack:
        return [*_grad([t for t, _ in pairs], by, [a.to(t.dtype) for t, a in pairs])]
    differentiated = [t for t, _ in pairs]
    each = [_products(differentiated, by, [a[i] for _, a in pairs], False) for i in range(len(pairs[0][1]))]
    found = [[t for t in parts if t is not None] for parts in zip(*each, strict=True)]
    return [torch.stack(parts) if parts else None for parts in found]
