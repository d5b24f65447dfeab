"""The attack ops against eager PyTorch in the peers' own sequence, against torch.compile, and against the limit of
memory: a torch kernel that reads three arrays and writes one, as a perfect fused step does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from blokern import ops
from blokern._race import Case

SHAPES = {"128×3×32×32": (128, 3, 32, 32), "64×3×224×224": (64, 3, 224, 224)}
#: (eps, step_size): after a few steps the projection is active, as in an attack.
SIZES = {"linf": (8 / 255, 2 / 255), "l2": (1.0, 0.25), "l1": (12.0, 4.0)}


# ---- The rivals' formulas, as their users run them.


def linf_torchattacks(x_adv: Tensor, x: Tensor, grad: Tensor, step: float, eps: float) -> Tensor:
    """torchattacks 3.5.1, PGD.forward."""
    x_adv = x_adv.detach() + step * grad.sign()
    delta = torch.clamp(x_adv - x, min=-eps, max=eps)
    return torch.clamp(x + delta, min=0, max=1).detach()


def linf_bounds(x_adv: Tensor, x: Tensor, grad: Tensor, step: float, eps: float) -> Tensor:
    """The same by bounds, as AutoAttack writes it: the friendlier form for a compiler."""
    moved = x_adv + step * torch.sign(grad)
    return torch.clamp(torch.min(torch.max(moved, x - eps), x + eps), 0.0, 1.0)


def l2_torchattacks(x_adv: Tensor, x: Tensor, grad: Tensor, step: float, eps: float) -> Tensor:
    """torchattacks 3.5.1, PGDL2.forward."""
    n = len(x)
    norms = torch.norm(grad.view(n, -1), p=2, dim=1) + 1e-10
    x_adv = x_adv.detach() + step * (grad / norms.view(n, 1, 1, 1))
    delta = x_adv - x
    factor = torch.min(eps / torch.norm(delta.view(n, -1), p=2, dim=1), torch.ones(n, device=x.device))
    return torch.clamp(x + delta * factor.view(-1, 1, 1, 1), min=0, max=1).detach()


def l1_autoattack(x_adv: Tensor, x: Tensor, grad: Tensor, step: float, eps: float) -> Tensor:
    """A normalised step, then AutoAttack's projection, which sorts 2d values a sample."""
    from pyautoattack.autopgd_base import L1_projection  # type: ignore[import-untyped]

    delta = x_adv + step * grad / (grad.abs().sum(dim=(1, 2, 3), keepdim=True) + 1e-10) - x
    return x + delta + L1_projection(x, delta, eps)


def apgd_autoattack(
    x_adv: Tensor, x_prev: Tensor, x: Tensor, grad: Tensor, step: Tensor, eps: float
) -> Tensor:
    """AutoAttack, APGDAttack.attack_single_run, L∞."""
    a = 0.75
    grad2 = x_adv - x_prev
    x_prev = x_adv.clone()
    x1 = x_adv + step * torch.sign(grad)
    x1 = torch.clamp(torch.min(torch.max(x1, x - eps), x + eps), 0.0, 1.0)
    x1 = torch.clamp(
        torch.min(torch.max(x_adv + (x1 - x_adv) * a + grad2 * (1 - a), x - eps), x + eps), 0.0, 1.0
    )
    return x1 + 0.0


def fast_bat_released(z: Tensor, x: Tensor, grad: Tensor, step: float, eps: float) -> tuple[Tensor, Tensor]:
    """Fast-BAT's released step and mask."""
    delta = torch.clamp(z - step * grad, -eps, eps)
    delta = torch.max(torch.min(delta, 1 - x), 0 - x)
    low, high = torch.clamp(0 - x, min=-eps), torch.clamp(1 - x, max=eps)
    return delta, (delta > low + 1e-7) & (delta < high - 1e-7)


def random_start_torch(x: Tensor, eps: float) -> Tensor:
    return torch.clamp(x + torch.empty_like(x).uniform_(-eps, eps), 0, 1)


# ---- The cases.


def _images(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator)
    return ops.random_start(x, 0.02).to(dtype), x.to(dtype), torch.randn(shape, generator=generator).to(dtype)


def _compiled(formula: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(formula, fullgraph=True, dynamic=False)


def _limit(x_adv: Tensor, x: Tensor, grad: Tensor) -> dict[str, Callable[[], object]]:
    """Two torch kernels that move the same bytes: the faster is what the machine gives."""
    out = torch.empty_like(x_adv)
    buffer = x_adv.clone()
    return {
        "limit: torch.addcmul, 3 reads, in place": lambda: buffer.addcmul_(x, grad, value=1e-8),
        "limit: torch.addcmul, 3 reads, 1 write": lambda: torch.addcmul(buffer, x, grad, out=out),
    }


def _linf(label: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    x_adv, x, grad = _images(shape, dtype)
    eps, step = SIZES["linf"]
    compiled = {f.__name__: _compiled(f) for f in (linf_torchattacks, linf_bounds)}
    best = torch.compile(linf_bounds, fullgraph=True, dynamic=False)
    target = x_adv.clone()
    return Case(
        f"L∞ step, {label}, {str(dtype).removeprefix('torch.')}",
        {
            "blokern, in place": lambda: ops.pgd_step_(x_adv, x, grad, step, eps),
            "blokern, new tensor": lambda: ops.pgd_step(x_adv, x, grad, step, eps),
            "eager (torchattacks)": lambda: linf_torchattacks(x_adv, x, grad, step, eps),
            "torch.compile (torchattacks)": lambda: compiled["linf_torchattacks"](x_adv, x, grad, step, eps),
            "torch.compile (bounds)": lambda: compiled["linf_bounds"](x_adv, x, grad, step, eps),
            "torch.compile (bounds), in place": lambda: target.copy_(best(target, x, grad, step, eps)),
            **_limit(x_adv, x, grad),
        },
        ours="blokern, in place",
        bytes=4 * x.numel() * x.element_size(),
    )


def _ball(
    norm: str, label: str, shape: tuple[int, ...], rival: Callable[..., object], compiles: bool
) -> Case:
    x_adv, x, grad = _images(shape, torch.float32)
    eps, step = SIZES[norm]
    rivals: dict[str, Callable[[], object]] = {
        "blokern, in place": lambda: ops.pgd_step_(x_adv, x, grad, step, eps, norm=norm),  # type: ignore[arg-type]
        "eager (peers' sequence)": lambda: rival(x_adv, x, grad, step, eps),
    }
    if compiles:
        compiled = _compiled(rival)
        rivals["torch.compile"] = lambda: compiled(x_adv, x, grad, step, eps)
    rivals |= _limit(x_adv, x, grad)
    return Case(
        f"{norm.upper()} step, {label}", rivals, "blokern, in place", 4 * x.numel() * x.element_size()
    )


def _others(label: str, shape: tuple[int, ...]) -> Iterator[Case]:
    x_adv, x, grad = _images(shape, torch.float32)
    eps, step = SIZES["linf"]
    x_prev, z = x.clone(), x_adv - x
    steps = torch.full((len(x),), step, dtype=torch.float64)
    wide = steps.float().view(-1, 1, 1, 1)
    compiled_apgd, compiled_bat = _compiled(apgd_autoattack), _compiled(fast_bat_released)
    yield Case(
        f"APGD step (L∞), {label}",
        {
            "blokern, in place": lambda: ops.apgd_step_(x_adv, x_prev, x, grad, steps, eps),
            "eager (AutoAttack)": lambda: apgd_autoattack(x_adv, x_prev, x, grad, wide, eps),
            "torch.compile": lambda: compiled_apgd(x_adv, x_prev, x, grad, wide, eps),
        },
        ours="blokern, in place",
    )
    yield Case(
        f"Fast-BAT step with mask, {label}",
        {
            "blokern": lambda: ops.fast_bat_step(z, x, grad, 20.0, eps),
            "eager (released)": lambda: fast_bat_released(z, x, grad, 20.0, eps),
            "torch.compile": lambda: compiled_bat(z, x, grad, 20.0, eps),
        },
        ours="blokern",
    )
    yield Case(
        f"Random start (L∞), {label}",
        {"blokern": lambda: ops.random_start(x, eps), "eager": lambda: random_start_torch(x, eps)},
        ours="blokern",
    )


def _call() -> Case:
    x_adv, x, grad = _images((8,), torch.float32)
    eps, step = SIZES["linf"]
    compiled = _compiled(linf_bounds)
    handle = torch.ops.blokern.pgd_step_.default
    return Case(
        "One call on 8 elements",
        {
            "blokern.ops": lambda: ops.pgd_step_(x_adv, x, grad, step, eps),
            "torch.ops handle": lambda: handle(x_adv, x, grad, step, eps, None, None, 0, 0.0, 1.0, None),
            "torch.compile": lambda: compiled(x_adv, x, grad, step, eps),
            "eager (torchattacks)": lambda: linf_torchattacks(x_adv, x, grad, step, eps),
        },
        ours="blokern.ops",
    )


def cases() -> Iterator[Case]:
    yield _call()
    for label, shape in SHAPES.items():
        yield _linf(label, shape, torch.float32)
        yield _linf(label, shape, torch.bfloat16)
        yield _ball("l2", label, shape, l2_torchattacks, compiles=True)
        yield _ball("l1", label, shape, l1_autoattack, compiles=False)
        yield from _others(label, shape)
