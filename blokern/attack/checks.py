"""Wrong calls, told early: each message names the argument, what came and what was expected."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor, nn

from blokern._names import unknown_name
from blokern.ops.types import Norm, PerSample

__all__ = [
    "check_batch",
    "check_box",
    "check_count",
    "check_graphed",
    "check_logits",
    "check_model",
    "check_norm",
    "check_on_cuda",
    "check_radius",
    "per_sample",
]


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def check_norm(norm: object) -> None:
    if norm not in get_args(Norm):
        raise unknown_name("norm", norm, get_args(Norm))


def check_box(clip_min: float, clip_max: float) -> None:
    if not clip_min < clip_max:
        raise ValueError(f"clip_min must be less than clip_max, got clip_min={clip_min}, clip_max={clip_max}")


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


def check_graphed(
    restarts: int, early_stop: bool, eps: PerSample, step_size: PerSample, surrogate: str | None
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


def check_batch(x: Tensor, y: Tensor, clip_min: float, clip_max: float) -> int:
    """Checks images and labels; returns the largest label, for :func:`check_logits`.

    One synchronisation with the device for everything that only the values tell.
    """
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating-point in [{clip_min}, {clip_max}], got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"x must be a batch, [N, ...], got shape {tuple(x.shape)}")
    if y.dtype != torch.int64:
        raise TypeError(f"y must be class labels, torch.int64, got {y.dtype}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must have shape {tuple(x.shape[:1])} to fit x, got {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"y must be on x's device, {x.device}, got {y.device}")
    if x.numel() == 0:
        if x.shape[0] > 0:
            raise ValueError(f"x has samples without elements, shape {tuple(x.shape)}")
        return -1
    low, high, first, last = torch.stack([v.double() for v in (*x.aminmax(), *y.aminmax())]).tolist()
    if not (clip_min <= low and high <= clip_max):  # NaN fails here too
        raise ValueError(
            f"x must lie in [clip_min, clip_max] = [{clip_min}, {clip_max}], "
            f"got values in [{low:.4g}, {high:.4g}]; normalise inside the model"
        )
    if first < 0:
        raise ValueError(f"y must hold class labels from 0, got {int(first)}")
    return int(last)


def check_logits(logits: Tensor, samples: int, largest_label: int) -> None:
    if logits.dim() != 2 or logits.shape[0] != samples or not logits.is_floating_point():
        raise ValueError(
            f"model must return floating-point logits of shape [{samples}, K], "
            f"got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    if largest_label >= logits.shape[1]:
        raise ValueError(
            f"y holds label {largest_label}, but the model has {logits.shape[1]} classes, from 0"
        )
