"""Plain-torch oracles of every op: the definition, written to be read and run in float64, not to be fast.

Each function has the signature of its namesake in :mod:`blokern.ops` and is what the kernels are tested against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from blokern.ops.definitions import straight_through
from blokern.ops.mask import SparseMask
from blokern.ops.types import Norm, PerSample, Scope

__all__ = [
    "apgd_step_",
    "bip_released_step_",
    "bip_score_step_",
    "channel_mask",
    "fast_bat_step",
    "filter_mask",
    "masked_conv2d",
    "masked_linear",
    "masked_sgd_step_",
    "nm_mask",
    "pgd_step",
    "pgd_step_",
    "project",
    "project_",
    "random_start",
    "sddmm",
    "spmm",
    "topk_mask",
]


def pgd_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    step_size: PerSample,
    eps: PerSample,
    *,
    norm: Norm = "linf",
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    active: Tensor | None = None,
) -> Tensor:
    start = _wide(x_adv)
    moved = start + _rows(step_size, start) * _direction(grad.to(start.dtype), norm)
    return _where_active(active, _project(moved, x, eps, norm, clip_min, clip_max, x.dtype), x_adv)


def pgd_step_(x_adv: Tensor, *args: object, **kwargs: object) -> Tensor:
    return x_adv.copy_(pgd_step(x_adv, *args, **kwargs))  # type: ignore[arg-type]


def project(
    x_adv: Tensor,
    x: Tensor,
    eps: PerSample,
    *,
    norm: Norm = "linf",
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    active: Tensor | None = None,
) -> Tensor:
    projected = _project(_wide(x_adv), x, eps, norm, clip_min, clip_max, x.dtype)
    return _where_active(active, projected, x_adv)


def project_(x_adv: Tensor, *args: object, **kwargs: object) -> Tensor:
    return x_adv.copy_(project(x_adv, *args, **kwargs))  # type: ignore[arg-type]


def apgd_step_(
    x_adv: Tensor,
    x_prev: Tensor,
    x: Tensor,
    grad: Tensor,
    step_size: PerSample,
    eps: PerSample,
    *,
    momentum: float = 0.75,
    norm: Norm = "linf",
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    keep: int | Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    current = _wide(x_adv)
    grad = grad.to(current.dtype)
    direction = _sparse_sign(grad, keep) if norm == "l1" else _direction(grad, norm)
    z = current + _rows(step_size, current) * direction
    if momentum != 1.0:
        z = _project(z, x, eps, norm, clip_min, clip_max, z.dtype)
        z = current + momentum * (z - current) + (1.0 - momentum) * (current - x_prev)
    z = _project(z, x, eps, norm, clip_min, clip_max, x.dtype)
    x_next, x_last = _where_active(active, z, x_adv), _where_active(active, x_adv, x_prev)
    x_prev.copy_(x_last)
    return x_adv.copy_(x_next)


def random_start(
    x: Tensor,
    eps: PerSample,
    *,
    norm: Norm = "linf",
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The distribution, not the bits: uniform in the ball around x, then projected onto ball and box."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    n, d = x.shape[0], math.prod(x.shape[1:])
    if norm == "linf":
        delta = 2.0 * uniform(n, d) - 1.0
    elif norm == "l2":  # a Gaussian's direction, and the radius of a uniform point: u^(1/d)
        gauss = torch.randn(n, d, dtype=torch.float64, generator=generator)
        delta = gauss / gauss.norm(dim=1, keepdim=True) * uniform(n, 1) ** (1.0 / d)
    else:  # d + 1 exponentials over their sum are uniform on the simplex: the last one is the slack
        e = -torch.log1p(-uniform(n, d + 1))
        sign = 2.0 * (uniform(n, d) < 0.5).double() - 1.0
        delta = sign * e[:, :d] / e.sum(dim=1, keepdim=True)
    x_adv = x.double() + _rows(eps, x.double()) * delta.view(x.shape)
    if norm == "linf":
        return _project(x_adv, x, eps, norm, clip_min, clip_max, x.dtype)
    lo, hi = _box_in(x.dtype, clip_min, clip_max)
    return _stored_towards(x.double(), x_adv, x.dtype).clamp(lo, hi).to(x.dtype)


def fast_bat_step(
    z: Tensor,
    x: Tensor,
    grad: Tensor,
    step_size: PerSample,
    eps: PerSample,
    *,
    clip_min: float = 0.0,
    clip_max: float = 1.0,
) -> tuple[Tensor, Tensor]:
    dtype, z, x = z.dtype, _wide(z), _wide(x)
    u = z - _rows(step_size, z) * grad.to(z.dtype)
    r = _largest_below(_rows(eps, z), dtype)
    lo, hi = _box_in(dtype, clip_min, clip_max)
    to_lo, to_hi = -_largest_below(x - lo, dtype), _largest_below(hi - x, dtype)
    lower, upper = torch.maximum(to_lo, -r), torch.minimum(to_hi, r)
    return u.clamp(-r, r).clamp(to_lo, to_hi).to(dtype), (lower < u) & (u < upper)


def spmm(weight: Tensor, mask: Tensor | SparseMask, x: Tensor, bias: Tensor | None = None) -> Tensor:
    y = _kept(weight, mask) @ x
    return y if bias is None else y + bias[:, None]


def sddmm(a: Tensor, b: Tensor, mask: Tensor | SparseMask) -> Tensor:
    return _kept(a @ b.t(), mask)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | SparseMask,
    bias: Tensor | None = None,
    *,
    dense_grad: bool = False,
) -> Tensor:
    return F.linear(x, _kept(weight, mask, dense_grad), bias)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | SparseMask,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    dense_grad: bool = False,
) -> Tensor:
    return F.conv2d(x, _kept(weight, mask, dense_grad), bias, stride, padding, dilation, groups)


def topk_mask(
    scores: Tensor | Sequence[Tensor], density: float, *, scope: Scope = "global"
) -> Tensor | list[Tensor]:
    if isinstance(scores, Tensor):
        return _largest(scores.flatten(), round(density * scores.numel())).view(scores.shape)
    if scope == "layer":
        return [_largest(s.flatten(), round(density * s.numel())).view(s.shape) for s in scores]
    values = torch.cat([s.flatten().double() for s in scores])
    parts = torch.split(_largest(values, round(density * len(values))), [s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


def nm_mask(scores: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    last = scores.movedim(dim, -1)
    return (
        _largest(last.reshape(*last.shape[:-1], last.shape[-1] // m, m), n).view(last.shape).movedim(-1, dim)
    )


def filter_mask(scores: Tensor, density: float) -> Tensor:
    norms = scores.double().flatten(1).norm(dim=1)
    kept = _largest(norms, round(density * len(norms)))
    return kept.view(-1, *[1] * (scores.dim() - 1)).expand_as(scores)


def channel_mask(scores: Tensor, density: float) -> Tensor:
    return filter_mask(scores.transpose(0, 1), density).transpose(0, 1)


def bip_score_step_(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    lr: float,
    gamma: float = 1.0,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    momentum_buffers: Sequence[Tensor] | None = None,
) -> None:
    gradients = [(w - m * g / gamma) * g for w, g, m in zip(weights, grads, masks, strict=True)]
    _sgd_step_(scores, gradients, lr, momentum, weight_decay, momentum_buffers)


def bip_released_step_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    lr: float,
    gamma: float = 1e4,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    momentum_buffers: Sequence[Tensor] | None = None,
) -> None:
    gradients = [w.abs() * g - (w * g).square() / gamma for w, g in zip(weights, grads, strict=True)]
    _sgd_step_(weights, gradients, lr, momentum, weight_decay, momentum_buffers)


def masked_sgd_step_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    momentum_buffers: Sequence[Tensor] | None = None,
) -> None:
    gradients = [torch.where(m, g, 0.0) for g, m in zip(grads, masks, strict=True)]
    _sgd_step_(weights, gradients, lr, momentum, weight_decay, momentum_buffers)


def _sgd_step_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    momentum_buffers: Sequence[Tensor] | None,
) -> None:
    buffers = momentum_buffers or [torch.zeros_like(value) for value in values]
    for value, grad, buffer in zip(values, grads, buffers, strict=True):
        buffer.copy_(momentum * buffer + grad + weight_decay * value)
        value.sub_(lr * buffer)


def _kept(weight: Tensor, mask: Tensor | SparseMask, dense_grad: bool = False) -> Tensor:
    """weight ⊙ mask, whatever the masked weights hold."""
    mask = mask.to_dense() if isinstance(mask, SparseMask) else mask
    if not dense_grad:
        return torch.where(mask, weight, 0.0)
    return straight_through(weight, mask)


def _largest(values: Tensor, count: int) -> Tensor:
    """Marks the `count` largest of the last dimension, equal ones in the order of their indices."""
    first = values.double().sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros(values.shape, dtype=torch.bool).scatter_(-1, first, True)


def _rows(value: PerSample, like: Tensor) -> Tensor:
    """A float or an [N] tensor, shaped to broadcast over the samples of `like`."""
    t = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return t.view(-1, *([1] * (like.dim() - 1))) if t.dim() else t


def _direction(grad: Tensor, norm: Norm) -> Tensor:
    """The steepest unit direction: sign, g/‖g‖₂ or g/‖g‖₁; zero where the norm is zero."""
    if norm == "linf":
        return grad.sign()
    size = _norm(grad, 2 if norm == "l2" else 1)
    return torch.where(size == 0, torch.zeros_like(grad), grad / size)


def _sparse_sign(grad: Tensor, keep: int | Tensor | None) -> Tensor:
    """APGD's L1 direction: the signs of a sample's `keep` largest gradient entries, over their number."""
    n, d = grad.shape[0], math.prod(grad.shape[1:])
    if d == 0:
        return grad
    flat = grad.reshape(n, d)
    count = torch.as_tensor(d if keep is None else keep, device=grad.device).expand(n).clamp(max=d)
    threshold = flat.abs().sort(dim=1, descending=True).values.gather(1, (count - 1).view(-1, 1))
    sign = flat.sign() * (flat.abs() >= threshold)
    size = sign.abs().sum(dim=1, keepdim=True)
    return torch.where(size == 0, torch.zeros_like(sign), sign / size).view(grad.shape)


def _project(
    x_adv: Tensor, x: Tensor, eps: PerSample, norm: Norm, clip_min: float, clip_max: float, dtype: torch.dtype
) -> Tensor:
    """To the ball around x and the box, as `dtype`: a half result lies in both as it is stored."""
    x = x.to(x_adv.dtype)
    r = _rows(eps, x)
    lo, hi = _box_in(dtype, clip_min, clip_max)
    delta = x_adv - x
    if norm == "linf":
        lower, upper = -_largest_below(r - x, dtype), _largest_below(x + r, dtype)
        return x_adv.clamp(lower, upper).clamp(lo, hi).to(dtype)
    if norm == "l2":
        size = _norm(delta, 2)
        moved = x + delta * torch.where(size > r, r / size, torch.ones_like(size))
    else:
        moved = x + _project_l1_box(delta, r, lo - x, hi - x)
    return _stored_towards(x, moved, dtype).clamp(lo, hi).to(dtype)


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _wide(t: Tensor) -> Tensor:
    """A half tensor as float64, to compute with."""
    return t.double() if _is_half(t.dtype) else t


def _largest_below(v: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of a half type that is at most v; v itself for the other types."""
    if not _is_half(dtype):
        return v
    nearest = v.to(dtype)
    lower = torch.nextafter(nearest, torch.full_like(nearest, -math.inf))
    return torch.where(nearest.double() > v, lower, nearest).double()


def _stored_towards(x: Tensor, moved: Tensor, dtype: torch.dtype) -> Tensor:
    """`moved` as `dtype`, a half type's numbers being no farther from x."""
    return torch.where(moved < x, -_largest_below(-moved, dtype), _largest_below(moved, dtype))


def _box_in(dtype: torch.dtype, clip_min: float, clip_max: float) -> tuple[float, float]:
    """The box of the type's own numbers."""
    low, high = _largest_below(torch.tensor([-clip_min, clip_max], dtype=torch.float64), dtype).tolist()
    return -low, high


def _project_l1_box(u: Tensor, eps: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """argmin ‖δ − u‖² over ‖δ‖₁ ≤ eps, lower ≤ δ ≤ upper: clamp(soft(u, τ)) at the root τ of a monotone function.

    Where the box alone has no point inside the ball, the box wins: its point nearest to zero.
    """

    def at(tau: Tensor) -> Tensor:
        return (u.sign() * (u.abs() - tau).clamp(min=0)).clamp(lower, upper)

    low = torch.zeros_like(_norm(u, 1))
    high = _norm(u, 1)
    inside = _norm(at(low), 1) <= eps
    for _ in range(128):
        mid = 0.5 * (low + high)
        above = _norm(at(mid), 1) > eps
        low, high = torch.where(above, mid, low), torch.where(above, high, mid)
    return at(torch.where(inside, torch.zeros_like(high), high))


def _norm(t: Tensor, p: int) -> Tensor:
    samples = t.unsqueeze(1)  # [N] images are samples of one element
    return samples.abs().pow(p).sum(dim=tuple(range(1, samples.dim())), keepdim=True).pow(1.0 / p).squeeze(1)


def _where_active(active: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if active is None else torch.where(active.view(-1, *([1] * (new.dim() - 1))), new, old)
