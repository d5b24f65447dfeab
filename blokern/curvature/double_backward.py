"""Convolution and BatchNorm whose second derivatives cost no more than they must.

torch's are exact but slow: the derivative of a convolution's input gradient in the weights is computed as a
convolution with a kernel as large as the image, and that of BatchNorm's backward as some twenty elementwise
passes. Here the first is a weight gradient like any other, and the second a BatchNorm backward and five
passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["LeanDoubleBackward"]

aten = torch.ops.aten


class LeanDoubleBackward(TorchFunctionMode):
    """Inside it, F.conv2d and F.batch_norm are differentiable twice at the least cost.

    The first backward, the one with create_graph, gives gradients to inputs alone: what `linearize` asks for.
    So only layers whose weights are leaves, and hence no function of the input, are taken; all others, and
    uncommon arguments, are left to torch.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        call: Callable[..., Any] = _LEAN.get(func, func)
        return call(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    leaves = weight.is_leaf and (bias is None or bias.is_leaf)
    if input.dim() != 4 or isinstance(padding, str) or not leaves:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    how = (_pair(stride), _pair(padding), _pair(dilation), False, (0, 0), groups)
    out: Tensor = _apply(_Conv, input, weight, bias, how)
    return out


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    affine = weight is not None and bias is not None and weight.is_leaf and bias.is_leaf
    if not training or not affine or input.numel() == input.shape[1]:  # the last is torch's to refuse
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    out: Tensor = _apply(_BatchNorm, input, weight, bias, running_mean, running_var, momentum, eps)
    return out


_LEAN: dict[Callable[..., Any], Callable[..., Tensor]] = {F.conv2d: _conv2d, F.batch_norm: _batch_norm}


class _Conv(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = how
        out: Tensor = aten.convolution(x, weight, bias, *how)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # With create_graph only x's gradient is asked for, which ctx.needs_input_grad does not tell.
        if torch.is_grad_enabled():
            return _apply(_ConvInputGradient, grad, x, weight, ctx.how), None, None, None
        channels = [weight.shape[0]]
        grads = aten.convolution_backward(grad, x, weight, channels, *ctx.how, ctx.needs_input_grad[:3])
        return *grads, None


class _ConvInputGradient(Function):
    """∂⟨conv(x, w), g⟩/∂x, bilinear in g and w; x lends its shape."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.how = how
        grad_x: Tensor = aten.convolution_backward(grad, x, weight, None, *how, (True, False, False))[0]
        return grad_x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        by_grad = aten.convolution(u, weight, None, *ctx.how)
        if not ctx.needs_input_grad[2]:
            return by_grad, None, None, None
        by_weight = aten.convolution_backward(grad, u, weight, None, *ctx.how, (False, True, False))[1]
        return by_grad, None, by_weight, None


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        out: Tensor
        out, mean, rstd = aten.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # as in _Conv
            return _apply(_BatchNormInputGradient, grad, *ctx.saved_tensors), *[None] * 6
        return *_batch_norm_backward(grad, *ctx.saved_tensors), *[None] * 4


class _BatchNormInputGradient(Function):
    """γ r (g − ⟨g⟩ − x̂ ⟨g x̂⟩) with x̂ = r (x − μ) and ⟨·⟩ a channel's mean; self-adjoint in g.

    With m = ⟨gu⟩ − ⟨g⟩⟨u⟩ − ⟨gx̂⟩⟨ux̂⟩, its product with u is γ r n m, whose derivative in x is
    −γ r² (x̂ (m − 2⟨gx̂⟩⟨ux̂⟩) + ⟨ux̂⟩ (g − ⟨g⟩) + ⟨gx̂⟩ (u − ⟨u⟩)).
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        grad_x, sum_gx, sum_g = _batch_norm_backward(grad, x, weight, mean, rstd)
        ctx.save_for_backward(grad, x, weight, mean, rstd, sum_gx, sum_g)
        return grad_x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, weight, mean, rstd, sum_gx, sum_g = ctx.saved_tensors
        by_grad, sum_ux, sum_u = _batch_norm_backward(u, x, weight, mean, rstd)
        channels = [1, -1] + [1] * (x.dim() - 2)
        others = [d for d in range(x.dim()) if d != 1]
        n = x.numel() // x.shape[1]

        gx, ux, g, u_mean = sum_gx / n, sum_ux / n, sum_g / n, sum_u / n
        m = (grad * u).sum(others, dtype=mean.dtype) / n - g * u_mean - gx * ux
        scale = -weight * rstd * rstd
        x_factor = scale * rstd * (m - 2.0 * gx * ux)
        constant = -x_factor * mean - scale * (ux * g + gx * u_mean)

        def spread(value: Tensor) -> Tensor:
            return value.to(x.dtype).view(channels)

        by_x = torch.addcmul(spread(constant), x, spread(x_factor))
        by_x.addcmul_(grad, spread(scale * ux)).addcmul_(u, spread(scale * gx))
        return by_grad, by_x, n * rstd * m, None, None


def _batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, Σ g x̂ and Σ g."""
    # Given mean and rstd, eps is not read.
    sums: tuple[Tensor, Tensor, Tensor] = aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, rstd, True, 0.0, (True, True, True)
    )
    return sums


def _apply(function: type[Function], *args: Any) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)
