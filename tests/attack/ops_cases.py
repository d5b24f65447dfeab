"""What the op tests have in common: one call of each op on random images, for the kernels and for the oracles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NORMS = ("linf", "l2", "l1")
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALVES)
#: (eps, step_size) that make both the ball and the box matter for images of a few hundred elements.
SIZES = {"linf": (0.1, 0.07), "l2": (0.8, 0.9), "l1": (4.0, 6.0)}
#: An ulp in [0, 1]: arithmetic is float32 or better, so rounding the result, towards x, is all that a half loses.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 3e-7,
    torch.bfloat16: 2.0**-8 + 3e-7,
    torch.float16: 2.0**-11 + 3e-7,
}

Images = tuple[Tensor, Tensor, Tensor]


def images(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Images:
    """(x_adv, x, grad): x in the box and often on its border, x_adv around it, some gradients exactly zero."""
    gen = torch.Generator().manual_seed(seed)
    x = (torch.rand(shape, generator=gen, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    x_adv = x + 0.3 * (torch.rand(shape, generator=gen, dtype=torch.float64) - 0.5)
    grad = torch.randn(shape, generator=gen, dtype=torch.float64)
    grad[torch.rand(shape, generator=gen) < 0.1] = 0
    return x_adv.to(dtype), x.to(dtype), grad.to(dtype)


def calls(ops: object, norm: str, **options: object) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """Each op as a function of (x_adv, x, grad) that returns all that it computes and touches no argument."""
    eps, step = SIZES[norm]
    args = {"norm": norm, "clip_min": 0.0, "clip_max": 1.0, **options}

    def pgd_step_(x_adv: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return (ops.pgd_step_(x_adv.clone(), x, grad, step, eps, **args),)

    def project_(x_adv: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return (ops.project_(x_adv.clone(), x, eps, **args),)

    def apgd_step_(x_adv: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        current, previous = x_adv.clone(), (2 * x - x_adv).clone()
        keep = 3 if norm == "l1" else None
        ops.apgd_step_(current, previous, x, grad, step, eps, momentum=0.7, keep=keep, **args)
        return current, previous

    found = {
        "pgd_step": lambda x_adv, x, grad: (ops.pgd_step(x_adv, x, grad, step, eps, **args),),
        "pgd_step_": pgd_step_,
        "project": lambda x_adv, x, grad: (ops.project(x_adv, x, eps, **args),),
        "project_": project_,
        "apgd_step_": apgd_step_,
    }
    if norm == "linf" and "active" not in options:
        box = {"clip_min": 0.0, "clip_max": 1.0}
        found["fast_bat_step"] = lambda x_adv, x, grad: ops.fast_bat_step(
            x_adv - x, x, grad, step, eps, **box
        )
    return found
