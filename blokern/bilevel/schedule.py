"""Learning rate and momentum as pure functions of the step: a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable

from blokern._names import unknown_name

__all__ = ["SCHEDULES", "constant", "cosine", "cyclic", "learning_rate", "momentum", "multistep"]

#: How far a cycled momentum dips at the learning rate's peak: 0.9 → 0.8 → 0.9 in Fast-BAT's released code.
MOMENTUM_DIP = 0.1


def constant(progress: float) -> float:
    """1 throughout.

    >>> constant(0.7)
    1.0
    """
    return 1.0


def cyclic(progress: float) -> float:
    """The triangle 0 → 1 → 0 over progress 0 → 1, its peak at the middle.

    >>> cyclic(0.25), cyclic(0.5)
    (0.5, 1.0)
    """
    return 1.0 - abs(2.0 * progress - 1.0)


def multistep(progress: float) -> float:
    """1, then 0.1 from half of the run on, then 0.01 from three quarters on.

    >>> multistep(0.49), multistep(0.5)
    (1.0, 0.1)
    """
    if progress < 0.5:
        return 1.0
    return 0.1 if progress < 0.75 else 0.01


def cosine(progress: float) -> float:
    """Half a cosine, 1 → 0.

    >>> cosine(0.0), cosine(1.0)
    (1.0, 0.0)
    """
    return 0.5 + 0.5 * math.cos(math.pi * progress)


#: The schedules by name: progress in [0, 1] → the factor of the peak learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cyclic": cyclic,
    "multistep": multistep,
    "cosine": cosine,
    "constant": constant,
}


def learning_rate(step: int, total: int, *, peak: float, schedule: str = "cyclic") -> float:
    """The learning rate of step ``step`` (0, 1, …) of a run of ``total`` steps.

    Raises:
        ValueError: a schedule that is not one of :data:`SCHEDULES`, or a step outside [0, total].

    >>> learning_rate(50, 200, peak=0.2, schedule="cyclic")
    0.1
    """
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    return peak * SCHEDULES[schedule](_progress(step, total))


def momentum(step: int, total: int, *, base: float, cycle: bool = False) -> float:
    """The momentum of step ``step``: ``base``, or with ``cycle`` ``base`` → ``base`` − 0.1 → ``base``.

    Raises:
        ValueError: a step outside [0, total].

    >>> momentum(100, 200, base=0.9, cycle=True)
    0.8
    """
    dip = MOMENTUM_DIP * cyclic(_progress(step, total)) if cycle else 0.0
    return base - dip


def _progress(step: int, total: int) -> float:
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}")
    if not 0 <= step <= total:
        raise ValueError(f"step must be in [0, {total}], got {step}")
    return step / total
