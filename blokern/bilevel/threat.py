"""What an attacker may do to an image: one description, which travels with a network from its training on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from blokern.attack import checks
from blokern.bilevel.adversarial import AdversarialSettings
from blokern.bilevel.checkpoint import CheckpointError
from blokern.ops.types import Norm

__all__ = ["ThreatModel"]


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """A perturbation of at most `eps` in `norm`, that leaves an image in [`clip_min`, `clip_max`].

    Raises:
        TypeError, ValueError: no such norm, ball or box; an L∞ ball that is larger than the box.

    >>> threat = ThreatModel(eps=8 / 255)
    >>> threat.norm, threat.clip_max
    ('linf', 1.0)
    """

    eps: float
    norm: Norm = "linf"
    clip_min: float = 0.0
    clip_max: float = 1.0

    def __post_init__(self) -> None:
        for name in ("eps", "clip_min", "clip_max"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
        checks.check_norm(self.norm)
        checks.check_box(self.clip_min, self.clip_max)
        checks.check_eps(self.eps, self.norm, self.clip_min, self.clip_max)

    @classmethod
    def of_rule(cls, rule: object) -> ThreatModel | None:
        """What a training rule attacks with; None for one that does not attack.

        >>> ThreatModel.of_rule(rule)
        """
        settings = getattr(rule, "settings", None)
        if not isinstance(settings, AdversarialSettings):
            return None
        return cls(eps=settings.eps, clip_min=settings.clip_min, clip_max=settings.clip_max)

    @classmethod
    def of_checkpoint(cls, payload: Mapping[str, Any], source: object) -> ThreatModel | None:
        """What the network of a checkpoint was trained for; None where its training met no attack.

        Raises CheckpointError, naming `source`, if what it says is no threat model.

        >>> ThreatModel.of_checkpoint(checkpoint.load("best.pt"), "best.pt")
        """
        told = payload["threat"] if "threat" in payload else _of_recipe(payload)
        if told is None:
            return None
        try:
            return cls(**told)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{source} says nothing sound of its threat model: {error}") from error

    def plain(self) -> dict[str, Any]:
        """By name, as checkpoints and exports keep it."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.norm}, eps {self.eps:.4g}"


def _of_recipe(payload: Mapping[str, Any]) -> dict[str, Any] | None:
    """As checkpoints of before tell it, whose methods attack in L∞: among the method's settings."""
    recipe = payload.get("recipe")
    method = recipe.get("method") if isinstance(recipe, Mapping) else None
    if not isinstance(method, Mapping) or "eps" not in method:
        return None
    return {field.name: method[field.name] for field in fields(ThreatModel) if field.name in method}
