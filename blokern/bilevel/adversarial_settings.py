"""The settings of adversarial training's rules. Defaults are relative to the images' range, clip_max − clip_min."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypedDict

from blokern.attack.checks import check_box, check_eps, default_eps
from blokern.bilevel.settings import Precision, check_numbers, check_precision

__all__ = [
    "AdversarialSettings",
    "Box",
    "FastATSettings",
    "GradAlignSettings",
    "NFGSMATSettings",
    "PGDATSettings",
    "PlainSettings",
    "TRADESSettings",
]


class Box(TypedDict):
    """The images' interval, as the ops take it."""

    clip_min: float
    clip_max: float


@dataclass(frozen=True, kw_only=True)
class PlainSettings:
    """Settings of `Plain`.

    Args:
        precision: fp32, or bf16 for forwards under bfloat16 autocast.

    Raises:
        TypeError, ValueError: a setting of another type or out of range.
    """

    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_precision(self.precision)

    @property
    def box(self) -> Box:
        """Where images may lie."""
        return {"clip_min": -math.inf, "clip_max": math.inf}


@dataclass(frozen=True, kw_only=True)
class AdversarialSettings(PlainSettings, ABC):
    """What every L∞ method takes.

    Args:
        eps: radius of the perturbation, in the images' units; None becomes 8/255 of their range.
        step_size: step of the training attack, in the images' units; None is the method's default for this eps, see
            `attack_step_size`.
        clip_min: least value of an image.
        clip_max: greatest value of an image.
        precision: fp32, or bf16 for forwards under bfloat16 autocast.

    Raises:
        TypeError, ValueError: a setting of another type or out of range.
    """

    eps: float = None  # type: ignore[assignment]  # a float once it is made
    step_size: float | None = None
    clip_min: float = 0.0
    clip_max: float = 1.0

    def __post_init__(self) -> None:
        check_box(self.clip_min, self.clip_max)
        super().__post_init__()
        self._default("eps", default_eps("linf", self.clip_min, self.clip_max))
        check_eps(self.eps, "linf", self.clip_min, self.clip_max)

    def _default(self, name: str, value: float) -> None:
        """Gives a setting that is None its value."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @property
    def box(self) -> Box:
        return {"clip_min": self.clip_min, "clip_max": self.clip_max}

    @property
    def span(self) -> float:
        """The images' range, which numbers of [0, 1] are to be scaled by."""
        return self.clip_max - self.clip_min

    @property
    def attack_step_size(self) -> float:
        """The step size in use."""
        return self._default_step_size() if self.step_size is None else self.step_size

    @abstractmethod
    def _default_step_size(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class FastATSettings(AdversarialSettings):
    """`AdversarialSettings` of `FastAT`; step_size is 1.25 eps by default."""

    def _default_step_size(self) -> float:
        return 1.25 * self.eps


@dataclass(frozen=True, kw_only=True)
class NFGSMATSettings(AdversarialSettings):
    """`AdversarialSettings` of `NFGSMAT`; step_size is eps by default."""

    def _default_step_size(self) -> float:
        return self.eps


@dataclass(frozen=True, kw_only=True)
class GradAlignSettings(FastATSettings):
    """`AdversarialSettings` of `GradAlign`; step_size is 1.25 eps by default.

    Args:
        penalty: the weight c of 1 − cos; None is the paper's for this eps, see `alignment_penalty`.
    """

    penalty: float | None = None

    @property
    def alignment_penalty(self) -> float:
        """The penalty in use; by default 0.2 · 10^((255 e − 8)/8), e being eps as a part of the images' range, which
        the released code tabulates, and from the table's end at 16/255 on its last value, 2: the exponential soon
        drowns the loss."""
        if self.penalty is not None:
            return self.penalty
        return 0.2 * math.pow(10.0, (min(255.0 * (self.eps / self.span), 16.0) - 8.0) / 8.0)


@dataclass(frozen=True, kw_only=True)
class PGDATSettings(AdversarialSettings):
    """`AdversarialSettings` of `PGDAT`; step_size is eps/attack_steps by default, but no less than eps/4.

    That is eps/2 for two steps, and 2/255 for ten at eps = 8/255.

    Args:
        attack_steps: sign steps of the attack.
    """

    attack_steps: int = 2

    def _default_step_size(self) -> float:
        return self.eps / min(self.attack_steps, 4)


@dataclass(frozen=True, kw_only=True)
class TRADESSettings(PGDATSettings):
    """`PGDATSettings` of `TRADES`.

    Args:
        attack_steps: sign steps of the attack.
        beta: weight of the KL divergence.
    """

    attack_steps: int = 10
    beta: float = 6.0
