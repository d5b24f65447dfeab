"""Batch, layer and group normalisation.

x̂ = r (x − μ) with μ = ⟨x⟩ and r = (⟨(x − μ)²⟩ + ε)^−½, ⟨·⟩ the mean over a group; y = γ x̂ + β. With the projection
P a = a − ⟨a⟩ − x̂⟨x̂ a⟩ and h = γ g:

    x̂̇ = r Pẋ,  ẏ = γ x̂̇ + γ̇ x̂ + β̇
    adjoint of x: r P h;  of γ: Σ g x̂;  of β: Σ g
    their tangents: r (P ḣ − r⟨x̂ ẋ⟩ P h − x̂̇⟨x̂ h⟩ − x̂⟨x̂̇ h⟩) with ḣ = γ ġ + γ̇ g;  Σ (ġ x̂ + g x̂̇);  Σ ġ

Batch normalisation in eval mode has μ and r constant: P is then the identity, and what P's own tangent adds is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blokern import ops
from blokern.curvature.op import Call, Maybe, Op, Rule, add, wide

__all__ = ["RULES"]

aten = torch.ops.aten


class Normalization(Op):
    """What the three have in common. A subclass says what x looks like by groups, and where γ and β lie in it."""

    differentiable = (0, 1, 2)
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

    def settle(self) -> None:
        del self.mean, self.rstd  # saved by now

    def _saves(self, x: Tensor, weight: Maybe) -> Sequence[Tensor]:
        return (x, self.mean, self.rstd) if weight is None else (x, self.mean, self.rstd, weight)

    def _values(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """x̂ and r, and γ if there is one, by groups."""
        x, mean, rstd, *weight = self.saved
        rstd = wide(rstd.reshape(self.statistics_view))
        normal = (wide(x.reshape(self.view)) - wide(mean.reshape(self.statistics_view))) * rstd
        return normal, rstd, wide(weight[0].reshape(self.weight_view)) if weight else None

    def _grouped(self, t: Maybe) -> Maybe:
        return None if t is None else wide(t.reshape(self.view))

    def _weight(self, t: Maybe) -> Maybe:
        return None if t is None else wide(t.reshape(self.weight_view))

    def _project(self, a: Tensor, normal: Tensor) -> Tensor:
        if not self.own_statistics:
            return a
        return a - a.mean(self.dims, keepdim=True) - normal * (normal * a).mean(self.dims, keepdim=True)

    def _back(self, t: Maybe, slot: int) -> Maybe:
        meta = self.metas[slot]
        return None if t is None or meta is None else t.reshape(meta.shape).to(meta.dtype)

    def tangent(self, *tangents: Maybe) -> Maybe:
        normal, rstd, weight = self._values()
        x_dot, weight_dot, bias_dot = self._grouped(tangents[0]), *map(self._weight, tangents[1:3])
        normal_dot = None if x_dot is None else rstd * self._project(x_dot, normal)
        if normal_dot is not None and weight is not None:
            normal_dot = weight * normal_dot
        y_dot = add(normal_dot, None if weight_dot is None else weight_dot * normal, bias_dot)
        assert y_dot is not None
        return y_dot.expand(self.view).reshape(self.meta.shape).to(self.meta.dtype)

    def adjoint_tangent(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        normal, rstd, weight = self._values()
        g, g_dot = self._grouped(grad), self._grouped(grad_dot)
        x_dot, weight_dot = self._grouped(tangents[0]), self._weight(tangents[1])
        normal_dot = None if x_dot is None else rstd * self._project(x_dot, normal)

        h = None if g is None else g if weight is None else weight * g
        h_dot = add(
            None if g_dot is None else g_dot if weight is None else weight * g_dot,
            None if g is None or weight_dot is None else weight_dot * g,
        )
        by_x = None if h_dot is None else rstd * self._project(h_dot, normal)
        if self.own_statistics and h is not None and x_dot is not None and normal_dot is not None:

            def mean(t: Tensor) -> Tensor:
                return t.mean(self.dims, keepdim=True)

            bent = (
                rstd * mean(normal * x_dot) * self._project(h, normal)
                + normal_dot * mean(normal * h)
                + normal * mean(normal_dot * h)
            )
            by_x = add(by_x, -rstd * bent)
        by_weight = by_bias = None
        if len(wanted) > 1 and wanted[1]:
            terms = add(
                None if g_dot is None else g_dot * normal,
                None if g is None or normal_dot is None else g * normal_dot,
            )
            by_weight = None if terms is None else terms.sum(self.weight_dims)
        if len(wanted) > 2 and wanted[2] and g_dot is not None:
            by_bias = g_dot.sum(self.weight_dims)
        return self._back(by_x if wanted[0] else None, 0), self._back(by_weight, 1), self._back(by_bias, 2)


class BatchNorm(Normalization):
    """Batch normalisation, and a ReLU that follows and alone reads its output: on the CPU by kernels of their own."""

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
        self.weighted, self.gated = weight is not None, False
        self.stacks = x.device.type == "cpu"
        self.view = x.shape
        self.dims = self.weight_dims = [d for d in range(x.dim()) if d != 1]
        self.statistics_view = self.weight_view = [1, x.shape[1], *[1] * (x.dim() - 2)]
        if not training:
            # A later forward pass in train mode changes these where they lie, unseen by version counters.
            assert running_mean is not None
            assert running_var is not None
            self.mean, self.rstd = running_mean.clone(), torch.rsqrt(running_var + eps)
        return self._saves(x, weight)

    def followed_by(self, later: Op) -> Op | None:
        if not self.stacks or later.func is not aten.relu.default:
            return None
        self.saved += later.saved
        self.gated = True
        return self

    def _statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """x, μ, r, γ and the ReLU's output."""
        x, mean, rstd = self.saved[:3]
        return x, mean, rstd, self.saved[3] if self.weighted else None, self.saved[-1] if self.gated else None

    def tangent(self, *tangents: Maybe) -> Maybe:
        if not self.stacks:
            return super().tangent(*tangents)
        x, mean, rstd, weight, gate = self._statistics()
        x_dot, weight_dot, bias_dot = tangents[:3]
        if x_dot is None:
            x_dot = _zeros(x, weight_dot if bias_dot is None else bias_dot, 1)
        train = self.own_statistics
        return ops.batch_norm_tangent(
            x, x_dot, mean, rstd, weight, weight_dot, bias_dot, gate=gate, train=train
        )

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        x, mean, rstd, weight, gate = self._statistics()
        if not self.stacks:
            return self._plain_adjoint(grad, weight, wanted)
        bars = ops.batch_norm_adjoint(grad, x, mean, rstd, weight, gate=gate, train=self.own_statistics)
        return self._slots(bars, wanted)

    def _plain_adjoint(self, grad: Tensor, weight: Maybe, wanted: Sequence[bool]) -> Sequence[Maybe]:
        g, (normal, rstd, gamma) = wide(grad), self._values()
        h = g if gamma is None else gamma * g
        return (
            self._back(rstd * self._project(h, normal) if wanted[0] else None, 0),
            self._back((g * normal).sum(self.dims) if wanted[1] else None, 1),
            self._back(g.sum(self.dims) if wanted[2] else None, 2),
        )

    def adjoint_tangent(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        if not self.stacks:
            return super().adjoint_tangent(grad, grad_dot, tangents, wanted)
        return self._bars(grad, grad_dot, tangents, wanted, False)[1]

    def both(
        self,
        grad: Tensor,
        grad_dot: Maybe,
        tangents: Sequence[Maybe],
        inner: Sequence[bool],
        wanted: Sequence[bool],
    ) -> tuple[Sequence[Maybe], Sequence[Maybe]]:
        if any(inner[1:]):  # γ or β is itself computed: rare
            return super().both(grad, grad_dot, tangents, inner, wanted)
        return self._bars(grad, grad_dot, tangents, wanted, inner[0])

    def _bars(
        self,
        grad: Maybe,
        grad_dot: Maybe,
        tangents: Sequence[Maybe],
        wanted: Sequence[bool],
        adjoint: bool,
    ) -> tuple[Sequence[Maybe], Sequence[Maybe]]:
        x, mean, rstd, weight, gate = self._statistics()
        x_dot, weight_dot = tangents[:2]
        like = next(t for t in (x_dot, grad_dot, weight_dot) if t is not None)
        dims = 1 if like is weight_dot else x.dim()
        x_bar, *bars = ops.batch_norm_adjoint_tangent(
            torch.zeros_like(x) if grad is None else grad,
            _zeros(x, like, dims) if grad_dot is None else grad_dot,
            x,
            _zeros(x, like, dims) if x_dot is None else x_dot,
            mean,
            rstd,
            weight,
            weight_dot,
            gate=gate,
            train=self.own_statistics,
            adjoint=adjoint,
        )
        return (x_bar if adjoint else None, None, None), self._slots(bars, wanted)

    def _slots(self, bars: Sequence[Tensor], wanted: Sequence[bool]) -> Sequence[Maybe]:
        return [
            bar.to(meta.dtype) if want and meta is not None else None
            for bar, want, meta in zip(bars, wanted, self.metas, strict=False)
        ]


def _zeros(x: Tensor, like: Maybe, dims: int) -> Tensor:
    """In the place of a tangent of x: of a stack if `like` is one, which else has `dims` dimensions."""
    assert like is not None
    return x.new_zeros(*like.shape[: like.dim() - dims], *x.shape)


class LayerNorm(Normalization):
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
        self.shape = shape
        inner = torch.Size(shape).numel()
        self.view = (x.numel() // max(inner, 1), inner)
        self.dims, self.weight_dims = [1], [0]
        self.statistics_view, self.weight_view = (-1, 1), (1, inner)
        return self._saves(x, weight)

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        x, mean, rstd, *weight = self.saved
        want = [wanted[0], self.metas[1] is not None and wanted[1], self.metas[2] is not None and wanted[2]]
        gamma = weight[0] if weight else None
        like_bias = gamma if want[2] else None  # lends its shape
        slots: Sequence[Maybe] = aten.native_layer_norm_backward(
            grad, x, self.shape, mean, rstd, gamma, like_bias, want
        )
        return slots


class GroupNorm(Normalization):
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
        self.view = (samples, groups, channels // groups, pixels)
        self.dims, self.weight_dims = [2, 3], [0, 3]
        self.statistics_view, self.weight_view = (samples, groups, 1, 1), (1, groups, channels // groups, 1)
        return self._saves(x, weight)

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        x, mean, rstd, *weight = self.saved
        want = [wanted[0], self.metas[1] is not None and wanted[1], self.metas[2] is not None and wanted[2]]
        slots: Sequence[Maybe] = aten.native_group_norm_backward(
            grad.contiguous(), x.contiguous(), mean, rstd, weight[0] if weight else None, *self.sizes, want
        )
        return slots


RULES: dict[Any, Rule] = {
    aten.native_batch_norm.default: BatchNorm,
    aten.native_layer_norm.default: LayerNorm,
    aten.native_group_norm.default: GroupNorm,
}
