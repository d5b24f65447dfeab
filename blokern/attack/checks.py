"""Wrong calls, told early: each message names the argument, what came and what was expected."""

from __future__ import annotations

import math
from numbers import Real
from typing import get_args

import torch
from torch import Tensor, nn

from blokern._names import unknown_name
from blokern.ops.types import Norm, PerSample

__all__ = [
    "TOLERANCE",
    "check_batch",
    "check_box",
    "check_count",
    "check_eps",
    "check_finite_logits",
    "check_graphed",
    "check_logits",
    "check_model",
    "check_norm",
    "check_on_cuda",
    "check_radius",
    "check_values",
    "default_eps",
    "digits",
    "per_sample",
    "slack",
]

#: How far images may lie outside the box, and what an attack returns outside the box and the ball: rounding, also of
#: other libraries, leads there. Relative to clip_max − clip_min, or to a radius that is larger.
TOLERANCE = 1e-4


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def check_norm(norm: object) -> None:
    if norm not in get_args(Norm):
        raise unknown_name("norm", norm, get_args(Norm))


def check_box(clip_min: float, clip_max: float) -> None:
    for name, value in (("clip_min", clip_min), ("clip_max", clip_max)):
        if not isinstance(value, Real) or isinstance(value, bool):
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TypeError(
                f"{name} must be a float, the same for all channels, got {got}; keep images in one interval and "
                "normalise their channels inside the model"
            )
    if not clip_min < clip_max:
        raise ValueError(f"clip_min must be less than clip_max, got clip_min={clip_min}, clip_max={clip_max}")


def default_eps(norm: Norm, clip_min: float, clip_max: float) -> float:
    """8/255 of the images' range; ValueError where that is no radius to take without being asked for."""
    check_box(clip_min, clip_max)
    if norm != "linf":
        raise ValueError(
            f"eps must be given for norm={norm!r}: the default, 8/255 of the range, is an linf radius"
        )
    if not math.isfinite(clip_max - clip_min):
        raise ValueError(
            f"eps must be given where the images' range is not finite, got clip_min={clip_min}, clip_max={clip_max}"
        )
    return 8 / 255 * (clip_max - clip_min)


def slack(clip_min: float, clip_max: float, radius: float = 0.0) -> float:
    """`TOLERANCE` in the images' units, for what is as large as their range or `radius`."""
    span = clip_max - clip_min
    return TOLERANCE * max(span if math.isfinite(span) else 1.0, radius)


def digits(value: float) -> str:
    """As many as tell float32 values apart."""
    return f"{value:.9g}"


def check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_radius(name: str, value: PerSample) -> None:
    """A finite float >= 0, or a floating-point tensor [N] of such."""
    if isinstance(value, Tensor):
        if value.dim() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a float or a floating-point tensor of shape [N], "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
        if not bool((value.isfinite() & (value >= 0)).all()):
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    elif not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float or a tensor of shape [N], got {type(value).__name__}")
    elif not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")


def check_eps(eps: PerSample, norm: Norm, clip_min: float, clip_max: float) -> None:
    """A radius; in L∞ no larger than the box is wide, since that is a slip in the unit: any image is in reach."""
    check_radius("eps", eps)
    width = clip_max - clip_min
    largest = float(eps) if not isinstance(eps, Tensor) else float(eps.max()) if len(eps) else 0.0
    if norm == "linf" and largest > width * (1 + 1e-6):
        hint = f"; do you mean {largest:g}/255?" if largest <= 255 * width else ""
        raise ValueError(
            f"eps must be at most clip_max - clip_min = {width:g} in linf, got {largest:g}{hint}"
        )


def check_graphed(
    restarts: int,
    early_stop: bool,
    eps: PerSample,
    step_size: PerSample,
    surrogate: str | None,
    target_classes: int | None,
) -> None:
    """What a loop that is one CUDA graph can be: always the same work."""
    if restarts > 1 or early_stop:
        raise ValueError(
            f"cuda_graph=True runs all steps in one launch, without a look at who is fooled: it takes restarts=1 "
            f"and early_stop=False, got restarts={restarts}, early_stop={early_stop}"
        )
    if surrogate is not None:
        raise ValueError(
            f"cuda_graph=True keeps one network's graph: it takes surrogate=None, got {surrogate!r}"
        )
    if target_classes is not None:
        raise ValueError(f"cuda_graph=True runs once: it takes target_classes=None, got {target_classes}")
    for name, value in (("eps", eps), ("step_size", step_size)):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be a float for cuda_graph=True, got a tensor")


def check_on_cuda(x: Tensor) -> None:
    if x.device.type != "cuda":
        raise ValueError(f"x must be on a CUDA device for cuda_graph=True, got {x.device}")


def per_sample(name: str, value: PerSample, x: Tensor) -> PerSample:
    """`value` for the batch x: a float as it is, a tensor checked against the batch and moved to its
    device."""
    if isinstance(value, Tensor):
        if value.shape[0] != x.shape[0]:
            raise ValueError(f"{name} has {value.shape[0]} values for a batch of {x.shape[0]} samples")
        return value.to(x.device)
    return float(value)


def check_batch(x: Tensor, y: Tensor, of: str = "") -> None:
    """What images and labels are, of which no value is read; `of` begins the messages."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{of}{name} must be a tensor, got {type(value).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{of}x must be floating-point, in [clip_min, clip_max], got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"{of}x must be a batch, [N, ...], got shape {tuple(x.shape)}")
    if y.dtype != torch.int64:
        raise TypeError(
            f"{of}y must be class labels, torch.int64, got {y.dtype} of shape {tuple(y.shape)}; "
            "y.long() of labels, y.argmax(1) of one-hot rows"
        )
    if y.shape != x.shape[:1]:
        raise ValueError(f"{of}y must have shape {tuple(x.shape[:1])} to fit x, got {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"{of}y must be on x's device, {x.device}, got {y.device}")
    if x.numel() == 0 and x.shape[0] > 0:
        raise ValueError(f"{of}x has samples without elements, shape {tuple(x.shape)}")


def check_values(x: Tensor, y: Tensor, clip_min: float, clip_max: float, of: str = "") -> tuple[Tensor, int]:
    """x with what lies outside the box by up to `slack` clipped, and the largest label, for :func:`check_logits`.

    ValueError for images further out and for negative labels. One synchronisation with the device.
    """
    if len(x) == 0:
        return x, -1
    low, high, first, last = torch.stack([v.double() for v in (*x.aminmax(), *y.aminmax())]).tolist()
    near = slack(clip_min, clip_max)
    if not (clip_min - near <= low and high <= clip_max + near):  # NaN fails here too
        raise ValueError(
            f"{of}x must lie in [clip_min, clip_max] = [{clip_min}, {clip_max}], to {near:.3g}, got values in "
            f"[{digits(low)}, {digits(high)}]; normalise inside the model, or give the images' clip_min and clip_max"
        )
    if first < 0:
        raise ValueError(f"{of}y must hold class labels from 0, got {int(first)}")
    if low < clip_min or high > clip_max:
        x = x.clamp(clip_min, clip_max)
    return x, int(last)


def check_logits(logits: Tensor, samples: int, largest_label: int) -> None:
    """That they are [samples, K], of two classes or more, among which the largest label is."""
    if logits.dim() != 2 or logits.shape[0] != samples or not logits.is_floating_point():
        raise ValueError(
            f"model must return floating-point logits of shape [{samples}, K], "
            f"got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    if logits.shape[1] < 2:
        raise ValueError(
            f"model must return the logits of at least two classes, got shape {tuple(logits.shape)}; "
            "of one logit z for class 1, return torch.cat([torch.zeros_like(z), z], dim=1)"
        )
    if largest_label >= logits.shape[1]:
        raise ValueError(
            f"y holds label {largest_label}, but the model has {logits.shape[1]} classes, from 0"
        )


def check_finite_logits(logits: Tensor) -> None:
    """A network that answers NaN or inf has no accuracy, and a figure would pass for one; −inf rules a class out."""
    broken = int((logits.isnan() | logits.isposinf()).any(dim=1).sum())
    if broken:
        raise FloatingPointError(
            f"model returns NaN or inf for {broken} of {len(logits)} unattacked images: are its weights finite?"
        )
