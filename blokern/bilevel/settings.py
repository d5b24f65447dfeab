"""The words of the methods' settings: each means the same in every method, so it is checked in one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from blokern._names import unknown_name

__all__ = ["Precision", "autocast", "check_numbers", "check_precision"]

#: "fp32": in the model's own dtype; "bf16": forwards under bfloat16 autocast, weights and images stay
#: float32.
Precision: TypeAlias = Literal["fp32", "bf16"]

# Test, and test in words.
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "eps": (lambda v: 0.0 <= v < math.inf, "a finite number >= 0"),
    "step_size": (lambda v: 0.0 < v < math.inf, "a finite number > 0, or None for the method's default"),
    "attack_steps": (lambda v: isinstance(v, int) and v >= 1, "an integer >= 1"),
    "lam": (
        lambda v: v >= 0.0,
        "a number >= 0 (0: 1/step_size; inf: no implicit term), or None for the paper's",
    ),
    "penalty": (lambda v: 0.0 <= v < math.inf, "a finite number >= 0, or None for the paper's"),
    "beta": (lambda v: 0.0 <= v < math.inf, "a finite number >= 0"),
    "clip_min": (math.isfinite, "a finite number"),
    "clip_max": (math.isfinite, "a finite number"),
    "gamma": (lambda v: v > 0.0, "a number > 0 (inf: no implicit term), or None for the mode's default"),
    "implicit_steps": (lambda v: isinstance(v, int) and v >= 1, "an integer >= 1"),
    "implicit_scale": (lambda v: 0.0 < v < math.inf, "a finite number > 0"),
    "score_lr": (lambda v: 0.0 <= v < math.inf, "a finite number >= 0"),
    "score_momentum": (lambda v: 0.0 <= v < 1.0, "a number in [0, 1)"),
    "score_weight_decay": (lambda v: 0.0 <= v < math.inf, "a finite number >= 0"),
}


def check_numbers(settings: Any) -> None:
    """Raises TypeError or ValueError for a number of another type or out of range; `settings` is a dataclass."""
    for setting in fields(settings):
        name, value = setting.name, getattr(settings, setting.name)
        if name in _NUMBERS and not (value is None and setting.default is None):
            allowed, expected = _NUMBERS[name]
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be {expected}, got {value!r}")
            if not allowed(value):
                raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_precision(precision: object) -> None:
    """Raises ValueError for another name."""
    if precision not in get_args(Precision):
        raise unknown_name("precision", precision, get_args(Precision))


def autocast(precision: Precision, x: Tensor) -> torch.autocast:
    """Of a forward pass at x, whatever autocast surrounds it."""
    # Without the weight cache: inside a caller's own autocast it would outlive this step and hand the next one the old
    # weights; and a net uses each weight once a forward, so it would save nothing.
    return torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
