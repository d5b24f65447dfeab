"""Fused perturbation steps: one pass over memory where eager PyTorch takes seven to twenty.

All take images of shape [N, ...] (float64, float32, bfloat16 or float16, any layout), treat the first dimension as
samples, work per sample, are deterministic whatever the number of threads, and have no derivative: an argument that
requires grad outside ``torch.no_grad()``, or has a tangent, is a ValueError. Arithmetic is at least float32.

`eps` and `step_size` are floats or tensors of shape [N], or [] for one value; `clip_min` and `clip_max`, the box, are
floats, the same for all channels; `active`, a bool tensor [N], leaves samples where it is false as they are. Every
function raises ValueError for a value, shape, device or name that does not fit and TypeError for a type that does not,
naming the argument.

What is stored as bfloat16 or float16 lies in the ball and in the box as the real numbers that it is: bounds and results
are rounded towards x (the norms of "l2" and "l1" are known to 1e-6 of eps), and a box that has none of the type's
numbers is a ValueError. In float32 and float64 results are rounded to the nearest, as in a loop of torch's ops, whose
bits "linf" has: they are off by half an ulp of x + eps at most for each element.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor

from blokern._backend import C
from blokern._names import unknown_name
from blokern.ops.types import Norm, PerSample

__all__ = ["apgd_step_", "fast_bat_step", "pgd_step", "pgd_step_", "project", "project_", "random_start"]

#: As the native ops have them: p, or 0 for infinity.
_NORMS = {"linf": 0, "l2": 2, "l1": 1}


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
    """One projected-gradient ascent step, as a new tensor laid out like `x_adv`.

    x_adv + step_size · direction, projected onto {‖x_adv − x‖ ≤ eps}, then clipped to [clip_min, clip_max]. The
    direction is sign(grad) for "linf", grad/‖grad‖₂ for "l2", grad/‖grad‖₁ for "l1", and zero where the norm is zero;
    for "l1" the projection is the exact Euclidean one onto ball and box together.

    x_adv, x, grad: [N, ...] of one dtype; float32 images also take bfloat16 or float16 gradients, as autocast
    leaves them. Source: Madry et al., ICLR 2018; for "l1" Croce & Hein, ICML 2021.

    >>> x = torch.tensor([[0.5, 0.9]]); grad = torch.tensor([[1.0, 2.0]])
    >>> pgd_step(x, x, grad, 0.2, 0.1)
    tensor([[0.6000, 1.0000]])
    """
    step, radius, steps, radii = _sizes(x_adv, step_size, eps)
    args = (x_adv, x, grad, step, radius, steps, radii, _code(norm), clip_min, clip_max, active)
    return cast(Tensor, _call("pgd_step", args))


def pgd_step_(
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
    """:func:`pgd_step` in place: writes `x_adv`, bumps its version, returns it. The form for an attack's loop.

    `x_adv` may not share part of its memory with `x` or `grad`, nor be an expanded tensor (ValueError).

    >>> x = torch.full((1, 2), 0.5); x_adv = x.clone()
    >>> pgd_step_(x_adv, x, torch.tensor([[3.0, 4.0]]), 1.0, 0.1, norm="l2")
    tensor([[0.5600, 0.5800]])
    """
    step, radius, steps, radii = _sizes(x_adv, step_size, eps)
    _call("pgd_step_", (x_adv, x, grad, step, radius, steps, radii, _code(norm), clip_min, clip_max, active))
    return x_adv


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
    """x_adv brought back into {‖x_adv − x‖ ≤ eps} ∩ [clip_min, clip_max]: :func:`pgd_step` without a step.

    "linf" and "l2" go to the ball, then to the box; "l1" is the exact Euclidean projection onto their intersection
    (no sort: a root of one monotone function). Where x itself is so far outside the box that the two do not meet, the
    box wins.

    >>> project(torch.tensor([[0.9, 0.5]]), torch.tensor([[0.5, 0.5]]), 0.1, norm="l1")
    tensor([[0.6000, 0.5000]])
    """
    radius, radii = _radius(x_adv, eps)
    return cast(Tensor, _call("project", (x_adv, x, radius, radii, _code(norm), clip_min, clip_max, active)))


def project_(
    x_adv: Tensor,
    x: Tensor,
    eps: PerSample,
    *,
    norm: Norm = "linf",
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    active: Tensor | None = None,
) -> Tensor:
    """:func:`project` in place: writes `x_adv`, bumps its version, returns it.

    >>> project_(torch.tensor([[0.9, 0.5]]), torch.tensor([[0.5, 0.5]]), 0.1)
    tensor([[0.6000, 0.5000]])
    """
    radius, radii = _radius(x_adv, eps)
    _call("project_", (x_adv, x, radius, radii, _code(norm), clip_min, clip_max, active))
    return x_adv


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
    """One Auto-PGD step in place: `x_adv` takes the next iterate, `x_prev` the current one; returns `x_adv`.

    z = P(x_adv + step_size · direction), then P(x_adv + momentum · (z − x_adv) + (1 − momentum) · (x_adv − x_prev));
    with momentum 1, z itself. For "l1" the direction is the sign of a sample's `keep` largest gradient entries (an int,
    or int64 [N]; None: all) over their number. Source: Croce & Hein, ICML 2020; for "l1" Croce &
    Hein, ICML 2021.

    >>> x = torch.full((1, 2), 0.5); x_adv, x_prev = x.clone(), x.clone()
    >>> apgd_step_(x_adv, x_prev, x, torch.tensor([[1.0, -1.0]]), 0.1, 0.2, momentum=1.0)
    tensor([[0.6000, 0.4000]])
    """
    step, radius, steps, radii = _sizes(x_adv, step_size, eps)
    if isinstance(keep, Integral):
        keep = torch.full((x_adv.shape[0],), int(keep), dtype=torch.int64, device=x_adv.device)
    args = (
        x_adv,
        x_prev,
        x,
        grad,
        step,
        radius,
        steps,
        radii,
        momentum,
        _code(norm),
        clip_min,
        clip_max,
        keep,
        active,
    )
    _call("apgd_step_", args)
    return x_adv


def random_start(
    x: Tensor,
    eps: PerSample,
    *,
    norm: Norm = "linf",
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    first: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x + δ clipped to [clip_min, clip_max], δ uniform in the ball of radius `eps`, drawn anew for each sample.

    Takes one 64-bit seed from `generator` (None: torch's own); from there Philox counters, laid out as
    csrc/attack/random_start.h says: a sample's draw depends on its index and shape, not on the batch or on threads,
    and is the same to rounding in every dtype. first: the index of x's first sample, so that a part of a batch draws
    what it would within the whole.

    >>> random_start(torch.zeros(2, 3), 0.1, generator=torch.Generator().manual_seed(0)).amax() <= 0.1
    tensor(True)
    """
    radius, radii = _radius(x, eps)
    return cast(
        Tensor, _call("random_start", (x, radius, radii, _code(norm), clip_min, clip_max, first, generator))
    )


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
    """Fast-BAT's lower level in closed form: (delta, free).

    delta = P_C(z − step_size · grad), C = {‖δ‖∞ ≤ eps, clip_min ≤ x + δ ≤ clip_max}; note the sign: `grad` is that of
    the attacker's loss ℓ_atk = −CE at z, and is descended. free (bool) is H_C's diagonal: true where
    max(−eps, clip_min − x) < z − step_size · grad < min(eps, clip_max − x), so that delta moves with θ there.

    z, x, grad: [N, ...], z a perturbation, not an image. Source: Zhang et al., ICML 2022.

    >>> z, x = torch.zeros(1, 3), torch.tensor([[0.5, 0.5, 1.0]])
    >>> fast_bat_step(z, x, torch.tensor([[-0.05, -1.0, -1.0]]), 1.0, 0.1)
    (tensor([[0.0500, 0.1000, 0.0000]]), tensor([[ True, False, False]]))
    """
    step, radius, steps, radii = _sizes(z, step_size, eps)
    args = (z, x, grad, step, radius, steps, radii, clip_min, clip_max)
    return cast(tuple[Tensor, Tensor], _call("fast_bat_step", args))


# The ops' arguments in order, and those that are not tensors.
_SIZES = ("uniform_step_size", "uniform_eps", "step_size", "eps")
_PGD_STEP = ("x_adv", "x", "grad", *_SIZES, "norm", "clip_min", "clip_max", "active")
_PROJECT = ("x_adv", "x", "uniform_eps", "eps", "norm", "clip_min", "clip_max", "active")
_ARGUMENTS = {
    "pgd_step": _PGD_STEP,
    "pgd_step_": _PGD_STEP,
    "project": _PROJECT,
    "project_": _PROJECT,
    "apgd_step_": (
        *(
            "x_adv",
            "x_prev",
            "x",
            "grad",
            *_SIZES,
            "momentum",
            "norm",
            "clip_min",
            "clip_max",
            "keep",
            "active",
        ),
    ),
    "random_start": ("x", "uniform_eps", "eps", "norm", "clip_min", "clip_max", "first", "generator"),
    "fast_bat_step": ("z", "x", "grad", *_SIZES, "clip_min", "clip_max"),
}
#: Where a call's box stands.
_BOX_AT = {name: arguments.index("clip_min") for name, arguments in _ARGUMENTS.items()}
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "uniform_step_size": ("a float or a Tensor", (Real, Tensor)),
    "uniform_eps": ("a float or a Tensor", (Real, Tensor)),
    "step_size": ("a Tensor or None", (Tensor, type(None))),
    "eps": ("a Tensor or None", (Tensor, type(None))),
    "momentum": ("a float", (Real,)),
    "norm": ("an int", (int,)),
    "clip_min": ("a float", (Real,)),
    "clip_max": ("a float", (Real,)),
    "active": ("a Tensor or None", (Tensor, type(None))),
    "keep": ("an int, a Tensor or None", (Integral, Tensor, type(None))),
    "first": ("an int", (Integral,)),
    "generator": ("a torch.Generator or None", (torch.Generator, type(None))),
}


def _code(norm: Norm) -> int:
    try:
        return _NORMS[norm]
    except (KeyError, TypeError):
        raise unknown_name("norm", norm, tuple(_NORMS)) from None


def _call(name: str, args: tuple[Any, ...]) -> Any:
    """Runs an op: by torch's own handle where torch.compile is tracing, else by the cheaper direct call."""
    if isinstance(args[_BOX_AT[name]], Tensor) or isinstance(args[_BOX_AT[name] + 1], Tensor):
        _check_kinds(name, args)
    if torch.compiler.is_compiling():
        return getattr(torch.ops.blokern, name).default(*args)
    try:
        return getattr(C, name)(*args)
    except (TypeError, NotImplementedError):
        # pybind11's TypeError lists signatures without names; the dispatcher's NotImplementedError, for a tensor of a
        # layout that no op takes, lists backends: say which argument does not fit.
        _check_kinds(name, args)
        raise


def _check_kinds(name: str, args: tuple[Any, ...]) -> None:
    """Raises TypeError for the first argument of a wrong type, if there is one."""
    for argument, value in zip(_ARGUMENTS[name], args, strict=True):
        expected, kinds = _KINDS.get(argument, ("a Tensor", (Tensor,)))
        if not isinstance(value, kinds):
            hint = ": the box is the same for all channels" if argument.startswith("clip_") else ""
            argument = argument.removeprefix("uniform_")
            raise TypeError(f"{argument} must be {expected}, got {type(value).__name__}{hint}") from None
        if isinstance(value, Tensor) and (
            value.layout != torch.strided or value.is_nested or value.is_quantized
        ):
            raise TypeError(
                f"{argument} must be a dense tensor, got one of layout {value.layout}, {value.dtype}"
            )


def _sizes(images: Tensor, step_size: PerSample, eps: PerSample) -> tuple[Any, Any, Any, Any]:
    """Both as the ops take them: two floats, or two tensors where one of them is one."""
    if isinstance(step_size, Tensor) or isinstance(eps, Tensor) or torch.compiler.is_compiling():
        return 0.0, 0.0, _per_sample("step_size", step_size, images), _per_sample("eps", eps, images)
    return step_size, eps, None, None


def _radius(images: Tensor, eps: PerSample) -> tuple[Any, Any]:
    if isinstance(eps, Tensor) or torch.compiler.is_compiling():
        return 0.0, _per_sample("eps", eps, images)
    return eps, None


def _per_sample(name: str, size: PerSample, images: Tensor) -> Tensor | None:
    """A size as a float64 tensor of shape [N].

    In a graph, where it always is one, by these products: a float that an op takes, torch.full too, is a constant of
    the graph, and another value a reason to compile anew.
    """
    if not isinstance(images, Tensor):
        return None  # the op refuses them
    if isinstance(size, float | int):
        return images.new_ones(images.shape[:1], dtype=torch.float64) * size
    if isinstance(size, Real):  # NumPy's
        return images.new_full(images.shape[:1], float(size), dtype=torch.float64)
    if not isinstance(size, Tensor):
        raise TypeError(f"{name} must be a float or a Tensor, got {type(size).__name__}")
    if size.dtype == torch.bool or size.is_complex():
        raise TypeError(f"{name} must be a Tensor of real numbers, got {size.dtype}")
    return (size.expand(images.shape[:1]) if size.dim() == 0 else size).to(torch.float64)


def _register_fakes() -> None:
    """Shapes for tracing. The in-place forms return nothing; the others are laid out like their first argument."""

    def like_first(first: Tensor, *_: object) -> Tensor:
        return torch.empty_like(first)

    def nothing(*_: object) -> None:
        return None

    def delta_and_free(z: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return torch.empty_like(z), torch.empty_like(z, dtype=torch.bool)

    fakes: dict[str, Any] = {
        "pgd_step": like_first,
        "pgd_step_": nothing,
        "project": like_first,
        "project_": nothing,
        "apgd_step_": nothing,
        "random_start": like_first,
        "fast_bat_step": delta_and_free,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"blokern::{name}", fake)


def _register_vmaps() -> None:
    """A vmapped dimension joins the samples: every tensor of these ops has the samples first."""

    def rule(op: Any) -> Any:
        def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
            def joined(arg: Any, dim: int | None) -> Any:
                if not isinstance(arg, Tensor):
                    return arg
                stacked = arg.movedim(dim, 0) if dim is not None else arg.expand(info.batch_size, *arg.shape)
                return stacked.flatten(0, 1)

            def parted(out: Tensor) -> Tensor:
                return out.view(info.batch_size, out.shape[0] // info.batch_size, *out.shape[1:])

            out = op(*(joined(arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
            return (parted(out), 0) if isinstance(out, Tensor) else (tuple(map(parted, out)), (0,) * len(out))

        return batched

    for name in ("pgd_step", "project", "fast_bat_step"):
        op = getattr(torch.ops.blokern, name).default
        torch.library.register_vmap(op, rule(op))


_register_fakes()
_register_vmaps()
