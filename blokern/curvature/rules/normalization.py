"""Batch, layer and group normalisation.

x̂ = r (x − μ) with μ = ⟨x⟩ and r = (⟨(x − μ)²⟩ + ε)^−½, ⟨·⟩ the mean over a group; y = γ x̂ + β. With the projection
P a = a − ⟨a⟩ − x̂⟨x̂ a⟩ and h = γ g:

    x̂̇ = r Pẋ,  ẏ = γ x̂̇ + γ̇ x̂ + β̇
    adjoint of x: r P h;  of γ: Σ g x̂;  of β: Σ g
    their tangents: r (P ḣ − r⟨x̂ ẋ⟩ P h − x̂̇⟨x̂ h⟩ − x̂⟨x̂̇ h⟩) with ḣ = γ ġ + γ̇ g;  Σ (ġ x̂ + g x̂̇);  Σ ġ

Batch normalisation in eval mode has μ and r constant: P is then the identity, and what P's own tangent adds is gone.
On the CPU and on CUDA this is done by kernels, of stacks too; elsewhere in plain torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blokern import ops
from blokern.curvature.op import Call, Maybe, Op, Rule, add, wide
from blokern.ops.curvature import has_kernels

__all__ = ["RULES"]

aten = torch.ops.aten

Slots = Sequence[Maybe]


class Normalization(Op):
    """What the three have in common. A subclass says what x looks like by groups, and where γ and β lie in it."""

    #: Whether μ and r are those of x.
    own_statistics = True
    #: x as reduced over `dims` for statistics, and over `weight_dims` for the weight's gradient.
    view: Sequence[int]
    dims: list[int]
    weight_view: Sequence[int]
    weight_dims: list[int]
    statistics_view: Sequence[int]

    def __init__(self, call: Call) -> None:
        out, self.mean, self.rstd = call.out
        super().__init__(call._replace(out=out))

    @staticmethod
    def slots(args: tuple[Any, ...]) -> Sequence[Any]:
        """x, γ and β."""
        return args[:3]

    def settle(self) -> None:
        del self.mean, self.rstd  # saved by now

    def saves(self, x: Tensor, weight: Maybe, bias: Maybe) -> Sequence[Tensor]:
        if weight is None and bias is not None:  # which all know of as the companion of a weight
            weight = torch.ones_like(bias, requires_grad=False)
        self.weighted, self.stacks = weight is not None, has_kernels(x.device)
        return (x, self.mean, self.rstd) if weight is None else (x, self.mean, self.rstd, weight)

    def statistics(self) -> tuple[Tensor, Tensor, Tensor, Maybe]:
        """x, μ, r and γ."""
        x, mean, rstd = self.saved[:3]
        return x, mean, rstd, self.saved[3] if self.weighted else None

    @abstractmethod
    def kernel_tangent(self, x_dot: Tensor, weight_dot: Maybe, bias_dot: Maybe) -> Tensor: ...

    @abstractmethod
    def kernel_bars(
        self, grad: Tensor, grad_dot: Tensor, x_dot: Tensor, weight_dot: Maybe, adjoint: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The adjoint of x, if asked for, and the tangents of those of x, γ and β."""

    def tangent(self, *tangents: Maybe) -> Maybe:
        x_dot, weight_dot, bias_dot = tangents[:3]
        if not self.stacks:
            return self._plain_tangent(x_dot, weight_dot, bias_dot)
        if x_dot is None:
            x_dot = _zeros(
                self.saved[0], weight_dot if bias_dot is None else bias_dot, self.metas[1] or self.metas[2]
            )
        return self.kernel_tangent(x_dot, weight_dot, bias_dot)

    def adjoint_tangent(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool]
    ) -> Slots:
        if not self.stacks:
            return self._plain_adjoint_tangent(grad, grad_dot, tangents, wanted)
        return self._bars(grad, grad_dot, tangents, wanted, False)[1]

    def both(
        self,
        grad: Tensor,
        grad_dot: Maybe,
        tangents: Sequence[Maybe],
        inner: Sequence[bool],
        wanted: Sequence[bool],
    ) -> tuple[Slots, Slots]:
        if any(inner[1:]):  # γ or β is itself computed: rare
            return super().both(grad, grad_dot, tangents, inner, wanted)
        return self._bars(grad, grad_dot, tangents, wanted, inner[0])

    def _bars(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool], adjoint: bool
    ) -> tuple[Slots, Slots]:
        x, (x_dot, weight_dot) = self.saved[0], tangents[:2]
        like, meta = next(
            (t, self.metas[slot]) for t, slot in ((x_dot, 0), (grad_dot, 0), (weight_dot, 1)) if t is not None
        )
        x_bar, *bars = self.kernel_bars(
            torch.zeros_like(x) if grad is None else grad,
            _zeros(x, like, meta) if grad_dot is None else grad_dot,
            _zeros(x, like, meta) if x_dot is None else x_dot,
            weight_dot,
            adjoint,
        )
        return (x_bar if adjoint else None, None, None), self.by_slot(bars, wanted)

    def by_slot(self, bars: Sequence[Maybe], wanted: Sequence[bool]) -> Slots:
        """What is wanted of the results for x, γ and β, in its dtype."""
        return [
            bar.to(meta.dtype) if want and bar is not None and meta is not None else None
            for bar, want, meta in zip(bars, wanted, self.metas, strict=False)
        ]

    # ---- In plain torch, for one vector.

    def values(self) -> tuple[Tensor, Tensor, Maybe]:
        """x̂ and r, and γ if there is one, by groups."""
        x, mean, rstd, weight = self.statistics()
        rstd = wide(rstd.reshape(self.statistics_view))
        normal = (wide(x.reshape(self.view)) - wide(mean.reshape(self.statistics_view))) * rstd
        return normal, rstd, self._weight(weight)

    def _grouped(self, t: Maybe) -> Maybe:
        return None if t is None else wide(t.reshape(self.view))

    def _weight(self, t: Maybe) -> Maybe:
        return None if t is None else wide(t.reshape(self.weight_view))

    def project(self, a: Tensor, normal: Tensor) -> Tensor:
        if not self.own_statistics:
            return a
        return a - a.mean(self.dims, keepdim=True) - normal * (normal * a).mean(self.dims, keepdim=True)

    def back(self, t: Maybe, slot: int) -> Maybe:
        """t in the shape and dtype of the slot's tensor."""
        meta = self.metas[slot]
        return None if t is None or meta is None else t.reshape(meta.shape).to(meta.dtype)

    def _plain_tangent(self, x_dot: Maybe, weight_dot: Maybe, bias_dot: Maybe) -> Tensor:
        normal, rstd, weight = self.values()
        x_dot, weight_dot, bias_dot = self._grouped(x_dot), *map(self._weight, (weight_dot, bias_dot))
        normal_dot = None if x_dot is None else rstd * self.project(x_dot, normal)
        if normal_dot is not None and weight is not None:
            normal_dot = weight * normal_dot
        y_dot = add(normal_dot, None if weight_dot is None else weight_dot * normal, bias_dot)
        assert y_dot is not None
        return y_dot.expand(self.view).reshape(self.meta.shape).to(self.meta.dtype)

    def _plain_adjoint_tangent(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool]
    ) -> Slots:
        normal, rstd, weight = self.values()
        g, g_dot = self._grouped(grad), self._grouped(grad_dot)
        x_dot, weight_dot = self._grouped(tangents[0]), self._weight(tangents[1])
        normal_dot = None if x_dot is None else rstd * self.project(x_dot, normal)

        h = None if g is None else g if weight is None else weight * g
        h_dot = add(
            None if g_dot is None else g_dot if weight is None else weight * g_dot,
            None if g is None or weight_dot is None else weight_dot * g,
        )
        by_x = None if h_dot is None else rstd * self.project(h_dot, normal)
        if self.own_statistics and h is not None and x_dot is not None and normal_dot is not None:

            def mean(t: Tensor) -> Tensor:
                return t.mean(self.dims, keepdim=True)

            bent = (
                rstd * mean(normal * x_dot) * self.project(h, normal)
                + normal_dot * mean(normal * h)
                + normal * mean(normal_dot * h)
            )
            by_x = add(by_x, -rstd * bent)
        by_weight = add(
            None if g_dot is None else (g_dot * normal).sum(self.weight_dims),
            None if g is None or normal_dot is None else (g * normal_dot).sum(self.weight_dims),
        )
        by_bias = None if g_dot is None else g_dot.sum(self.weight_dims)
        return self.by_slot([self.back(by_x, 0), self.back(by_weight, 1), self.back(by_bias, 2)], wanted)


def _zeros(x: Tensor, like: Maybe, meta: Any) -> Tensor:
    """In the place of a tangent of x: of a stack if `like`, a tangent of what `meta` describes, is one."""
    assert like is not None
    return x.new_zeros(*like.shape[: like.dim() - len(meta.shape)], *x.shape)


class BatchNorm(Normalization):
    """Batch normalisation, and a ReLU that follows and alone reads its output."""

    def setup(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Sequence[Tensor]:
        self.own_statistics = training
        self.gated = False
        self.view = x.shape
        self.dims = self.weight_dims = [d for d in range(x.dim()) if d != 1]
        self.statistics_view = self.weight_view = [1, x.shape[1], *[1] * (x.dim() - 2)]
        if not training:
            # A later forward pass in train mode changes these where they lie, unseen by version counters.
            assert running_mean is not None
            assert running_var is not None
            self.mean, self.rstd = running_mean.clone(), torch.rsqrt(running_var + eps)
        return self.saves(x, weight, bias)

    def followed_by(self, later: Op, slot: int) -> Op | None:
        if not self.stacks or later.func is not aten.relu.default:
            return None
        self.saved += later.saved
        self.gated = True
        return self

    def _gate(self) -> Maybe:
        return self.saved[-1] if self.gated else None

    def kernel_tangent(self, x_dot: Tensor, weight_dot: Maybe, bias_dot: Maybe) -> Tensor:
        x, mean, rstd, weight = self.statistics()
        how: dict[str, Any] = {"gate": self._gate(), "train": self.own_statistics}
        return ops.batch_norm_tangent(x, x_dot, mean, rstd, weight, weight_dot, bias_dot, **how)

    def kernel_bars(
        self, grad: Tensor, grad_dot: Tensor, x_dot: Tensor, weight_dot: Maybe, adjoint: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, mean, rstd, weight = self.statistics()
        how: dict[str, Any] = {"gate": self._gate(), "train": self.own_statistics, "adjoint": adjoint}
        return ops.batch_norm_adjoint_tangent(grad, grad_dot, x, x_dot, mean, rstd, weight, weight_dot, **how)

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Slots:
        if self.stacks:
            x, mean, rstd, weight = self.statistics()
            how: dict[str, Any] = {"gate": self._gate(), "train": self.own_statistics}
            return self.by_slot(ops.batch_norm_adjoint(grad, x, mean, rstd, weight, **how), wanted)
        g, (normal, rstd, gamma) = wide(grad), self.values()
        by_x = rstd * self.project(g if gamma is None else gamma * g, normal)
        by_weight, by_bias = (g * normal).sum(self.dims), g.sum(self.dims)
        return self.by_slot([self.back(by_x, 0), self.back(by_weight, 1), self.back(by_bias, 2)], wanted)


class RowNorm(Normalization):
    """Normalisation of rows, each a group of its own: what layers and groups of channels are. On rows [M, D] there are
    weights of several kinds, [kinds, D], each row using those of m mod kinds."""

    rows: tuple[int, int]

    @abstractmethod
    def to_kinds(self, t: Tensor) -> Tensor:
        """γ or β, or a stack of their tangents, as the kernels take them."""

    @abstractmethod
    def from_kinds(self, bar: Tensor) -> Tensor:
        """The transpose."""

    def _rows(self, t: Tensor) -> Tensor:
        return t.reshape(*t.shape[: t.dim() - len(self.meta.shape)], *self.rows)

    def _row_statistics(self) -> tuple[Tensor, Tensor, Tensor, Maybe]:
        x, mean, rstd, weight = self.statistics()
        return (
            self._rows(x),
            mean.flatten(),
            rstd.flatten(),
            None if weight is None else self.to_kinds(weight),
        )

    def kernel_tangent(self, x_dot: Tensor, weight_dot: Maybe, bias_dot: Maybe) -> Tensor:
        x, mean, rstd, weight = self._row_statistics()
        dots = [None if t is None else self.to_kinds(t) for t in (weight_dot, bias_dot)]
        return ops.layer_norm_tangent(x, self._rows(x_dot), mean, rstd, weight, *dots).reshape(x_dot.shape)

    def kernel_bars(
        self, grad: Tensor, grad_dot: Tensor, x_dot: Tensor, weight_dot: Maybe, adjoint: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, mean, rstd, weight = self._row_statistics()
        dot = None if weight_dot is None else self.to_kinds(weight_dot)
        g, g_dot, v = map(self._rows, (grad, grad_dot, x_dot))
        x_bar, x_bar_dot, *bars = ops.layer_norm_adjoint_tangent(
            g, g_dot, x, v, mean, rstd, weight, dot, adjoint=adjoint
        )
        own = x_bar.reshape(grad.shape) if adjoint else x_bar
        weight_bar, bias_bar = map(self.from_kinds, bars)
        return own, x_bar_dot.reshape(x_dot.shape), weight_bar, bias_bar

    def wants(self, wanted: Sequence[bool]) -> list[bool]:
        return [want and meta is not None for want, meta in zip(wanted, self.metas, strict=False)]


class LayerNorm(RowNorm):
    @staticmethod
    def slots(args: tuple[Any, ...]) -> Sequence[Any]:
        return args[0], args[2], args[3]

    def setup(
        self,
        out: Tensor,
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Sequence[Tensor]:
        self.shape = tuple(shape)
        inner = torch.Size(shape).numel()
        self.view = self.rows = (x.numel() // max(inner, 1), inner)
        self.dims, self.weight_dims = [1], [0]
        self.statistics_view, self.weight_view = (-1, 1), (1, inner)
        return self.saves(x, weight, bias)

    def to_kinds(self, t: Tensor) -> Tensor:
        return t.reshape(*t.shape[: t.dim() - len(self.shape)], 1, -1)

    def from_kinds(self, bar: Tensor) -> Tensor:
        return bar.reshape(*bar.shape[:-2], *self.shape)

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Slots:
        stack = grad.dim() - len(self.meta.shape)
        if stack:  # each by itself
            return _stacked([self.adjoint(g, wanted) for g in grad])
        x, mean, rstd, gamma = self.statistics()
        want = self.wants(wanted)
        like_bias = gamma if want[2] else None  # lends its shape
        slots: Slots = aten.native_layer_norm_backward(
            grad, x, self.shape, mean, rstd, gamma, like_bias, want
        )
        return slots


class GroupNorm(RowNorm):
    def setup(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        samples: int,
        channels: int,
        pixels: int,
        groups: int,
        eps: float,
    ) -> Sequence[Tensor]:
        self.sizes = (samples, channels, pixels, groups)
        own = channels // groups
        self.view = (samples, groups, own, pixels)
        self.rows = (samples * groups, own * pixels)
        self.dims, self.weight_dims = [2, 3], [0, 3]
        self.statistics_view, self.weight_view = (samples, groups, 1, 1), (1, groups, own, 1)
        return self.saves(x, weight, bias)

    def to_kinds(self, t: Tensor) -> Tensor:
        _, channels, pixels, groups = self.sizes
        by_pixel = t.unsqueeze(-1).expand(*t.shape, pixels)
        return by_pixel.reshape(*t.shape[:-1], groups, channels // groups * pixels)

    def from_kinds(self, bar: Tensor) -> Tensor:
        _, channels, pixels, _ = self.sizes
        return bar.reshape(*bar.shape[:-2], channels, pixels).sum(-1)

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Slots:
        if grad.dim() > len(self.meta.shape):
            return _stacked([self.adjoint(g, wanted) for g in grad])
        x, mean, rstd, gamma = self.statistics()
        slots: Slots = aten.native_group_norm_backward(
            grad.contiguous(), x.contiguous(), mean, rstd, gamma, *self.sizes, self.wants(wanted)
        )
        return slots


def _stacked(each: Sequence[Slots]) -> Slots:
    parts = [[t for t in slot if t is not None] for slot in zip(*each, strict=True)]
    return [torch.stack(slot) if slot else None for slot in parts]


RULES: dict[Any, Rule] = {
    aten.native_batch_norm.default: BatchNorm,
    aten.native_layer_norm.default: LayerNorm,
    aten.native_group_norm.default: GroupNorm,
}
