"""Elementwise ops: y = φ(a) from a table of first and second derivatives, and sums, quotients and choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blokern import ops
from blokern.curvature.op import Call, Maybe, Op, Rule, Single, add, fit, wide
from blokern.ops.curvature import has_kernels

__all__ = ["RULES"]

aten = torch.ops.aten


class Unary(Single):
    """y = φ(a): ẏ = φ′ȧ, φ′g, φ′ġ + φ″ȧg. Saves y if φ′ and φ″ are cheaper by it, else a.

    times_slope(v, saved, *args) = φ′v, by torch's own backward op where it has one; curvature(saved, *args) = φ″,
    None where it is zero everywhere. Those of `_KERNELS` have φ′ġ + φ″ȧg in one pass, where they run.
    """

    def __init__(
        self,
        call: Call,
        saves_output: bool,
        times_slope: Callable[..., Tensor],
        curvature: Callable[..., Tensor] | None,
    ) -> None:
        self.saves_output = saves_output
        self.times_slope, self.curvature = times_slope, curvature
        self.kernel = _KERNELS.get(call.func)
        self.curved = curvature is not None
        super().__init__(call)

    def setup(self, out: Tensor, a: Tensor, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        self.args, self.kwargs = args, kwargs
        self.stacks = self.kernel is not None and has_kernels(a.device)
        return (out if self.saves_output else a,)

    def push(self, a_dot: Tensor) -> Tensor:
        (saved,) = self.saved
        if a_dot.dim() > saved.dim():
            saved = saved.expand(a_dot.shape)
        return self.times_slope(a_dot, saved, *self.args, **self.kwargs)

    def pull(self, g: Tensor) -> Tensor:
        return self.push(g)

    def bend(self, g: Tensor, a_dot: Tensor) -> Tensor:
        assert self.curvature is not None
        second = self.curvature(wide(self.saved[0]), *self.args, **self.kwargs)
        return (second * wide(a_dot) * wide(g)).to(g.dtype)

    def adjoint_tangent(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        if not self.stacks or grad is None or tangents[0] is None:
            return super().adjoint_tangent(grad, grad_dot, tangents, wanted)
        return (self._bars(grad, grad_dot, tangents[0], False)[1],)

    def both(
        self,
        grad: Tensor,
        grad_dot: Maybe,
        tangents: Sequence[Maybe],
        inner: Sequence[bool],
        wanted: Sequence[bool],
    ) -> tuple[Sequence[Maybe], Sequence[Maybe]]:
        assert tangents[0] is not None
        own, moved = self._bars(grad, grad_dot, tangents[0], True)
        return (own,), (moved,)

    def _bars(self, grad: Tensor, grad_dot: Maybe, a_dot: Tensor, adjoint: bool) -> tuple[Tensor, Tensor]:
        assert self.kernel is not None
        name, *parameters = self.kernel(*self.args, **self.kwargs)
        dot = torch.zeros_like(a_dot) if grad_dot is None else grad_dot
        return ops.activation_adjoint_tangent(
            name, grad, dot, self.saved[0], a_dot, *parameters, adjoint=adjoint
        )


def _by_input(times_slope: Callable[..., Tensor], curvature: Callable[..., Tensor] | None) -> Rule:
    return partial(Unary, saves_output=False, times_slope=times_slope, curvature=curvature)


def _by_output(times_slope: Callable[..., Tensor], curvature: Callable[..., Tensor] | None) -> Rule:
    return partial(Unary, saves_output=True, times_slope=times_slope, curvature=curvature)


def _slope(first: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """times_slope of a φ′ that torch has no backward op for."""

    def times_slope(v: Tensor, saved: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (wide(v) * first(wide(saved), *args, **kwargs)).to(v.dtype)

    return times_slope


def _within(lo: Any, hi: Any) -> Callable[[Tensor], Tensor]:
    def inside(a: Tensor) -> Tensor:
        lower = torch.ones_like(a, dtype=torch.bool) if lo is None else a >= lo
        return lower if hi is None else lower & (a <= hi)

    return inside


def _clamped(v: Tensor, a: Tensor, lo: Any = None, hi: Any = None) -> Tensor:
    return torch.where(_within(lo, hi)(a), v, 0.0)


def _gelu_curvature(a: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return (2.0 - a * a) * torch.exp(-0.5 * a * a) / math.sqrt(2.0 * math.pi)
    c, k = math.sqrt(2.0 / math.pi), 0.044715
    t = torch.tanh(c * (a + k * a**3))
    first, second = c * (1.0 + 3.0 * k * a * a), 6.0 * c * k * a
    return (1.0 - t * t) * (first + 0.5 * a * (second - 2.0 * t * first * first))


def _silu_curvature(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1.0 - s) * (2.0 + a * (1.0 - 2.0 * s))


def _softplus_curvature(a: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    s = torch.sigmoid(beta * a)
    return torch.where(beta * a > threshold, 0.0, beta * s * (1.0 - s))


def _elu_curvature(a: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return torch.where(a > 0, 0.0, scale * alpha * input_scale**2 * torch.exp(input_scale * a))


def _elu_slope(v: Tensor, a: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    out: Tensor = aten.elu_backward(v, alpha, scale, input_scale, False, a)
    return out


def _mish_curvature(a: Tensor) -> Tensor:
    t, s = torch.tanh(torch.nn.functional.softplus(a)), torch.sigmoid(a)
    return (1.0 - t * t) * s * (2.0 + a * (1.0 - s - 2.0 * t * s))


def _log_sigmoid_slope(v: Tensor, a: Tensor) -> Tensor:
    return (wide(v) * torch.sigmoid(-wide(a))).to(v.dtype)


def _log_sigmoid_curvature(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return -s * (1.0 - s)


def _times_power(factor: float, a: Tensor, p: float) -> Tensor:
    """factor aᵖ; zero for a zero factor, whatever the power."""
    return torch.zeros_like(a) if factor == 0 else factor * a**p


#: The name and parameters of an op's `ops.activation_adjoint_tangent`, from its own arguments after the first.
_KERNELS: dict[Any, Callable[..., tuple[Any, ...]]] = {
    aten.tanh.default: lambda: ("tanh",),
    aten.sigmoid.default: lambda: ("sigmoid",),
    aten.silu.default: lambda: ("silu",),
    aten.gelu.default: lambda approximate="none": ("gelu" if approximate == "none" else "gelu_tanh",),
    aten.softplus.default: lambda beta=1, threshold=20: ("softplus", beta, threshold),
    aten.elu.default: lambda alpha=1, scale=1, input_scale=1: ("elu", alpha, scale, input_scale),
    aten.celu.default: lambda alpha=1: ("elu", alpha, 1, 1 / alpha),
}

#: Constant between their steps.
_STEPS = (
    aten.sign.default,
    aten.sgn.default,
    aten.round.default,
    aten.floor.default,
    aten.ceil.default,
    aten.trunc.default,
)

_UNARY: dict[Any, Rule] = {
    **dict.fromkeys(
        (aten.frac.default, aten.fmod.Scalar, aten.remainder.Scalar), _by_input(lambda v, a, *by: v, None)
    ),
    aten.nan_to_num.default: _by_input(lambda v, a, *to, **by_name: torch.where(a.isfinite(), v, 0.0), None),
    aten.neg.default: _by_input(lambda v, a: -v, None),
    aten.relu.default: _by_output(lambda v, y: aten.threshold_backward(v, y, 0), None),
    aten.threshold.default: _by_input(lambda v, a, at, to: aten.threshold_backward(v, a, at), None),
    aten.leaky_relu.default: _by_input(
        lambda v, a, slope=0.01: aten.leaky_relu_backward(v, a, slope, False), None
    ),
    aten.hardtanh.default: _by_input(lambda v, a, lo=-1, hi=1: aten.hardtanh_backward(v, a, lo, hi), None),
    aten.clamp.default: _by_input(lambda v, a, min=None, max=None: _clamped(v, a, min, max), None),
    aten.clamp_min.default: _by_input(lambda v, a, lo: _clamped(v, a, lo), None),
    aten.clamp_max.default: _by_input(lambda v, a, hi: _clamped(v, a, None, hi), None),
    aten.abs.default: _by_input(lambda v, a: v * torch.sgn(a), None),
    aten.tanh.default: _by_output(aten.tanh_backward, lambda y: -2.0 * y * (1.0 - y * y)),
    aten.sigmoid.default: _by_output(aten.sigmoid_backward, lambda y: y * (1.0 - y) * (1.0 - 2.0 * y)),
    aten.gelu.default: _by_input(aten.gelu_backward, _gelu_curvature),
    aten.silu.default: _by_input(aten.silu_backward, _silu_curvature),
    aten.softplus.default: _by_input(
        lambda v, a, beta=1, threshold=20: aten.softplus_backward(v, a, beta, threshold), _softplus_curvature
    ),
    aten.elu.default: _by_input(_elu_slope, _elu_curvature),
    aten.celu.default: _by_input(
        lambda v, a, alpha=1: _elu_slope(v, a, alpha, 1, 1 / alpha),
        lambda a, alpha=1: _elu_curvature(a, alpha, 1, 1 / alpha),
    ),
    aten.hardswish.default: _by_input(
        aten.hardswish_backward, lambda a: torch.where(a.abs() < 3, 1.0 / 3.0, 0.0)
    ),
    aten.hardsigmoid.default: _by_input(aten.hardsigmoid_backward, None),
    aten.hardshrink.default: _by_input(lambda v, a, at=0.5: aten.hardshrink_backward(v, a, at), None),
    aten.softshrink.default: _by_input(lambda v, a, by=0.5: aten.softshrink_backward(v, a, by), None),
    aten.mish.default: _by_input(aten.mish_backward, _mish_curvature),
    aten.log_sigmoid_forward.default: lambda call: Unary(
        call._replace(out=call.out[0]), False, _log_sigmoid_slope, _log_sigmoid_curvature
    ),
    aten.exp.default: _by_output(lambda v, y: v * y, lambda y: y),
    aten.expm1.default: _by_output(_slope(lambda y: y + 1.0), lambda y: y + 1.0),
    aten.log.default: _by_input(lambda v, a: v / a, lambda a: -1.0 / (a * a)),
    aten.log1p.default: _by_input(
        _slope(lambda a: 1.0 / (1.0 + a)), lambda a: -1.0 / ((1.0 + a) * (1.0 + a))
    ),
    aten.sqrt.default: _by_output(lambda v, y: v / (2 * y), lambda y: -0.25 / (y * y * y)),
    aten.rsqrt.default: _by_output(_slope(lambda y: -0.5 * y**3), lambda y: 0.75 * y**5),
    aten.reciprocal.default: _by_output(_slope(lambda y: -y * y), lambda y: 2.0 * y * y * y),
    aten.sin.default: _by_input(lambda v, a: v * torch.cos(a), lambda a: -torch.sin(a)),
    aten.cos.default: _by_input(lambda v, a: -v * torch.sin(a), lambda a: -torch.cos(a)),
    aten.tan.default: _by_output(_slope(lambda y: 1.0 + y * y), lambda y: 2.0 * y * (1.0 + y * y)),
    aten.atan.default: _by_input(
        _slope(lambda a: 1.0 / (1.0 + a * a)), lambda a: -2.0 * a / ((1.0 + a * a) * (1.0 + a * a))
    ),
    aten.sinh.default: _by_input(lambda v, a: v * torch.cosh(a), torch.sinh),
    aten.cosh.default: _by_input(lambda v, a: v * torch.sinh(a), torch.cosh),
    aten.log2.default: _by_input(
        lambda v, a: v / (a * math.log(2.0)), lambda a: -1.0 / (a * a * math.log(2.0))
    ),
    aten.log10.default: _by_input(
        lambda v, a: v / (a * math.log(10.0)), lambda a: -1.0 / (a * a * math.log(10.0))
    ),
    **{op: _by_input(lambda v, a: torch.zeros_like(v), None) for op in _STEPS},
    aten.erf.default: _by_input(
        _slope(lambda a: 2.0 / math.sqrt(math.pi) * torch.exp(-a * a)),
        lambda a: -4.0 / math.sqrt(math.pi) * a * torch.exp(-a * a),
    ),
    aten.pow.Tensor_Scalar: _by_input(
        _slope(lambda a, p: _times_power(p, a, p - 1)), lambda a, p: _times_power(p * (p - 1), a, p - 2)
    ),
}


class Sum(Op):
    """y = p·a + q·b, broadcast; a or b may be a number."""

    curved = False

    def __init__(self, call: Call, first: float = 1.0, sign: float = 1.0, swapped: bool = False) -> None:
        self.factors = [first, sign]
        self.swapped = swapped
        super().__init__(call)

    def setup(self, out: Tensor, a: Any, b: Any, alpha: float = 1) -> Sequence[Tensor]:
        self.factors[0 if self.swapped else 1] *= alpha
        return ()

    def tangent(self, *tangents: Maybe) -> Maybe:
        terms = [t if t is None or f == 1 else t * f for t, f in zip(tangents, self.factors, strict=False)]
        total = add(*terms)
        return None if total is None else self.to_output(total)

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        return [
            self.to_operand(grad if f == 1 else grad * f, slot) if want else None
            for slot, (f, want) in enumerate(zip(self.factors, wanted, strict=False))
        ]


class Divide(Op):
    """y = a / b; a or b may be a number."""

    def setup(self, out: Tensor, a: Any, b: Any) -> Sequence[Tensor]:
        self.divisor = None if isinstance(b, Tensor) else b
        return (out, b) if isinstance(b, Tensor) else (out,)

    def settle(self) -> None:
        self.curved = self.inputs[1] is not None
        if not self.curved:
            self.saved[0] = self.saved[0].new_empty(0)

    def _tangent(self, a_dot: Maybe, b_dot: Maybe) -> Maybe:
        y, b = self.saved[0], self.saved[1] if self.divisor is None else self.divisor
        total = add(a_dot, None if b_dot is None else -y * b_dot)
        return None if total is None else total / b

    def tangent(self, *tangents: Maybe) -> Maybe:
        y_dot = self._tangent(tangents[0], tangents[1])
        return None if y_dot is None else self.to_output(y_dot)

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        y, b = self.saved[0], self.saved[1] if self.divisor is None else self.divisor
        by_a = grad / b
        return (
            self.to_operand(by_a, 0) if wanted[0] else None,
            self.to_operand(-by_a * y, 1) if wanted[1] else None,
        )

    def adjoint_tangent(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        y, b = self.saved[0], self.saved[1] if self.divisor is None else self.divisor
        a_dot, b_dot = tangents[:2]
        y_dot = self._tangent(a_dot, b_dot)
        # The adjoint of a is g / b, that of b −(g / b) y.
        bent = None if grad is None or b_dot is None else -grad * b_dot / b
        numerator = add(grad_dot, bent)
        by_a = None if numerator is None else numerator / b
        by_b = add(
            None if by_a is None else -by_a * y,
            None if grad is None or y_dot is None else -grad / b * y_dot,
        )
        return (
            self.to_operand(by_a, 0) if wanted[0] and by_a is not None else None,
            self.to_operand(by_b, 1) if wanted[1] and by_b is not None else None,
        )


class Where(Op):
    """y = a where the condition holds, else b."""

    curved = False

    def setup(self, out: Tensor, condition: Tensor, a: Any, b: Any) -> Sequence[Tensor]:
        return (condition,)

    def tangent(self, *tangents: Maybe) -> Maybe:
        _, a, b = tangents
        (condition,) = self.saved
        return self.to_output(torch.where(condition, 0.0 if a is None else a, 0.0 if b is None else b))

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        (condition,) = self.saved
        return (
            None,
            self.to_operand(torch.where(condition, grad, 0.0), 1) if wanted[1] else None,
            self.to_operand(torch.where(condition, 0.0, grad), 2) if wanted[2] else None,
        )


class MaskedFill(Single):
    """y = value where the mask holds, else a."""

    curved = False

    def setup(self, out: Tensor, a: Tensor, mask: Tensor, value: Any) -> Sequence[Tensor]:
        return (mask,)

    def push(self, a_dot: Tensor) -> Tensor:
        return self.to_output(a_dot).masked_fill(self.saved[0], 0.0)

    def pull(self, g: Tensor) -> Tensor:
        return fit(g.masked_fill(self.saved[0], 0.0), self.operand)


class Extreme(Op):
    """y = max(a, b) or min(a, b); where they tie, each has half, as in torch."""

    curved = False

    def __init__(self, call: Call, sign: int) -> None:
        self.sign = sign
        super().__init__(call)

    def setup(self, out: Tensor, a: Tensor, b: Tensor) -> Sequence[Tensor]:
        return a, b

    def _share(self, v: Tensor) -> Tensor:
        """v where the first wins, half of it where both do."""
        a, b = self.saved
        wins = a > b if self.sign > 0 else a < b
        return torch.where(wins, v, torch.where(a == b, 0.5 * v, 0.0))

    def tangent(self, *tangents: Maybe) -> Maybe:
        a, b = tangents
        parts = [None if a is None else self._share(a), None if b is None else b - self._share(b)]
        total = add(*parts)
        return None if total is None else self.to_output(total)

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        first = self._share(grad)
        return (
            self.to_operand(first, 0) if wanted[0] else None,
            self.to_operand(grad - first, 1) if wanted[1] else None,
        )


class Copy(Op):
    """y = b, broadcast to a and in its dtype: a.copy_(b)."""

    curved = False

    def setup(self, out: Tensor, a: Tensor, b: Tensor, non_blocking: bool = False) -> Sequence[Tensor]:
        return ()

    def tangent(self, *tangents: Maybe) -> Maybe:
        return None if tangents[1] is None else self.to_output(tangents[1])

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        return (None, self.to_operand(grad, 1) if wanted[1] else None)


RULES: dict[Any, Rule] = _UNARY | {
    aten.add.Tensor: Sum,
    aten.add.Scalar: Sum,
    aten.sub.Tensor: partial(Sum, sign=-1.0),
    aten.sub.Scalar: partial(Sum, sign=-1.0),
    aten.rsub.Tensor: partial(Sum, first=-1.0, swapped=True),
    aten.rsub.Scalar: partial(Sum, first=-1.0, swapped=True),
    aten.div.Tensor: Divide,
    aten.div.Scalar: Divide,
    aten.where.self: Where,
    aten.masked_fill.Scalar: MaskedFill,
    aten.masked_fill.Tensor: MaskedFill,
    aten.maximum.default: partial(Extreme, sign=1),
    aten.minimum.default: partial(Extreme, sign=-1),
    aten.copy.default: Copy,
}
