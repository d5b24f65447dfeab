"""The words of the methods' settings: each means the same in every method, so it is checked in one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

__all__ = ["check_numbers"]

# Test, and test in words.
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "eps": (lambda v: 0.0 <= v < math.inf, "a finite number >= 0"),
    "step_size": (lambda v: 0.0 < v < math.inf, "a finite number > 0, or None for the method's default"),
    "attack_steps": (lambda v: isinstance(v, int) and v >= 1, "an integer >= 1"),
    "lam": (lambda v: v >= 0.0, "a number >= 0 (0: 1/step_size; inf: no implicit term)"),
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
