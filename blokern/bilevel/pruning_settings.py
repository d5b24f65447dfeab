"""The settings of the pruning methods."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blokern.bilevel.masking import PruningSettings

__all__ = [
    "GraSPSettings",
    "HydraSettings",
    "IMPSettings",
    "OMPSettings",
    "RandomPruningSettings",
    "SNIPSettings",
    "SynFlowSettings",
]


@dataclass(frozen=True, kw_only=True)
class OMPSettings(PruningSettings):
    """`PruningSettings` of `OMP`."""


@dataclass(frozen=True, kw_only=True)
class IMPSettings(PruningSettings):
    """`PruningSettings` of `IMP`.

    Args:
        rate: part of the remaining weights that a round prunes.
        rewind_epoch: epoch of the dense training whose weights each round starts from again; 0 is the initialisation.
    """

    rate: float = 0.2
    rewind_epoch: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number(self, "rate")
        if not 0.0 < self.rate < 1.0:
            raise ValueError(f"rate must be in (0, 1), got {self.rate}")
        _check_count(self, "rewind_epoch", 0)


@dataclass(frozen=True, kw_only=True)
class SNIPSettings(PruningSettings):
    """`PruningSettings` of `SNIP`."""


@dataclass(frozen=True, kw_only=True)
class GraSPSettings(PruningSettings):
    """`PruningSettings` of `GraSP`.

    Args:
        temperature: what the logits are divided by.
    """

    temperature: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "temperature")


@dataclass(frozen=True, kw_only=True)
class SynFlowSettings(PruningSettings):
    """`PruningSettings` of `SynFlow`.

    Args:
        rounds: how often weights are scored and pruned, to densities density^(i / rounds).
    """

    rounds: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "rounds", 1)


@dataclass(frozen=True, kw_only=True)
class HydraSettings(PruningSettings):
    """`PruningSettings` of `Hydra`.

    Args:
        score_epochs: passes over the batches that train the scores.
        score_lr: peak learning rate of the scores; it falls to 0 along a cosine.
        score_momentum: momentum of the scores' SGD.
    """

    score_epochs: int = 20
    score_lr: float = 0.1
    score_momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "score_epochs", 1)
        _check_positive(self, "score_lr")
        _check_number(self, "score_momentum")
        if not 0.0 <= self.score_momentum < 1.0:
            raise ValueError(f"score_momentum must be in [0, 1), got {self.score_momentum}")


@dataclass(frozen=True, kw_only=True)
class RandomPruningSettings(PruningSettings):
    """`PruningSettings` of `RandomPruning`.

    Args:
        seed: seed of the scores.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "seed", 0)


def _check_count(settings: PruningSettings, name: str, least: int) -> None:
    value = getattr(settings, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_number(settings: PruningSettings, name: str) -> None:
    value = getattr(settings, name)
    if not isinstance(value, float | int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _check_positive(settings: PruningSettings, name: str) -> None:
    _check_number(settings, name)
    value = getattr(settings, name)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
